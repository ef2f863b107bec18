"""AdamW, the one-cycle schedule of the paper, the optimizer step of one network, and the EMA of the weights."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel

from .arguments import OptimizationArguments
from .processes import mean_over_processes


DECAYED_LAYERS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


def make_optimizer(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    beta2: float = 0.99,
    codebook: Sequence[nn.Parameter] = (),
    codebook_multiplier: float = 1.0,
) -> torch.optim.AdamW:
    """AdamW with weight decay on weights of linear and convolution layers only, not on biases, norms or the codebook.

    Args:
        codebook: Parameters whose learning rate is `codebook_multiplier` times that of the others.
    """
    decayed = {
        id(layer.weight)
        for layer in model.modules()
        if isinstance(layer, DECAYED_LAYERS) and layer.weight.requires_grad
    }
    faster = {id(parameter) for parameter in codebook} if codebook_multiplier != 1 else set()
    groups = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) in faster, id(parameter) not in decayed), []).append(parameter)
    settings = [
        {
            "params": parameters,
            "lr": learning_rate * (codebook_multiplier if of_codebook else 1),
            "weight_decay": 0.0 if undecayed else weight_decay,
        }
        for (of_codebook, undecayed), parameters in sorted(groups.items())
    ]
    settings = settings or [{"params": []}]  # an EMA codebook learns alone
    return torch.optim.AdamW(settings, lr=learning_rate, betas=(0.9, beta2), fused=True)


def make_schedule(optimizer: torch.optim.Optimizer, total_steps: int, warmup_ratio: float, step: int = 0) -> OneCycleLR:
    """One cosine cycle: warm-up to each group's learning rate, then decay to nearly 0.

    Adam's first beta moves in the opposite direction, from 0.95 to 0.85 and back: torch's default, as in the original.

    OneCycleLR of torch 2.14 divides by the warm-up's steps minus one. So a warm-up has at least two steps, and a run of less
    than four steps uses the first steps of a cycle of four.

    Args:
        step: Start after so many steps of the cycle, with an optimizer that has followed another one.
    """
    total_steps = max(total_steps, 4)
    warmup = max(warmup_ratio, 2 / total_steps)
    peaks = [group.get("max_lr", group["lr"]) for group in optimizer.param_groups]
    return OneCycleLR(optimizer, peaks, total_steps, pct_start=warmup, last_epoch=step - 1)


class Learner:
    """Optimizer and learning rate schedule of one network.

    Args:
        device: Of a network without parameters to train.

    Attributes:
        skipped: 0-dim float32, steps skipped so far because a gradient was not finite.
        overflow: 0-dim float32, 1 if the last step was skipped.
        skipped_in_a_row: 0-dim float32, steps skipped in a row up to the last step.
        longest_skip: 0-dim float32, the most steps that were skipped in a row so far.
        last_rate: Learning rate of the last step.
    """

    def __init__(
        self,
        optimizer: torch.optim.AdamW,
        arguments: OptimizationArguments,
        total_steps: int,
        device: torch.device | None = None,
    ):
        self.optimizer, self.arguments = optimizer, arguments
        self.schedule = make_schedule(optimizer, total_steps, arguments.warmup_ratio)
        self.max_grad_norm = arguments.max_grad_norm
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.skipped = torch.zeros((), device=self.parameters[0].device if self.parameters else device)
        self.overflow = torch.zeros_like(self.skipped)
        self.skipped_in_a_row = torch.zeros_like(self.skipped)
        self.longest_skip = torch.zeros_like(self.skipped)
        self.last_rate = self.optimizer.param_groups[0]["lr"]

    def step(self, is_finite: torch.Tensor | None = None) -> torch.Tensor:
        """Clips gradients, steps the optimizer, and clears the gradients; returns their 0-dim norm before clipping.

        A step whose gradient is not finite is skipped. The device decides that (fused AdamW treats it as the overflow of a
        gradient scaler), so the host does not wait.

        Args:
            is_finite: 0-dim bool, decides for a network without parameters to train.
        """
        if self.parameters:
            norm = nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        else:
            norm = torch.zeros_like(self.skipped)
            norm = norm if is_finite is None else torch.where(is_finite, norm, torch.nan)
            norm = mean_over_processes(norm)  # as gradients are: all processes skip a step, or none
        self.overflow = (~norm.isfinite()).to(self.skipped.dtype)
        setattr(self.optimizer, "found_inf", self.overflow)  # noqa: B010, torch 2.14 does not annotate it
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.last_rate = self.optimizer.param_groups[0]["lr"]
        self.schedule.step()
        self.skipped += self.overflow
        self.skipped_in_a_row.add_(1).mul_(self.overflow)
        torch.maximum(self.longest_skip, self.skipped_in_a_row, out=self.longest_skip)
        return norm

    def change_length(self, total_steps: int) -> None:
        """Continues, from the current step on, with the schedule of a run of this many steps.

        The rates are those of that schedule at this step: a function of its share of the whole.
        """
        self.schedule = make_schedule(
            self.optimizer, total_steps, self.arguments.warmup_ratio, self.schedule.last_epoch
        )

    def scale_rate(self, factor: float) -> None:
        """Multiplies the learning rate, now and for the rest of the schedule."""
        for group in self.optimizer.param_groups:
            for name in ("lr", "initial_lr", "max_lr", "min_lr"):
                group[name] *= factor


class AveragedWeights(AveragedModel):
    """EMA of the weights of a model, in evaluation mode; buffers are copied from the model.

    The decay rises with the number of steps n as min((1 + n) / (10 + n), decay), so that the first weights are forgotten.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model)
        self.decay = decay
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, keep: torch.Tensor) -> None:
        """Updates the EMA; with `keep` (0-dim bool) False it does not change, as the step was skipped.

        In place of `update_parameters`, which copies the number of steps from the host to the device at every step.
        """
        number = self.n_averaged  # on the CPU
        averaged: list[torch.Tensor] = [*self.module.parameters()]
        current: list[torch.Tensor] = [*model.parameters()]
        if number == 0:
            torch._foreach_copy_(averaged, current)
        else:
            weight = 1 - torch.clamp((1 + number) / (10 + number), max=self.decay)
            difference = torch._foreach_sub(current, averaged)
            torch._foreach_mul_(difference, keep * weight.item())
            torch._foreach_add_(averaged, difference)
        for mean, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            mean.copy_(buffer)
        number += 1
