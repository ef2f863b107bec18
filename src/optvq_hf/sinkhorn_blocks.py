"""How the fused solver computes distances, and sizes of its tiles: what depends on the width of the codes and on the device."""

import functools
import math
import os
from typing import Literal, NamedTuple

import torch


# How tiles of distances are computed, see `sinkhorn_kernels.py`: from differences, or by tl.dot in this precision.
Method = Literal["direct", "ieee", "bf16x6"]
DIRECT_WIDTH = 8  # up to which differences are as fast as products


class Blocks(NamedTuple):
    """Sizes of a kernel's tiles, see `sinkhorn_kernels.py`."""

    outer: int
    inner: int
    depth: int = 1
    num_warps: int = 4
    num_stages: int = 2


def default_method(width: int, has_units: bool) -> Method:
    """For codes of this width, on devices with or without [`matrix_units`].

    On an H200, "tf32x3" was a tenth faster than "bf16x6", with errors up to three times as large; products in float32 without
    matrix units a sixth faster than differences, which do not cancel. Neither is worth another method.
    """
    if width <= (DIRECT_WIDTH if has_units else 2 * DIRECT_WIDTH):
        return "direct"
    return "bf16x6" if has_units else "ieee"


def matrix_units(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16 faster than in float32, and Triton knows how to put float32 together from it."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def choose_blocks(kernel: str, width: int, method: Method, device: torch.device) -> Blocks:
    """For the kernel "log_sums", "top_two" or "moments", and codes of this width.

    With OPTVQ_AUTOTUNE=1 in the environment, the fastest on this device of `CANDIDATES`, found at the first call.
    """
    if device.type == "cpu":  # the interpreter: few operations, and few splits
        stored = stored_width(width, method)
        return Blocks(512, 256, stored & -stored, num_warps=8192)
    if os.environ.get("OPTVQ_AUTOTUNE") == "1":
        return _fastest_blocks(kernel, width, method, device)
    return default_blocks(kernel, width, method, has_large_tiles(device))


def has_large_tiles(device: torch.device) -> bool:
    """Whether a multiprocessor holds large tiles of products without spilling registers: NVIDIA's from Hopper on."""
    return matrix_units(device) and torch.cuda.get_device_capability(device) >= (9, 0)


def default_blocks(kernel: str, width: int, method: Method, large_tiles: bool) -> Blocks:
    is_search = kernel == "top_two"
    if method == "direct":
        if is_search:
            return Blocks(256, 4, num_warps=2)
        return Blocks(512, 16, num_warps=4) if width <= DIRECT_WIDTH else Blocks(256, 8, num_warps=4)
    if method == "ieee":
        return Blocks(64, 32 if is_search else 64, 16)
    if width <= 16 and large_tiles:
        return Blocks(64, 64, 16) if is_search else Blocks(64, 128, 16, num_stages=3)
    if large_tiles and not (is_search and width > 64):
        return Blocks(128, 64, min(64, stored_width(width, method)), num_warps=8)
    return Blocks(64, 64, 16, num_stages=3)


def stored_width(width: int, method: Method) -> int:
    """With padding, to what tl.dot multiplies at a time."""
    if method == "direct":
        return width
    return next((size for size in (16, 32) if width <= size), -(-width // 64) * 64)


def squared_error(width: int, method: Method) -> float:
    """How far squared distances from products may be off, in units of u (||z||^2 + ||c||^2) with u half of float32's epsilon.

    The largest errors met on an H200 for widths up to 768 were 5 for "ieee" and 4 for "bf16x6". Here is what none can exceed,
    or, of sums in float32, what is most unlikely.

    "ieee" rounds as the products of torch do (see [`~distances.Distances.squared_error`]), and the sum once more. "bf16x6"
    keeps three parts of 8 bits of every factor, and what it drops is below u; matrix units do not round their sums but cut
    them off, so that errors add up.
    """
    return 16 + width if method == "bf16x6" else 8 + math.sqrt(width)


# ---- autotuning ------------------------------------------------------------------------------------------------------

_IN_REGISTERS = [
    *(Blocks(512, inner, num_warps=4) for inner in (16, 4, 8)),
    *(Blocks(256, inner, num_warps=2) for inner in (16, 4, 8)),
]
_UNITS = [
    *(Blocks(64, 128, 16, 4, 3), Blocks(128, 64, 16, 4, 3), Blocks(64, 64, 16, 4, 3), Blocks(64, 64, 64, 4)),
    *(Blocks(128, 128, 32, 8, 3), Blocks(64, 128, 32, 4, 3), Blocks(128, 64, 64, 8), Blocks(64, 64, 32, 4, 3)),
]
# Sizes to choose from, the most promising ones first. `depth` is at most the width.
CANDIDATES: dict[Method, list[Blocks]] = {
    "direct": _IN_REGISTERS,
    "ieee": [Blocks(64, 64, 16), Blocks(64, 32, 16)],
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
                    tiles.balancing_weights(tiles.features, tiles.codes, tiles.codes.zeros, number)
                elif kernel == "top_two":
                    tiles.top_two(tiles.codes.zeros, number)
                else:
                    tiles.moments(number)
                end.record(torch.cuda.current_stream(device))
                end.synchronize()
                times[blocks] = min(times.get(blocks, math.inf), start.elapsed_time(end))
        except Exception:  # a size that the device does not hold
            times.pop(blocks, None)
    return min(times, key=times.__getitem__, default=default_blocks(kernel, width, method, has_large_tiles(device)))
