"""Tests of the whole package on one device, beside the CPU in float64: `OPTVQ_DEVICE=cuda pytest tests/device`.

Without the variable they run on the CPU. `make gpu` runs them on a GPU.
"""

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device(os.environ.get("OPTVQ_DEVICE", "cpu"))


@pytest.fixture
def cuda(device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("a CPU has no streams, graphs or allocator of CUDA")
    return device


@pytest.fixture(autouse=True)
def full_float32():
    """Products and convolutions without TF32, where a test does not ask for it; what the process had before comes back."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    yield
    for backend, precision in zip(backends, before, strict=True):
        backend.fp32_precision = precision
