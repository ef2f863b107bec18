"""Tests of the whole package on one device, beside the CPU in float64: `OPTVQ_DEVICE=cuda pytest tests/device`.

Without the variable they run on the CPU. `make gpu` runs them on a GPU.
"""

import os

import pytest
import torch
from accelerate import Accelerator


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


@pytest.fixture
def make_run(device, tmp_path, fresh_run):
    """make_run(batches, total_steps, training={...}, objective={...}): a run of a small plain CNN on the device."""
    from builders import make_untrained, plain_config
    from optvq_hf import OptVQImageProcessor
    from optvq_hf.training import arguments
    from optvq_hf.training.trainer import TrainingRun

    def make(batches, total_steps, training=None, objective=None) -> TrainingRun:
        recipe = arguments.Recipe(
            arguments.TrainingArguments(output_dir=str(tmp_path), **(training or {})),
            arguments.OptimizationArguments(ema_decay=0.9),
            arguments.ObjectiveArguments(**(objective or {})),
            arguments.CodebookArguments(),
            arguments.RecordArguments(report_to="none", images_every=0, log_every=2),
        )
        accelerator = Accelerator(mixed_precision=recipe.training.mixed_precision, cpu=device.type == "cpu")
        model = make_untrained(plain_config())
        return TrainingRun(model, OptVQImageProcessor(), batches, total_steps, recipe, accelerator)

    return make
