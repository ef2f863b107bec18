"""How the fused solver computes distances, and sizes of its tiles: what depends on the width of the codes and on the device."""

import functools
import math
import os
from typing import Literal, NamedTuple

import torch


# How tiles of distances are computed, see `sinkhorn_kernels.py`: in registers, or by tl.dot in this precision.
Method = Literal["direct", "fma", "ieee", "tf32x3", "bf16x6"]
IN_REGISTERS: tuple[Method, ...] = ("direct", "fma")


class Blocks(NamedTuple):
    """Sizes of a kernel's tiles, see `sinkhorn_kernels.py`."""

    outer: int
    inner: int
    depth: int = 1
    num_warps: int = 4
    num_stages: int = 2


def default_method(width: int) -> Method:
    return "direct" if width <= 16 else "ieee"


def choose_blocks(kernel: str, width: int, method: Method, device: torch.device) -> Blocks:
    """For the kernel "log_sums", "top_two" or "moments", and codes of this width.

    With OPTVQ_AUTOTUNE=1 in the environment, the fastest on this device of `CANDIDATES`, found at the first call.
    """
    if device.type == "cpu":  # the interpreter: few operations, and few splits
        stored = stored_width(width, method)
        return Blocks(512, 256, stored & -stored, num_warps=8192)
    if os.environ.get("OPTVQ_AUTOTUNE") == "1":
        return _fastest_blocks(kernel, width, method, device)
    return default_blocks(kernel, width, method)


def default_blocks(kernel: str, width: int, method: Method) -> Blocks:
    if method in IN_REGISTERS:
        return Blocks(512 if width <= 8 else 256, 4 if kernel == "top_two" else 8)
    return Blocks(64, 32 if kernel == "top_two" else 64, 16)


def stored_width(width: int, method: Method) -> int:
    """With padding, to what tl.dot multiplies at a time."""
    if method in IN_REGISTERS:
        return width
    return next((size for size in (16, 32) if width <= size), -(-width // 64) * 64)


def squared_error(width: int, method: Method) -> float:
    """How far squared distances from products may be off, in units of u (||z||^2 + ||c||^2) with u half of float32's epsilon.

    "fma" and "ieee" round as the products of torch do (see [`~distances.Distances.squared_error`]), and the sum once more.
    "tf32x3" keeps two parts of 11 bits of every factor and drops the product of the lower ones; "bf16x6" three parts of 8
    bits, and what it drops is below u. Matrix units do not round their sums but cut them off, so that errors add up.
    """
    return {"fma": 8 + math.sqrt(width), "ieee": 8 + math.sqrt(width), "tf32x3": 48 + width, "bf16x6": 16 + width}[
        method
    ]


# ---- autotuning ------------------------------------------------------------------------------------------------------

_UNITS = [
    *(Blocks(outer, inner, 32) for outer, inner in ((64, 32), (64, 64), (64, 128))),
    *(Blocks(outer, inner, 32, 8) for outer, inner in ((128, 32), (128, 64), (128, 128))),
    *(Blocks(64, 64, 64), Blocks(128, 64, 64, 8), Blocks(128, 64, 32, 8, 3)),
]
_IN_REGISTERS = [
    *(Blocks(128, inner, num_warps=1) for inner in (8, 16)),
    *(Blocks(256, inner, num_warps=2) for inner in (4, 8)),
    *(Blocks(256, inner, num_warps=4) for inner in (8, 16, 32)),
    *(Blocks(512, inner, num_warps=4) for inner in (4, 8, 16)),
]
# Sizes to choose from. `depth` is at most the width.
CANDIDATES: dict[Method, list[Blocks]] = {
    "direct": _IN_REGISTERS,
    "fma": _IN_REGISTERS,
    "ieee": [Blocks(64, 64, 16), Blocks(64, 32, 16), Blocks(64, 32, 32), Blocks(64, 64, 16, 8), Blocks(128, 64, 16, 8)],
    "tf32x3": _UNITS,
    "bf16x6": _UNITS,
}


def candidates(width: int, method: Method) -> list[Blocks]:
    stored = stored_width(width, method)
    depths = (blocks._replace(depth=min(blocks.depth, stored)) for blocks in CANDIDATES[method])
    return list(dict.fromkeys(depths))


@functools.lru_cache(maxsize=256)
def _fastest_blocks(kernel: str, width: int, method: Method, device: torch.device) -> Blocks:
    """By the time for 16,384 x 8,192 distances; the default if no size runs."""
    from .sinkhorn_fused import Tiles

    features, codebook = torch.rand(16384, width, device=device), torch.rand(8192, width, device=device)
    number = torch.ones((), device=device)
    times: dict[Blocks, float] = {}
    for blocks in candidates(width, method):
        tiles = Tiles(features, codebook, {kernel: blocks}, method)
        try:
            for _ in range(3):  # the first one compiles
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record(torch.cuda.current_stream(device))
                if kernel == "log_sums":
                    tiles.log2_sums(tiles.features, tiles.codes, tiles.codes.weights(0.0), number)
                elif kernel == "top_two":
                    tiles.top_two(tiles.codes.weights(0.0), number)
                else:
                    tiles.moments(number)
                end.record(torch.cuda.current_stream(device))
                end.synchronize()
                times[blocks] = min(times.get(blocks, math.inf), start.elapsed_time(end))
        except Exception:  # a size that the device does not hold
            times.pop(blocks, None)
    return min(times, key=times.__getitem__, default=default_blocks(kernel, width, method))
