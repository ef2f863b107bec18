"""Where the host waits for the device in a training step: every place is known, and has its reason.

On any device, operators that hand numbers to the host are seen on their way to the kernels. On CUDA its own detector looks too,
which knows of copies that no operator shows.
"""

import contextlib
import traceback
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import optvq_hf
from builders import pixels
from optvq_hf import OptVQQuantizer


SOURCE = Path(next(iter(optvq_hf.__path__)))
aten = torch.ops.aten
# Operators whose result, or its size, the host must know.
READS = {
    aten._local_scalar_dense.default: "item",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.bincount.default: "bincount",
    aten._unique2.default: "unique",
    aten.equal.default: "equal",
}

# By function and operator: how often in one forward pass, at most, and why. Only CUDA sees lists of numbers, as "detected".
CHECKED = {
    f"solver_inputs check_all_finite: {name}": (1, "NaN or inf in features or codes is an error of this very call")
    for name in ("item", "detected")
}
SOLVED = {
    **CHECKED,
    **{
        f"sinkhorn _solve: {name}": (1, "a scale out of the range of float32 is solved in float64")
        for name in ("item", "detected")
    },
    "sinkhorn_fused most_likely: nonzero": (1, "rows that float32 leaves open go to float64"),
    "sinkhorn_rows _make_suit: item": (5, "a kernel that overflows at the potentials of a round is computed again"),
    "solver_inputs check_potentials_range: item": (1, "potentials that are not finite are an error of this call"),
    "sinkhorn_rows most_likely: nonzero": (2, "rows that float32 leaves open, and their candidates, go to float64"),
    "nearest best_of_pairs: index by mask": (2, "the best of these candidates"),
}
FROM_PLAN = {  # a second function of the solver, with the checks of its own arguments
    **SOLVED,
    **{
        f"solver_inputs check_all_finite: {name}": (2, "of the solver and of the plan") for name in ("item", "detected")
    },
    "solver_inputs check_potentials_range: item": (2, "of the solver and of the plan"),
    "solver_inputs check_scale: item": (1, "a scale that is not finite is an error of this call"),
}
NEAREST = {
    **CHECKED,
    "nearest best_codes: nonzero": (2, "rows that bounds leave open, and their candidates, go to float64"),
    "nearest best_of_pairs: index by mask": (2, "the best of these candidates"),
}
WARM = {
    **SOLVED,
    "sinkhorn_rows _make_suit: item": (6, "one more round that reads potentials: the first"),
    "solver_inputs check_potentials_range: item": (2, "of the start and of the result"),
}
STEP = {
    **SOLVED,
    "solver_inputs check_values: item": (1, "pixels out of range are an error of this very call"),
}
QUANTIZERS = {
    "sinkhorn": ({}, SOLVED),
    "nearest": ({"training_assignment": "nearest"}, NEAREST),
    "sample": ({"training_assignment": "sample"}, FROM_PLAN),
    "soft": ({"training_assignment": "soft", "loss_type": "cross_entropy"}, FROM_PLAN),
    "warm start": ({"warm_start": True}, WARM),
    "robust": ({"normalization": "robust"}, SOLVED),
    "EMA codebook": ({"codebook_update": "ema", "use_projection": False}, SOLVED),
}


class Reads(TorchDispatchMode):
    """Counts the host's reads of tensors on a device, by the function of this package that causes them."""

    def __init__(self, device):
        super().__init__()
        self.device_type, self.counts = device.type, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = READS.get(func)
        if func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1]):
            name = "index by mask"
        if name is not None and args[0].device.type == self.device_type:
            self.counts[f"{place()}: {name}"] += 1
        return func(*args, **(kwargs or {}))


def place() -> str:
    """Module and function of the innermost frame of this package."""
    frames = ((Path(frame.filename), frame.name) for frame in reversed(traceback.extract_stack()))
    found = ((path, name) for path, name in frames if path.is_relative_to(SOURCE))
    path, name = next(found, (SOURCE / "outside", ""))
    return f"{path.relative_to(SOURCE).with_suffix('')} {name}"


@contextlib.contextmanager
def waits(device):
    """The counts of [`Reads`], and on CUDA those of torch's detector, under names that end in "detected"."""
    reads = Reads(device)
    if device.type != "cuda":
        with reads:
            yield reads.counts
        return
    detected, show = Counter(), warnings.showwarning
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *_, **__: detected.update([f"{place()}: detected"])
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with reads:
                yield reads.counts
        finally:
            torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = show
    known = {name.partition(":")[0] for name in reads.counts}
    reads.counts.update({name: n for name, n in detected.items() if name.partition(":")[0] not in known})


def check(counts, expected, batches=1):
    unknown = {name: number for name, number in counts.items() if number > batches * expected.get(name, (0, ""))[0]}
    assert not unknown, f"the host waits for the device: {unknown}"


@pytest.mark.parametrize(("fields", "expected"), QUANTIZERS.values(), ids=QUANTIZERS)
def test_a_step_of_the_quantizer(fields, expected, device, record_property):
    torch.manual_seed(0)
    quantizer = OptVQQuantizer(64, 8, 2, **fields).to(device)
    keep = torch.ones((), dtype=torch.bool, device=device)
    for number in range(2):  # the first may set up
        x = torch.randn(4, 8, 4, 4, generator=torch.Generator().manual_seed(number)).to(device).requires_grad_()
        with waits(device) as counts, quantizer.deferring():
            output = quantizer(x)
            (output.loss + output.quantized.square().mean()).backward()
            quantizer.apply_updates(keep)
    record_property("waits", sum(counts.values()))
    check(counts, expected)


def test_a_step_of_training(device, make_run, record_property):
    """Two batches, discriminator and EMA of the weights included: nothing beside the quantizer's own, and the pixels' check."""
    adversarial = {"adversarial_weight": 0.1, "discriminator_channels": 8, "discriminator_layers": 1}
    batches = [pixels(2, 3, 16, 16)] * 2
    run = make_run(batches, 8, objective={**adversarial, "lecam_weight": 0.1, "r1_weight": 0.1})
    for step in range(2):
        with waits(device) as counts:
            result = run.take_step(batches, step, measured=True)
            run.recorder.count(result, 4)
    if device.type == "cpu":
        counts.pop("training/optimization update: item")  # of a number that is on the CPU anyway
    record_property("waits", sum(counts.values()))
    check(counts, STEP, batches=2)
