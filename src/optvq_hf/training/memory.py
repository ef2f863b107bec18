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
from ..distances import BLOCK_ELEMENTS, MIN_BLOCK_ROWS
from ..modeling_optvq import OptVQModel
from ..sinkhorn_rows import MEMORY_BUDGET
from ..solver_choice import Solver, use_fused
from .arguments import CodebookArguments, ObjectiveArguments, Recipe, TrainingArguments
from .codebook import FEATURES_PER_CODE
from .losses.discriminator import PatchDiscriminator
from .losses.objective import make_discriminator


# Share of the free memory that a run may plan with: data, fragments of freed memory and other processes need the rest.
USABLE = 0.9
# What a process on a CPU loads after the plan: dataset, optimizer, code that is imported late.
LOADED_LATER = 32 * 2**20
# Activations under autocast to bf16, compared with float32: some stay float32.
SHARE_IN_BF16 = 0.6


@dataclass
class MemoryPlan:
    """What a run needs in each process, in bytes.

    Attributes:
        num_parameters: Trained parameters of autoencoder and discriminator.
        tokens_per_step: Tokens of a batch of one process; each has `num_codebook_heads` features.
        base: What the process takes already, on a CPU.
        weights: Weights, gradients, moments of AdamW, and the EMA of the weights.
        activations: What the forward pass keeps for the backward pass, the largest pieces that come on top of it, and the
            batches that wait.
        transport: Rows of distances that the solver keeps, if it is torch's, with all blocks of distances.
        codebook_start: Features that the first codes are made from, before the first step; 0 without.
    """

    num_parameters: int
    tokens_per_step: int
    base: int
    weights: int
    activations: int
    transport: int
    codebook_start: int = 0

    @property
    def total(self) -> int:
        """Peak of the process, in bytes."""
        return self.base + self.weights + max(self.activations + self.transport, self.codebook_start)

    def __str__(self) -> str:
        parts = {"weights": self.weights, "activations": self.activations, "transport": self.transport}
        parts |= {"first codes": self.codebook_start} if self.codebook_start else {}
        listed = ", ".join(f"{name} {in_gb(number)}" for name, number in parts.items())
        return (
            f"{self.num_parameters:,} parameters, {self.tokens_per_step:,} tokens per step; memory about "
            f"{in_gb(self.total)} (process {in_gb(self.base)}, {listed})"
        )


def plan_memory(config: OptVQConfig, recipe: Recipe, device: torch.device, of_latents: bool = False) -> MemoryPlan:
    """Plans one process's memory, without making anything of its size.

    Args:
        of_latents: The quantizer is trained alone, on latents.

    Raises:
        ValueError: If images are too small for the discriminator, or sizes too large for any computer.
    """
    try:
        return _plan(config, recipe, device, of_latents)
    except RuntimeError as error:  # torch cannot count so many bytes
        raise ValueError(f"the sizes of the run are too large together: {' '.join(str(error).split())}") from error


def _plan(config: OptVQConfig, recipe: Recipe, device: torch.device, of_latents: bool) -> MemoryPlan:
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
    kept = 0 if of_latents else _of_autoencoder(model, pixels, latents) + _of_discriminator(discriminator, pixels)
    kept += _of_losses(pixels, latents, config.num_quantizers)
    if training.mixed_precision == "bf16":
        kept = int(SHARE_IN_BF16 * kept)
    weights_of_lpips, kept_of_lpips = _of_lpips(objective, pixels)
    num_parameters = sum(p.numel() for net in (model, discriminator) if net is not None for p in net.parameters())
    copies = 4 + (recipe.optimization.ema_decay > 0)
    num_tokens = batch_size * config.tokens_per_image
    num_features = num_tokens * config.num_codebook_heads
    return MemoryPlan(
        num_parameters=num_parameters,
        tokens_per_step=num_tokens,
        base=psutil.Process().memory_info().rss + LOADED_LATER if device.type == "cpu" else 0,
        weights=4 * copies * num_parameters + weights_of_lpips,
        activations=kept + kept_of_lpips + _of_waiting_batches(training, pixels, device),
        transport=_of_transport(num_features, config, training.solver, device) + _of_blocks(config, device),
        codebook_start=_of_codebook_start(recipe.codebook, num_features, config),
    )


def _of_autoencoder(model: OptVQModel, pixels: torch.Tensor, latents: torch.Tensor) -> int:
    kept = _kept_for_backward(lambda: model._decode(latents.detach().requires_grad_()))
    return kept + _kept_for_backward(lambda: model._latents(pixels.detach().requires_grad_(), None, None))


def _of_discriminator(discriminator: PatchDiscriminator | None, pixels: torch.Tensor) -> int:
    """It is called three times: on reconstructions for the autoencoder, on these and images for itself."""
    if discriminator is None:
        return 0
    return 3 * _kept_for_backward(lambda: discriminator(pixels.detach().requires_grad_()))


