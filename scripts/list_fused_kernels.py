"""Compiles every kernel of the fused solver for some GPUs, none of which need be there, and lists what each needs.

    python scripts/list_fused_kernels.py [--widths 1 8 16 64] [--targets sm_90]

A Markdown table: registers per thread, spilled bytes, shared memory per program, and the warps that fit one multiprocessor.
"""

import argparse
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from optvq_hf import sinkhorn_kernels as kernels
from optvq_hf.sinkhorn_blocks import Blocks, Method, default_blocks, default_method, stored_width


TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Of one multiprocessor: 32-bit registers, bytes of shared memory for programs, warps.
LIMITS = {
    "sm_80": (65536, 164 * 1024, 64),
    "sm_90": (65536, 228 * 1024, 64),
    "sm_100": (65536, 228 * 1024, 64),
    "gfx942": (131072, 64 * 1024, 32),
}
WIDTHS = (1, 2, 3, 8, 16, 32, 64, 256)
TYPES = {"index": "*i32", "merged_index": "*i64"}  # of pointers; the others are to float32
KERNELS = ("log_sums", "top_two", "moments", "merge_log_sums", "merge_top_two")


class Usage(NamedTuple):
    """Of one compiled kernel: registers per thread, spilled bytes per thread, bytes of shared memory per program."""

    registers: int
    spilled: int
    shared: int

    def warps(self, target: str, num_warps: int) -> int:
        """How many warps one multiprocessor holds."""
        registers, shared, warps = LIMITS[target]
        size = TARGETS[target].warp_size
        per_warp = -(-max(self.registers, 1) * size // 256) * 256  # as the hardware allocates them
        programs = min(registers // (per_warp * num_warps), warps // num_warps)
        if self.shared:
            programs = min(programs, shared // (self.shared + 1024))
        return programs * num_warps


def has_units(target: str) -> bool:
    return target.startswith("sm_")


def has_large_tiles(target: str) -> bool:
    return has_units(target) and int(target.removeprefix("sm_")) >= 90


def compile_kernel(
    name: str,
    width: int,
    target: str,
    blocks: Blocks | None = None,
    method: Method | None = None,
    root: bool = True,
) -> Usage:
    """Of a kernel at its default blocks, for codes of this width; of distances (`root`) or their squares."""
    method = method or default_method(width, has_units(target))
    blocks = blocks or default_blocks(name, width, method, has_large_tiles(target))
    kernel = getattr(kernels, f"{name}_kernel")
    is_merge = name.startswith("merge")
    constants: dict[str, Any] = {"BLOCK": 128} | ({"NEGATED": True} if name == "merge_log_sums" else {})
    if not is_merge:
        constants = {
            "DIM": stored_width(width, method),
            "OUTER": blocks.outer,
            "INNER": blocks.inner,
            "DEPTH": blocks.depth,
        }
        constants |= {"METHOD": method, "ROOT": root}
    integers = {"outer_stride", "inner_stride", "num_inner", "split_size", "num_points", "num_splits"}
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        else:
            signature[argument] = "i32" if argument in integers else TYPES.get(argument, "*fp32")
    unaligned = {"num_inner", "num_points", "num_splits"}
    aligned = [i for i, a in enumerate(kernel.arg_names) if signature[a] != "constexpr" and a not in unaligned]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": 4 if is_merge else blocks.num_warps, "num_stages": blocks.num_stages}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    if target.startswith("gfx"):
        assembly = compiled.asm["amdgcn"]
        found = [int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1]) for key in ("vgpr_count", "vgpr_spill_count")]
        return Usage(found[0], 4 * found[1], compiled.metadata.shared)
    return Usage(*usage_of_cubin(compiled.asm["cubin"]), compiled.metadata.shared)


def usage_of_cubin(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory per thread, as cuobjdump, which comes with Triton, reads them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def table(widths: tuple[int, ...] = WIDTHS, targets: tuple[str, ...] = tuple(TARGETS)) -> str:
    lines = [
        "| kernel | width | outer x inner x depth, warps | target | registers | spilled | shared memory | warps per SM |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in KERNELS:
        for width in widths[:1] if name.startswith("merge") else widths:
            for target in targets:
                method = default_method(width, has_units(target))
                blocks = default_blocks(name, width, method, has_large_tiles(target))
                size = f"{method} {blocks.outer} x {blocks.inner} x {blocks.depth}, {blocks.num_warps}"
                size = "128, 4" if name.startswith("merge") else size
                usage = compile_kernel(name, width, target)
                warps = usage.warps(target, blocks.num_warps)
                cells = (name, width, size, target, usage.registers, usage.spilled, usage.shared, warps)
                lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--targets", nargs="+", default=tuple(TARGETS), choices=TARGETS)
    arguments = parser.parse_args()
    print(f"triton {triton.__version__}, torch {torch.__version__}\n")
    print(table(tuple(arguments.widths), tuple(arguments.targets)))
