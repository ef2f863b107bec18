"""The fused solver as a kernel of the `kernels` library, without this package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[2] / "scripts" / "make_kernel.py"
LOAD = """
import sys
from pathlib import Path
import torch
from kernels import get_local_kernel
kernel = get_local_kernel(Path(sys.argv[1]))
generator = torch.Generator().manual_seed(0)
features, codebook = (torch.randn(n, 4, generator=generator) for n in (100, 20))
settings = {"epsilon": 10.0, "iterations": 5, "normalization": "zscore"}
fused, plain = (kernel.sinkhorn_assign(features, codebook, solver=s, **settings) for s in ("fused", "torch"))
assert torch.equal(fused.codes, plain.codes)
assert torch.equal(kernel.nearest_assign(features, codebook, solver="fused"), torch.cdist(features, codebook).argmin(1))
assert "optvq_hf" not in sys.modules
"""


@pytest.mark.slow
def test_the_kernels_library_loads_it(tmp_path):
    pytest.importorskip("kernels")
    pytest.importorskip("triton")
    subprocess.run([sys.executable, SCRIPT, "--output-dir", tmp_path / "kernel"], check=True, capture_output=True)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD, tmp_path / "kernel"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
