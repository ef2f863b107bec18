"""The running state of a quantizer, which training batches update: averaged potentials, warm start, EMA codebook.

A skipped step must not change it, several batches of one step must count as one, and a forward pass that gradient checkpointing
recomputes must see the same state as the first time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C import _autograd


@dataclass
class _Start:
    """The state that a training batch started from, kept for its recomputation under gradient checkpointing.

    Args:
        codebook: (codebook_size, head_dim).
        potentials: (codebook_size,), of the warm start.
        num_features, mean: Number and (head_dim,) mean of the batch's features, which identify the batch when it is recomputed.
        recalled: Whether it was recomputed.
    """

    codebook: torch.Tensor
    potentials: torch.Tensor
    num_features: int
    mean: torch.Tensor
    recalled: bool = False


class RunningState(nn.Module):
    """Base class of [`~quantizer_optvq.OptVQQuantizer`]: its codes, and the running state of its assignment.

    Args:
        codebook_size, head_dim: Shape of the embedding, whose rows are the codes before any projection.
        warm_start: Whether a training batch starts at the potentials of the previous one.
        learns_by_average: Whether the codes are an EMA codebook: moving averages of the features assigned to them.
        ema_decay: Decay of the EMA codebook per step.
    """

    potentials: torch.Tensor
    cost_scale: torch.Tensor
    num_updates: torch.Tensor
    last_potentials: torch.Tensor
    ema_counts: torch.Tensor
    ema_sums: torch.Tensor

    # Decay of the averaged potentials: a half-life of about 70 steps. The first steps are averaged with equal weights.
    averaging_momentum = 0.99
    # Most batches that may be between their forward pass and its recomputation in the backward pass.
    max_starts = 16

    def __init__(self, codebook_size: int, head_dim: int, warm_start: bool, learns_by_average: bool, ema_decay: float):
        super().__init__()
        self.codebook_size = codebook_size
        self.head_dim = head_dim
        self.warm_start = warm_start
        self.learns_by_average = learns_by_average
        self.ema_decay = ema_decay
        self.defer_updates = False
        # Sums over the batches since the last update, and how many of these batches were assigned by transport.
        self._collected: dict[str, torch.Tensor] = {}
        self._num_solved = 0
        self._starts: list[_Start] = []
        self.embedding = nn.Embedding(codebook_size, head_dim)

        # Averages over training steps, for the "potentials" assignment. Always float32: see _apply.
        self.register_buffer("potentials", torch.zeros(codebook_size, dtype=torch.float32))
        self.register_buffer("cost_scale", torch.ones((), dtype=torch.float32))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        # Potentials of the last training step, for the warm start. Zeros at first, which is a cold start.
        self.register_buffer("last_potentials", torch.zeros(codebook_size, dtype=torch.float32))
        if learns_by_average:  # averages of the number and the sum of the features assigned to each code
            self.register_buffer("ema_counts", torch.zeros(codebook_size, dtype=torch.float32))
            self.register_buffer("ema_sums", torch.zeros(codebook_size, head_dim, dtype=torch.float32))

    def reset_parameters(self) -> None:
        """Resets the running state. Embedding and projection have a `reset_parameters` of their own."""
        nn.init.zeros_(self.potentials)
        nn.init.ones_(self.cost_scale)
        nn.init.zeros_(self.num_updates)
        nn.init.zeros_(self.last_potentials)
        if self.learns_by_average:
            nn.init.zeros_(self.ema_counts)
            nn.init.zeros_(self.ema_sums)

    # ---- updates of the state ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _collect(self, features: torch.Tensor, codes: torch.Tensor, diagnostics: dict[str, torch.Tensor]) -> None:
        """Adds the statistics of a training batch to those of the batches since the last update.

        Args:
            features: (N, head_dim), of this process.
            codes: (N,) int64.
            diagnostics: As in [`~quantizer_optvq.QuantizerOutput`].
        """
        statistics = {}
        if "potentials" in diagnostics:
            self._num_solved += 1
            statistics = {name: diagnostics[name] for name in ("potentials", "scale")}
        if self.learns_by_average:
            sums = torch.zeros_like(self.ema_sums).index_add_(0, codes, features.float())
            group = self._process_group()
            if group is not None:
                dist.all_reduce(sums, group=group)
            counts = diagnostics["code_counts"] if "code_counts" in diagnostics else self._count(codes)
            statistics |= {"counts": counts, "sums": sums}
        for name, value in statistics.items():
            self._collected[name] = self._collected[name] + value if name in self._collected else value

    @torch.no_grad()
    def apply_updates(self, keep: torch.Tensor | None = None) -> None:
        """Updates the running state by all training batches since the last update, as if they were one batch.

        Training batches call it themselves, unless `defer_updates` is set.

        Args:
            keep: 0-dim bool; False drops the batches without an update, for a skipped optimizer step. The host does not wait
                for its value.
        """
        collected, number = self._collected, self._num_solved
        self._collected, self._num_solved = {}, 0
        if number:
            self._update_averages(collected["potentials"] / number, collected["scale"] / number, keep)
        if "sums" in collected:
            self._update_codes(collected["counts"], collected["sums"], keep)

    def _update_averages(self, potentials: torch.Tensor, scale: torch.Tensor, keep: torch.Tensor | None = None) -> None:
        """Updates the averages of potentials (codebook_size,) and scale (0-dim), and the next warm start."""
        keep = torch.ones_like(self.num_updates, dtype=torch.bool) if keep is None else keep
        self.num_updates += keep
        weight = keep * (1 / self.num_updates.clamp_min(1)).clamp_min(1 - self.averaging_momentum)
        # Potentials are defined up to a constant, so they are centred before they are averaged.
        potentials = (potentials - potentials.mean()).to(self.potentials.dtype)
        self.last_potentials.copy_(torch.where(keep, potentials, self.last_potentials))
        self.potentials.lerp_(potentials, weight)
        self.cost_scale.lerp_(scale.float(), weight)

    def _update_codes(self, counts: torch.Tensor, sums: torch.Tensor, keep: torch.Tensor | None = None) -> None:
        """Updates the EMA codebook (van den Oord et al. 2017, eq. 6 to 8); codes that were never used stay.

        Args:
            counts, sums: (codebook_size,) and (codebook_size, head_dim), of the features assigned to each code.
        """
        keep = torch.ones_like(self.num_updates, dtype=torch.bool) if keep is None else keep
        share = keep * torch.full_like(self.cost_scale, 1 - self.ema_decay)
        self.ema_counts.lerp_(counts.float(), share)
        self.ema_sums.lerp_(sums, share)
        # Both averages of an unused code shrink at the same rate, so their ratio, the code, stays until they underflow.
        means = self.ema_sums / self.ema_counts.clamp_min(1e-6)[:, None]
        moves = keep & (self.ema_counts > 1e-6)
        weight = self.embedding.weight
        weight.copy_(torch.where(moves[:, None], means.to(weight.dtype), weight))

    def _count(self, codes: torch.Tensor) -> torch.Tensor:
        """(codebook_size,) int64: how often each code was used, in training by all processes."""
        counts = torch.zeros(self.codebook_size, dtype=torch.int64, device=codes.device)
        counts.scatter_add_(0, codes, torch.ones_like(codes))
        group = self._process_group()
        if group is not None:
            dist.all_reduce(counts, group=group)
        return counts

    def _process_group(self) -> "dist.ProcessGroup | None":
        """All processes in training, where their batches are assigned together; None at inference."""
        distributed = self.training and dist.is_available() and dist.is_initialized()
        return dist.group.WORLD if distributed else None

    # ---- the state that a batch starts from --------------------------------------------------------------------------

    def _meet(self, features: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
        """The codebook of a batch, the potentials that its transport starts from, and whether this is a recomputation.

        Args:
            features: (N, head_dim), which identify a recomputed batch.
            codebook: (codebook_size, head_dim), the current one.
        """
        start = self.last_potentials if self.training and self.warm_start else None
        recomputes = self.training and _in_backward()
        if self.training and not self.defer_updates and (self.learns_by_average or self.warm_start):
            if recomputes:
                codebook, start = self._recall(features, codebook, start)
            elif _may_be_recomputed():
                self._remember(features, codebook)
        return codebook, start, recomputes

    @torch.no_grad()
    def _remember(self, features: torch.Tensor, codebook: torch.Tensor) -> None:
        """Keeps the state that this batch is about to update."""
        codebook = codebook.clone() if self.learns_by_average else codebook[:0]
        start = _Start(codebook, self.last_potentials.clone(), len(features), features.mean(dim=0))
        waiting = [start for start in self._starts if not start.recalled]
        self._starts = [*waiting[1 - self.max_starts :], start]

    @torch.no_grad()
    def _recall(
        self, features: torch.Tensor, codebook: torch.Tensor, potentials: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Codebook and warm start of the first pass over these features; the current ones if it was not kept."""
        starts = [start for start in self._starts if start.num_features == len(features)]
        if not starts:
            return codebook, potentials
        start = starts[0]
        if len(starts) > 1:
            distances = torch.stack([start.mean for start in starts]) - features.mean(dim=0)
            start = starts[int(distances.abs().sum(dim=1).argmin())]
        start.recalled = True
        return start.codebook if self.learns_by_average else codebook, start.potentials if self.warm_start else None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Moves the module; a change of dtype (`.half()`, `.to(torch.bfloat16)`) keeps the running state in float32."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self.get_buffer(name)
            if moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


def _in_backward() -> bool:
    """Whether this forward pass runs inside a backward pass: gradient checkpointing recomputes it.

    Private API of torch 2.14; there is no public one."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _may_be_recomputed() -> bool:
    """Whether gradient checkpointing may wrap this forward pass.

    With `use_reentrant=True` it runs the pass without gradients, otherwise with hooks for saved tensors (whose query is private
    API of torch 2.14).
    """
    if torch.compiler.is_compiling():
        return False
    return not torch.is_grad_enabled() or _autograd._top_saved_tensors_default_hooks(False) is not None
