"""The kernel of the transport, exp(-s D), scaled such that floating point can hold it, in blocks of rows.

Sinkhorn-Knopp looks for row and column factors of exp(-s D). At large s that matrix is zero to float32, so it is kept as

    E_nk = exp(-s (D_nk - reference_k - offset_n)),      offset_n = min_k(D_nk - reference_k)

with a reference distance per code, chosen such that the largest entry of every column is 1 as well: the distance to its
nearest feature, at first. Factors of rows and columns that stay within e^40 of each other can be multiplied on. Entries below
2^-115 are raised to it: they are beyond the precision of every sum they enter, and smaller ones would be denormal numbers,
on which many processors are slow. Exponents are kept in base 2, whose power is several times as fast as that of e on CPUs.

This is the absorption of Schmitzer (2019), "Stabilized Sparse Scaling Algorithms for Entropy Regularized Transport
Problems", section 3.1, with the first reference taken from the distances themselves.
"""

import math
from collections.abc import Iterator
from typing import Protocol

import torch
import torch.distributed as dist

from .distances import row_blocks, top_two
from .workspace import Workspace


# Default for an N x K matrix: 32,768 features x 16,384 codes in float32.
MEMORY_BUDGET = 2 * 1024**3
SMALLEST_EXPONENT = -115.0


