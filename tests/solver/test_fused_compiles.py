"""Every kernel of the fused solver, compiled for GPUs that need not be there, fits them at its default sizes."""

import importlib.util
from pathlib import Path

import pytest

from grids import slow


pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[2] / "scripts" / "list_fused_kernels.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TARGETS = pytest.mark.parametrize("target", ["sm_90", *map(slow, ("sm_80", "sm_100", "gfx942"))])


@TARGETS
@pytest.mark.parametrize("width", [8, *map(slow, (1, 2, 3, 16, 32, 64, 256))])
@pytest.mark.parametrize("name", ["log_sums", "top_two", "moments"])
def test_registers_and_shared_memory(script, name, width, target):
    check_defaults(script, name, width, target)


@TARGETS
@pytest.mark.parametrize("name", ["merge_log_sums", "merge_top_two"])
def test_kernels_that_merge(script, name, target):
    """They know nothing of widths."""
    check_defaults(script, name, 8, target)


def check_defaults(script, name, width, target):
    blocks = script.default_blocks(
        name, width, script.default_method(width, script.has_units(target)), script.has_large_tiles(target)
    )
    check(script.compile_kernel(name, width, target), script, target, blocks)


@pytest.mark.long
@pytest.mark.parametrize("width", [8, 64])
@pytest.mark.parametrize("name", ["log_sums", "top_two", "moments"])
def test_squared_distances(script, name, width):
    blocks = script.default_blocks(name, width, script.default_method(width, True), True)
    check(script.compile_kernel(name, width, "sm_90", root=False), script, "sm_90", blocks)


def check(usage, script, target, blocks):
    assert usage.spilled == 0 and usage.registers <= 255
    assert usage.shared <= script.LIMITS[target][1]
    assert usage.warps(target, blocks.num_warps) >= 8


@pytest.mark.long
def test_the_table(script):
    assert script.table((8,), ("sm_90",)).count("\n| log_sums | 8 |") == 1
