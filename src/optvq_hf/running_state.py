"""The running state of a quantizer, which training batches update: averaged potentials, warm start, EMA codebook.

A skipped step must not change it, several batches of one step must count as one, and a forward pass that gradient checkpointing
recomputes must see the same state as the first time.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from .distances import without_autocast


# Private API of torch 2.14, as there is no public one: number of the running backward pass, and hooks for saved tensors.
# A torch without it does not tell whether a pass is recomputed; passes are then treated as without gradient checkpointing.
_backward_pass = getattr(torch._C, "_current_graph_task_id", None)
_saved_tensors_hooks = getattr(getattr(torch._C, "_autograd", None), "_top_saved_tensors_default_hooks", None)


@dataclass
class _Start:
    """The state that a training batch started from, kept for its recomputation under gradient checkpointing.

    Args:
        codebook: (codebook_size, head_dim).
        potentials: (codebook_size,), of the warm start.
        num_features, mean: Number and (head_dim,) mean of the batch's features, which identify the batch when it is recomputed.
        num_recalls: How often it was recomputed.
    """

    codebook: torch.Tensor
    potentials: torch.Tensor
    num_features: int
    mean: torch.Tensor
    num_recalls: int = 0


class Embedding(nn.Embedding):
    """The codes before any projection. Called without input: all of them, (codebook_size, head_dim), at least float32."""

    def forward(self, input: torch.Tensor | None = None) -> torch.Tensor:
        if input is not None:
            return super().forward(input)
        return self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))


class Projection(nn.Linear):
    """A linear map in the dtype of its input, without autocast."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with without_autocast(input):
            return F.linear(input, self.weight.to(input.dtype), self.bias.to(input.dtype))


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
    projection: Projection | nn.Identity
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
        self.synchronize: bool | dist.ProcessGroup = True
        self.defer_updates = False
        self.waits = False  # with updates, for other quantizers of the same batch and codes
        # Sums over the batches since the last update, and how many of these batches were assigned by transport.
        self._collected: dict[str, torch.Tensor] = {}
        self._num_solved = 0
        self._starts: list[_Start] = []
        self.embedding = Embedding(codebook_size, head_dim)

        # Averages over training steps, for the "potentials" assignment. Always float32: see _apply.
        self.register_buffer("potentials", torch.zeros(codebook_size, dtype=torch.float32))
        self.register_buffer("cost_scale", torch.ones((), dtype=torch.float32))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        # Potentials of the last training step, for the warm start. Zeros at first, which is a cold start.
        self.register_buffer("last_potentials", torch.zeros(codebook_size, dtype=torch.float32))
        if learns_by_average:  # averages of the number and the sum of the features assigned to each code
            self.register_buffer("ema_counts", torch.zeros(codebook_size, dtype=torch.float32))
            self.register_buffer("ema_sums", torch.zeros(codebook_size, head_dim, dtype=torch.float32))

    @property
    def code_owner(self) -> "RunningState":
        """Whose codes these are: another quantizer's after [`share_codes_of`]."""
        return self.__dict__.get("_code_owner", self)

    def share_codes_of(self, owner: "RunningState") -> None:
        """Takes another quantizer's embedding, projection and EMA codebook, and keeps potentials of its own."""
        self.__dict__["_code_owner"] = owner  # not a submodule
        self.embedding, self.projection = owner.embedding, owner.projection
        if self.learns_by_average:
            del self.ema_counts, self.ema_sums

    def reset_parameters(self) -> None:
        """Resets the running state, and forgets earlier batches.

        Embedding and projection have a `reset_parameters` of their own.
        """
        nn.init.zeros_(self.potentials)
        nn.init.ones_(self.cost_scale)
        nn.init.zeros_(self.num_updates)
        nn.init.zeros_(self.last_potentials)
        if self.learns_by_average and self.code_owner is self:
            nn.init.zeros_(self.ema_counts)
            nn.init.zeros_(self.ema_sums)
        self.drop_updates()
        self._starts = []

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without what only the backward passes of this module need."""
        return {**self.__dict__, "_starts": []}

    def __deepcopy__(self, memo: dict[int, Any]) -> "RunningState":
        memo[id(self.synchronize)] = self.synchronize  # a process group is not copied
        copied = memo[id(self)] = self.__class__.__new__(self.__class__)
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    # ---- updates of the state ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _collect(self, features: torch.Tensor, codes: torch.Tensor, diagnostics: dict[str, torch.Tensor]) -> None:
        """Updates the running state by a training batch, or keeps its statistics if `defer_updates` is set.

        The replicas of `nn.DataParallel` share the attributes of the module, so these are replaced, never changed in place.

        Args:
            features: (N, head_dim), of this process.
            codes: (N,) int64.
            diagnostics: As in [`~outputs_optvq.QuantizerOutput`].
        """
        statistics = {}
        if "potentials" in diagnostics:
            statistics = {name: diagnostics[name] for name in ("potentials", "scale")}
        if self.learns_by_average:
            sums = features.new_zeros(self.codebook_size, self.head_dim, dtype=torch.float32)
            sums.index_add_(0, codes, features.float())
            group = self._process_group()
            if group is not None:
                dist.all_reduce(sums, group=group)
            counts = diagnostics["code_counts"] if "code_counts" in diagnostics else self._count(codes)
            statistics |= {"counts": counts, "sums": sums}
        num_solved = int("potentials" in statistics)
        if not (self.defer_updates or self.waits):
            self._update(statistics, num_solved)
            return
        self._collected, self._num_solved = _added(self._collected, statistics), self._num_solved + num_solved

    def take_features_of(self, other: "RunningState") -> None:
        """Takes what another quantizer has collected for the codes that they share."""
        moved = {name: value for name, value in other._collected.items() if name in ("counts", "sums")}
        other._collected = {name: value for name, value in other._collected.items() if name not in moved}
        self._collected = _added(self._collected, moved)

    @torch.no_grad()
    def apply_updates(self, keep: torch.Tensor | None = None) -> None:
        """Updates the running state by all training batches since the last update, as if they were one batch.

        It does nothing unless `defer_updates` was set: otherwise, every training batch updates the state at once.

        Args:
            keep: 0-dim bool; False drops the batches without an update, for a skipped optimizer step. The host does not wait
                for its value.
        """
        collected, num_solved = self._collected, self._num_solved
        if collected:
            self.drop_updates()
            self._update(collected, num_solved, keep)

    def drop_updates(self) -> None:
        """Forgets all training batches since the last update, without an update."""
        self._collected, self._num_solved = {}, 0

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Sets `defer_updates` for a step; drops what waits for `apply_updates` at its end, as that of a failed step does."""
        before, self.defer_updates = self.defer_updates, True
        try:
            yield
        finally:
            self.defer_updates = before
            self.drop_updates()

    def _update(self, sums: dict[str, torch.Tensor], num_solved: int, keep: torch.Tensor | None = None) -> None:
        """Updates the running state by sums over batches, `num_solved` of which were assigned by transport."""
        if num_solved:
            self._update_averages(sums["potentials"] / num_solved, sums["scale"] / num_solved, keep)
        if "sums" in sums:
            self.code_owner._update_codes(sums["counts"], sums["sums"], keep)

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
        """The processes whose batches are assigned together: in training those of `synchronize`, none at inference."""
        if not (self.training and self.synchronize and dist.is_available() and dist.is_initialized()):
            return None
        return dist.group.WORLD if self.synchronize is True else self.synchronize

    # ---- the state that a batch starts from --------------------------------------------------------------------------

    def _meet(self, features: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
        """The codebook of a batch, the potentials that its transport starts from, and whether this is a recomputation.

        An EMA codebook is a copy: updates write to the codes themselves, before the backward pass needs those of the batch.

        Args:
            features: (N, head_dim), which identify a recomputed batch.
            codebook: (codebook_size, head_dim), the current one.
        """
        start = self.last_potentials if self.training and self.warm_start else None
        recomputes = self.training and _in_backward()
        if self.training and self.learns_by_average:
            codebook = codebook.clone()
        if self.training and not self.defer_updates and (self.learns_by_average or self.warm_start):
            if recomputes:
                kept = self._recall(features)
                codebook = kept.codebook if self.learns_by_average else codebook
                start = kept.potentials if self.warm_start else None
            elif _may_be_recomputed():
                self._remember(features, codebook)
        return codebook, start, recomputes

    @torch.no_grad()
    def _remember(self, features: torch.Tensor, codebook: torch.Tensor) -> None:
        """Keeps the state that this batch is about to update."""
        codebook = codebook if self.learns_by_average else codebook.new_empty(0)
        start = _Start(codebook, self.last_potentials.clone(), len(features), _mean(features))
        waiting = [start for start in self._starts if start.num_recalls == 0]
        self._starts = [*waiting[1 - self.max_starts :], start]

    @torch.no_grad()
    def _recall(self, features: torch.Tensor) -> _Start:
        """The start of the first pass over these features, which have the same mean up to rounding.

        If several batches had the same features, that is the one that was recomputed least often, and the newest of these:
        the backward pass goes from the last batch to the first, and an older one may have no backward pass at all.

        Raises:
            RuntimeError: If it was not kept.
        """
        starts = [start for start in self._starts if start.num_features == len(features)]
        if starts:
            differences = torch.stack([start.mean for start in starts]) - _mean(features)
            scale = features.norm() / max(features.numel(), 1) ** 0.5
            *distances, scale = torch.cat([differences.abs().amax(dim=1), scale[None]]).tolist()
            # A recomputed feature may be rounded differently. Means of different batches differ by about scale / sqrt(N).
            if min(distances) <= scale * (1e-3 + 1e-2 / max(len(features), 1) ** 0.5):
                same = [start for start, far in zip(starts, distances) if far <= min(distances) + 1e-5 * scale]
                start = min(reversed(same), key=lambda start: start.num_recalls)
                start.num_recalls += 1
                return start
        raise RuntimeError(
            f"a batch of {len(features)} features is computed again in the backward pass, but the state of the quantizer that "
            f"it started from was not kept: that of the last {self.max_starts} batches under gradient checkpointing is, until "
            "a batch follows their backward pass. Call backward after fewer batches, raise `max_starts` of the quantizer, or "
            "set its `defer_updates` and call `apply_updates` after every step"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Moves the module; a change of dtype (`.half()`, `.to(torch.bfloat16)`) keeps the running state in float32."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self.get_buffer(name)
            if moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


def _added(sums: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sums by name, of both, as a new dictionary."""
    return {**sums, **{name: sums[name] + value if name in sums else value for name, value in others.items()}}


def _mean(features: torch.Tensor) -> torch.Tensor:
    """(head_dim,) mean of features (N, head_dim); 0 if there are none."""
    return features.sum(dim=0) / max(len(features), 1)


def _in_backward() -> bool:
    """Whether this forward pass runs inside a backward pass: gradient checkpointing recomputes it."""
    if torch.compiler.is_compiling() or _backward_pass is None or _saved_tensors_hooks is None:
        return False
    return _backward_pass() != -1


def _may_be_recomputed() -> bool:
    """Whether gradient checkpointing may wrap this forward pass.

    With `use_reentrant=True` it runs the pass without gradients, otherwise with hooks for saved tensors.
    """
    if torch.compiler.is_compiling() or _backward_pass is None or _saved_tensors_hooks is None:
        return False
    return not torch.is_grad_enabled() or _saved_tensors_hooks(False) is not None