class DistanceSource(Protocol):
    """Where the distances come from: [`~distances.Distances`], or [`GivenCost`]."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    def of_rows(self, rows: slice | torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor: ...

    def of_codes(self, codes: slice | torch.Tensor) -> "DistanceSource": ...


class GivenCost:
    """Distances that are there already: a cost matrix (N, K)."""

    def __init__(self, cost: torch.Tensor):
        self._cost = cost
        self.shape, self.dtype, self.device = tuple(cost.shape), cost.dtype, cost.device

    def of_rows(self, rows, out=None):
        return self._cost[rows].clone() if out is None else out.copy_(self._cost[rows])

    def of_codes(self, codes):
        return GivenCost(self._cost[:, codes])


class Kernel:
    """Row blocks of D and, after `rescale`, of E.

    As many blocks as fit the memory budget are held; they hold D first and E later, so D has to be computed again after a
    look at E. The others are computed anew in every pass.

    Args:
        source: The distances.
        memory_budget: Bytes that the blocks kept may take; 2 GiB by default.
        process_group: The matrix consists of the rows of all ranks of this group; each works on its own.

    Attributes:
        num_rows: 0-dim, N of all ranks together.
        scale, reference: s (0-dim) and the reference distances (K,), as set by `rescale`.
        offsets: (rows of this rank,), offset_n above; complete after the first pass over E.
    """

    def __init__(
        self,
        source: DistanceSource,
        memory_budget: int | None = None,
        process_group: "dist.ProcessGroup | None" = None,
    ):
        num_rows, num_codes = source.shape
        budget = MEMORY_BUDGET if memory_budget is None else memory_budget
        self.source, self.dtype, self.device = source, source.dtype, source.device
        self.offsets = torch.empty(num_rows, dtype=source.dtype, device=source.device)
        self._blocks = list(row_blocks(num_rows, num_codes, source.device))
        row_bytes = num_codes * source.dtype.itemsize
        self._held_rows = max((rows.stop for rows in self._blocks if rows.stop * row_bytes <= budget), default=0)
        is_complete = self._held_rows == num_rows
        num_workspace_rows = self._held_rows if is_complete else self._held_rows + self._blocks[0].stop
        self._workspace = Workspace((num_workspace_rows, num_codes), self.dtype, self.device)
        self._scratch = None
        self._held = {}  # first row -> block
        self._content = None  # of the blocks held
        self._has_offsets = False
        self._process_group = process_group
        self.num_rows = self.total(self.offsets.new_tensor(num_rows))

    def distances(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Blocks of D, not to be written to."""
        for rows in self._blocks:
            yield rows, self._hold(rows, self._distances_of(rows))
        self._content = "distances"

    def rescale(self, scale: torch.Tensor, reference: torch.Tensor):
        """Sets s (0-dim) and the reference distances (K,)."""
        if self._content == "kernel":
            self._content = None
        self._has_offsets = False
        self.scale, self.reference = scale, reference

    def move_reference(self, scale: torch.Tensor, potentials: torch.Tensor) -> torch.Tensor:
        """Makes the largest entry of every column of E 1 at the potentials g, which are the better part of every row then.

        That is the case for the reference min_n(D_nk + f_n / s), where f_n = logsumexp_k(S_nk + g_k). Returns log v.
        """
        reference = torch.full_like(potentials, math.inf)
        for _, block in self.distances():
            scratch = torch.sub(block, potentials / scale, out=self.scratch(block))
            offsets = scratch.amin(dim=1)
            row_potentials = exponentiate_(scratch, scale, offsets).sum(dim=1).log_() / scale - offsets
            scratch = torch.add(block, row_potentials[:, None], out=scratch)
            reference = torch.minimum(reference, scratch.amin(dim=0))
        reference = self.minimum(reference).nan_to_num(posinf=0.0)  # no features at all
        self.rescale(scale, reference)
        return potentials - scale * reference

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Blocks of E, not to be written to."""
        for rows in self._blocks:
            if self._content == "kernel" and rows.start in self._held:
                yield rows, self._held[rows.start]
                continue
            block = self._distances_of(rows).sub_(self.reference)
            if not self._has_offsets:
                self.offsets[rows] = block.amin(dim=1)
            yield rows, self._hold(rows, exponentiate_(block, self.scale, self.offsets[rows]))
        self._content, self._has_offsets = "kernel", True

    def log_column_sums(self, log_v: torch.Tensor | None) -> torch.Tensor:
        """log sum_n u_n E_nk over the rows of all ranks, (K,), with u_n = 1 / sum_k E_nk v_k.

        Without v, the sum over all rows of exp(S_nk), times N: u_n undoes the scaling of the row.
        """
        total, shift = torch.zeros_like(self.reference), 0
        if log_v is not None:  # a constant in v may be of any size
            shift = log_v.amax()
            v = (log_v - shift).exp()
        for rows, block in self:
            if log_v is None:
                u = (-self.scale * self.offsets[rows]).exp_() * self.num_rows
            else:  # torch.mv would run on one thread, and wait for memory; below it finds the block in the cache
                u = torch.mul(block, v, out=self.scratch(block)).sum(dim=1).reciprocal_()
            total += column_sums(block, u)
        return self.total(total).clamp_min_(torch.finfo(total.dtype).tiny).log_() - shift

    def most_likely_codes(self, log_v: torch.Tensor) -> torch.Tensor:
        """argmax_k E_nk v_k. Entries that differ by rounding alone are a tie, and ties go to the nearest code.

        With fewer features than codes one row often gives equal mass to many codes; a bare argmax would let rounding decide.
        While torch.compile or torch.export traces, it does.
        """
        rounding = (16 * torch.finfo(log_v.dtype).eps * (1 + (self.scale * self.reference).abs())).clamp_max_(5e-4)
        factors, discounts = (log_v - log_v.amax() + rounding).exp(), (-rounding).exp()
        codes = torch.empty(self.offsets.shape, dtype=torch.int64, device=self.device)
        for rows, block in self:
            plan = torch.mul(block, factors, out=self.scratch(block))
            best, codes[rows], runner_up = top_two(plan)
            if torch.compiler.is_compiling():
                continue
            ties = (runner_up >= best * discounts[codes[rows]]).nonzero().squeeze(1)
            if len(ties):
                codes[rows][ties] = self._nearest_of_best(rows.start + ties, plan[ties], discounts)
        return codes

    def _nearest_of_best(self, rows: torch.Tensor, plan: torch.Tensor, discounts: torch.Tensor) -> torch.Tensor:
        """The nearest of the codes that may be best, for these rows and their part of `most_likely_codes`' plan."""
        is_best = plan >= (plan * discounts).amax(dim=1, keepdim=True)
        candidates = is_best.any(dim=0).nonzero().squeeze(1)
        distances = self.source.of_codes(candidates).of_rows(rows).masked_fill_(~is_best[:, candidates], math.inf)
        # Equal codes may have distances that differ by rounding: the first of the nearest.
        nearest = distances.amin(dim=1, keepdim=True) * (1 + 256 * torch.finfo(distances.dtype).eps)
        return candidates[(distances <= nearest).to(torch.uint8).argmax(dim=1)]

    def scratch(self, block: torch.Tensor) -> torch.Tensor | None:
        """Memory of the size of a block, for the caller's own use until the next block."""
        if torch.compiler.is_compiling():
            return None
        if self._scratch is None:
            self._scratch = torch.empty_like(block)
        return self._scratch[: len(block)]

    def release(self):
        """Leaves the memory to the next kernel. This one is of no use any more."""
        self._workspace.release()

    def total(self, of_this_rank: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place."""
        return self._all_reduce(of_this_rank, "SUM")

    def minimum(self, of_this_rank: torch.Tensor) -> torch.Tensor:
        """Entrywise minimum over all ranks, in place."""
        return self._all_reduce(of_this_rank, "MIN")

    def _all_reduce(self, tensor, operation):
        if self._process_group is not None:
            dist.all_reduce(tensor, getattr(dist.ReduceOp, operation), group=self._process_group)
        return tensor

    def _hold(self, rows: slice, block: torch.Tensor) -> torch.Tensor:
        if rows.stop <= self._held_rows:
            self._held[rows.start] = block
        return block

    def _distances_of(self, rows: slice) -> torch.Tensor:
        if self._content == "distances" and rows.start in self._held:
            return self._held[rows.start]
        # torch.compile plans memory itself, and would copy the whole matrix for every block written to it.
        if torch.compiler.is_compiling():
            return self.source.of_rows(rows)
        start = min(rows.start, self._held_rows)
        return self.source.of_rows(rows, out=self._workspace.matrix[start : start + rows.stop - rows.start])


LOG2_E = math.log2(math.e)


def exponentiate_(distances: torch.Tensor, scale: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Replaces (B, K) distances by exp(-s (D_nk - offset_n)), for offsets (B,) of the rows and a 0-dim s."""
    return distances.sub_(offsets[:, None]).mul_(-scale * LOG2_E).clamp_min_(SMALLEST_EXPONENT).exp2_()


def column_sums(block: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sum_n weights_n block_nk, (K,).

    torch.mv of a wide matrix runs on one thread; two products of half the rows each run on two.
    """
    half = len(block) // 2
    halves = torch.bmm(weights[: 2 * half].view(2, 1, half), block[: 2 * half].view(2, half, block.shape[1])).sum(
        dim=(0, 1)
    )
    return torch.add(halves, weights[-1] * block[-1]) if len(block) % 2 else halves
