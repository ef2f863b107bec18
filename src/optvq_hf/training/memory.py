"""What a training run will need in memory, planned on the meta device before anything of its size is made."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from accelerate import PartialState

from ..configuration_optvq import OptVQConfig
from ..distances import BLOCK_ELEMENTS
from ..modeling_optvq import OptVQModel
from ..sinkhorn_rows import MEMORY_BUDGET
from .arguments import Recipe
from .losses.objective import make_discriminator


# Share of the free memory that a run may plan with: data, fragments of freed memory and other processes need the rest.
USABLE = 0.9


@dataclass
class MemoryPlan:
    """What a run needs in each process, in bytes.

    Attributes:
        num_parameters: Trained parameters of autoencoder and discriminator.
        tokens_per_step: Tokens of a batch of one process; each has `num_codebook_heads` features.
        base: What the process takes already, on a CPU.
        weights: Weights, gradients, moments of AdamW, and the EMA of the weights.
        activations: What the forward pass keeps for the backward pass, and the largest pieces that come on top of it.
        transport: Rows of distances that the solver keeps, with its blocks.
    """

    num_parameters: int
    tokens_per_step: int
    base: int
    weights: int
    activations: int
    transport: int

    @property
    def total(self) -> int:
        """Peak of the process, in bytes."""
        return self.base + self.weights + self.activations + self.transport

    def __str__(self) -> str:
        parts = {"weights": self.weights, "activations": self.activations, "transport": self.transport}
        listed = ", ".join(f"{name} {in_gb(number)}" for name, number in parts.items())
        return (
            f"{self.num_parameters:,} parameters, {self.tokens_per_step:,} tokens per step; memory about "
            f"{in_gb(self.total)} (process {in_gb(self.base)}, {listed})"
        )


def plan_memory(config: OptVQConfig, recipe: Recipe, device: torch.device) -> MemoryPlan:
    """Plans one process's memory, without making anything of its size.

    Raises:
        ValueError: If images are too small for the discriminator, or sizes too large for any computer.
    """
    try:
        return _plan(config, recipe, device)
    except RuntimeError as error:  # torch cannot count so many bytes
        raise ValueError(f"the sizes of the run are too large together: {' '.join(str(error).split())}") from error


def _plan(config: OptVQConfig, recipe: Recipe, device: torch.device) -> MemoryPlan:
    training, objective = recipe.training, recipe.objective
    with torch.device("meta"):
        model = OptVQModel(config).train()
    discriminator = None
    if objective.adversarial_weight > 0:
        with torch.device("meta" if objective.discriminator_weights is None else "cpu"):
            discriminator = make_discriminator(objective, config.num_channels).to("meta")
    if training.gradient_checkpointing:
        model.activation_checkpointing_enable()
    size, batch_size = config.image_size, training.batch_size
    pixels = torch.empty(batch_size, config.num_channels, size, size, device="meta")
    latents = torch.empty(batch_size, config.codebook_dim, config.latent_size, config.latent_size, device="meta")
    kept = _kept_for_backward(lambda: model._decode(latents.requires_grad_()))
    kept += _kept_for_backward(lambda: model.quant_conv(model.encoder(pixels.requires_grad_())))
    if discriminator is not None:  # called on reconstructions for the autoencoder, on both for itself
        kept += 3 * _kept_for_backward(lambda: discriminator(pixels))
    kept += (
        8 * pixels.nbytes + 8 * latents.nbytes
    )  # reconstructions, differences, their squares; features and code vectors
    if training.mixed_precision == "bf16":
        kept = kept * 6 // 10
    num_parameters = sum(p.numel() for net in (model, discriminator) if net is not None for p in net.parameters())
    copies = 4 + (recipe.optimization.ema_decay > 0)
    num_tokens = batch_size * config.tokens_per_image
    return MemoryPlan(
        num_parameters=num_parameters,
        tokens_per_step=num_tokens,
        base=psutil.Process().memory_info().rss if device.type == "cpu" else 0,
        weights=4 * copies * num_parameters,
        activations=kept,
        transport=_transport(num_tokens * config.num_codebook_heads, config, device),
    )


def _kept_for_backward(forward: Callable[[], torch.Tensor]) -> int:
    """Bytes of the tensors that a forward pass keeps, with twice the largest, which gradients and kernels need besides."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    sizes = [storage.nbytes() for storage in kept.values()]
    return sum(sizes) + 2 * max(sizes, default=0)


def _transport(num_features: int, config: OptVQConfig, device: torch.device) -> int:
    if config.training_assignment == "nearest":
        return 0
    block = 4 * BLOCK_ELEMENTS["cpu" if device.type == "cpu" else "other"]
    return min(4 * num_features * config.codebook_size, MEMORY_BUDGET) + 3 * block


def check_memory(plan: MemoryPlan, config: OptVQConfig, recipe: Recipe, device: torch.device) -> None:
    """Raises ValueError, with what would fit, if a run needs more than the device has free."""
    free = usable_memory(device)
    if plan.total - plan.base > free:
        batch_size = fitting_batch_size(config, recipe, device)
        fits = _fits(config, _with_batch_size(recipe, batch_size), device)
        advice = f"--batch-size {batch_size} fits" if fits else "not even --batch-size 1 fits: choose a smaller model"
        raise ValueError(
            f"the run needs about {in_gb(plan.total - plan.base)} (weights {in_gb(plan.weights)}, activations "
            f"{in_gb(plan.activations)}, transport {in_gb(plan.transport)}), and {in_gb(free)} are free on {device}: "
            f"{advice}, or pass --check-memory false"
        )


def fitting_batch_size(config: OptVQConfig, recipe: Recipe, device: torch.device, num_images: int | None = None) -> int:
    """The recipe's batch size, halved until a run fits the device's memory and has that many images; at least 1."""
    batch_size = recipe.training.batch_size
    while batch_size > 1 and (
        (num_images is not None and batch_size > num_images)
        or not _fits(config, _with_batch_size(recipe, batch_size), device)
    ):
        batch_size //= 2
    return batch_size


def _with_batch_size(recipe: Recipe, batch_size: int) -> Recipe:
    return recipe._replace(training=replace(recipe.training, batch_size=batch_size))


def _fits(config: OptVQConfig, recipe: Recipe, device: torch.device) -> bool:
    plan = plan_memory(config, recipe, device)
    return plan.total - plan.base <= usable_memory(device)


def run_device() -> torch.device:
    """The device of this process."""
    return torch.device(PartialState().device or "cpu")


def usable_memory(device: torch.device) -> int:
    """Bytes that a process may plan with: of a CPU, its share of what the system and the container leave."""
    if device.type == "cuda":
        return int(USABLE * torch.cuda.mem_get_info(device)[0])
    free = min(psutil.virtual_memory().available, _left_in_container())
    return int(USABLE * free) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _left_in_container() -> float:
    """What the limit of a control group leaves; files in the cache can be dropped."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return math.inf if limit == "max" else int(limit) - int(used) + int(statistics["inactive_file"])
    except (OSError, ValueError, KeyError):  # there is no such group, or the system tells in another way
        return math.inf


def in_gb(number: float) -> str:
    return f"{number / 2**30:.2f} GiB"