def _of_losses(pixels: torch.Tensor, latents: torch.Tensor, num_quantizers: int) -> int:
    """Images, reconstructions, differences, signs and squares with their gradients; the same of what every level quantizes."""
    return 8 * pixels.nbytes + 8 * num_quantizers * latents.nbytes


def _of_lpips(objective: ObjectiveArguments, pixels: torch.Tensor) -> tuple[int, int]:
    """Weights of the perceptual network, which are not trained, and what it keeps of reconstructions and images."""
    if objective.perceptual_weight == 0:
        return 0, 0
    from torchmetrics.functional.image.lpips import _LPIPS

    network = (
        _LPIPS(net=objective.perceptual_network, pretrained=False, pnet_rand=True).requires_grad_(False).to("meta")
    )
    images = pixels.expand(-1, 3, -1, -1)
    weights = sum(parameter.nbytes for parameter in network.parameters())
    return weights, _kept_for_backward(lambda: network(images.detach().requires_grad_(), images))


def _of_waiting_batches(training: TrainingArguments, pixels: torch.Tensor, device: torch.device) -> int:
    """All batches of a step are read before the first is used; they wait in the memory of the host."""
    return (training.gradient_accumulation_steps - 1) * pixels.nbytes if device.type == "cpu" else 0


def _of_codebook_start(codebook: CodebookArguments, num_features: int, config: OptVQConfig) -> int:
    """Features of several batches, twice when they are joined, with their permutation, and those that are clustered."""
    if codebook.codebook_start == "normal":
        return 0
    width, number = 4 * config.head_dim, num_features * codebook.codebook_start_batches
    clustered = min(number, FEATURES_PER_CODE * config.codebook_size) if codebook.codebook_start == "kmeans" else 0
    of_rest = clustered * width if config.num_quantizers > 1 else 0
    return number * (2 * width + 16) + 3 * clustered * width + of_rest


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


def _of_transport(num_features: int, config: OptVQConfig, solver: Solver, device: torch.device) -> int:
    """Rows of distances that torch keeps and kernels do not, and the whole plan where code vectors are averaged with it."""
    if config.training_assignment == "nearest":
        return 0
    matrix, one = 4 * num_features * config.codebook_size, torch.empty(1, config.head_dim, device=device)
    rows = 0 if use_fused(solver, one, one) else min(matrix, MEMORY_BUDGET)
    return rows + (matrix if config.training_assignment == "soft" else 0)


def _of_blocks(config: OptVQConfig, device: torch.device) -> int:
    """Blocks of distances: of the solver or the search, and those that cross-entropy computes anew in the backward pass."""
    block = 4 * max(BLOCK_ELEMENTS["cpu" if device.type == "cpu" else "other"], MIN_BLOCK_ROWS * config.codebook_size)
    return (9 if config.codebook_loss_type == "cross_entropy" else 3) * block


def check_memory(
    plan: MemoryPlan,
    config: OptVQConfig,
    recipe: Recipe,
    device: torch.device,
    count_images: Callable[[], int | None] = lambda: None,
    of_latents: bool = False,
) -> None:
    """Raises ValueError, with what would fit, if a run needs more than the device has free.

    Args:
        count_images: Returns the number of training images, if it is known; called only to say what would fit.
    """
    free = usable_memory(device)
    if plan.total - plan.base > free:
        batch_size = fitting_batch_size(config, recipe, device, count_images(), of_latents)
        fits = _fits(config, _with_batch_size(recipe, batch_size), device, of_latents)
        advice = f"--batch-size {batch_size} fits" if fits else "not even --batch-size 1 fits: choose a smaller model"
        raise ValueError(
            f"the run needs about {in_gb(plan.total - plan.base)} (weights {in_gb(plan.weights)}, activations "
            f"{in_gb(plan.activations)}, transport {in_gb(plan.transport)}), and {in_gb(free)} are free on {device}: "
            f"{advice}, or pass --check-memory false"
        )


def fitting_batch_size(
    config: OptVQConfig,
    recipe: Recipe,
    device: torch.device,
    num_images: int | None = None,
    of_latents: bool = False,
) -> int:
    """The recipe's batch size, halved until a run fits the device's memory and has that many images; at least 1."""
    batch_size = recipe.training.batch_size
    while batch_size > 1 and (
        (num_images is not None and batch_size > num_images)
        or not _fits(config, _with_batch_size(recipe, batch_size), device, of_latents)
    ):
        batch_size //= 2
    return batch_size


def _with_batch_size(recipe: Recipe, batch_size: int) -> Recipe:
    return recipe._replace(training=replace(recipe.training, batch_size=batch_size))


def _fits(config: OptVQConfig, recipe: Recipe, device: torch.device, of_latents: bool) -> bool:
    plan = plan_memory(config, recipe, device, of_latents)
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
