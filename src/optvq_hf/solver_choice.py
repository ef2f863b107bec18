"""Who does the N x K work: torch, or Triton's kernels. The one place that decides."""

import functools
import importlib.util
import os
import warnings
from typing import Literal

import torch
import torch.distributed as dist

from .distances import working_dtype


Solver = Literal["auto", "torch", "fused"]
SOLVERS = ("auto", "torch", "fused")


def use_fused(
    solver: Solver, features: torch.Tensor, codebook: torch.Tensor, process_group: "dist.ProcessGroup | None" = None
) -> bool:
    """Whether kernels are to be used, for features (N, d) and codes (K, d) in the working dtype.

    "fused" uses them wherever they can be, "auto" on GPUs on which they pass a check at the first call. What is in float64 is
    always torch's.

    Raises:
        ValueError: For an unknown name, and for "fused" where kernels do not run.
    """
    check_solver(solver)
    device = features.device
    if solver == "torch":
        return False
    if solver == "auto":
        is_float32 = working_dtype(features, codebook) == torch.float32
        return device.type == "cuda" and is_float32 and _is_trusted(device, process_group)
    missing = _what_is_missing(device)
    if missing:
        raise ValueError(f'solver "fused" {missing}; "auto" and "torch" run anywhere')
    return working_dtype(features, codebook) == torch.float32


def check_solver(solver: str) -> None:
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {SOLVERS}, got {solver!r}")


def _what_is_missing(device: torch.device) -> str:
    """Why kernels do not run on a device; empty if they do."""
    if importlib.util.find_spec("triton") is None:
        return "needs triton, which is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if device.type != "cuda":
        return f"needs a GPU, got tensors on {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"needs compute capability 8.0, {torch.cuda.get_device_name(device)} has less"
    return ""


@functools.lru_cache(maxsize=64)
def _is_trusted(device: torch.device, process_group: "dist.ProcessGroup | None" = None) -> bool:
    """Whether kernels pass the check, on the devices of all ranks; one warning if they do not."""
    missing = _what_is_missing(device)
    if not missing:
        try:
            missing = _check(device)
        except Exception as error:  # whatever a compiler or a driver raises
            missing = f"failed its check: {type(error).__name__}: {error}"
        if missing:
            warnings.warn(f'{device}: solver "fused" {missing}. "auto" uses torch.', stacklevel=4)
    is_trusted = torch.tensor(not missing, dtype=torch.int32, device=device)
    if process_group is not None:  # one rank alone would wait for collectives that others do not call
        dist.all_reduce(is_trusted, dist.ReduceOp.MIN, group=process_group)
    return bool(is_trusted)


def _check(device: torch.device) -> str:
    """Solves a few thousand features with kernels and in torch; what differs, or nothing."""
    from .sinkhorn import nearest_assign, sinkhorn_assign

    generator = torch.Generator().manual_seed(0)
    for width in (8, 64):
        features, codebook = (torch.randn(n, width, generator=generator).to(device) for n in (4096, 512))
        ours, theirs = (
            sinkhorn_assign(features, codebook, epsilon=10.0, iterations=5, normalization="zscore", solver=solver)
            for solver in ("fused", "torch")
        )
        if not torch.allclose(ours.potentials, theirs.potentials, rtol=1e-4, atol=1e-3):
            return f"gives other potentials than torch for codes of width {width}"
        if (ours.codes != theirs.codes).float().mean() > 1e-3:
            return f"gives other codes than torch for codes of width {width}"
        if not torch.equal(*(nearest_assign(features, codebook, solver=solver) for solver in ("fused", "torch"))):
            return f"gives other nearest codes than torch for codes of width {width}"
    return ""
