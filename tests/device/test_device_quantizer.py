"""The quantizer beside what its output must be, computed from its codes in float64 on the CPU."""

import contextlib
import copy

import pytest
import torch

from builders import make_untrained, pixels, plain_config
from grids import slow
from optvq_hf import OptVQQuantizer
from optvq_hf.training.arguments import CodebookArguments
from optvq_hf.training.codebook import start_codebook


SHAPE = (4, 16, 6, 6)
EMA = {"use_projection": False, "codebook_update": "ema", "ema_decay": 0.5}


def make(**arguments):
    torch.manual_seed(0)
    return OptVQQuantizer(**{"codebook_size": 64, "dim": 16, "num_heads": 2, **arguments})


def batch(shape=SHAPE, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def share_of_equal(codes, expected):
    return (codes.cpu() == expected.cpu()).double().mean().item()


@pytest.mark.parametrize("assignment", ["sinkhorn", "nearest"])
@pytest.mark.parametrize("loss_type", ["l2", slow("l1"), "cross_entropy"])
def test_forward_and_backward_in_float32(loss_type, assignment, device):
    quantizer, weight = make(loss_type=loss_type, training_assignment=assignment), batch(seed=2)
    exact = copy.deepcopy(quantizer).double()
    quantizer.to(device)
    x = batch().to(device).requires_grad_()
    output = quantizer(x)
    ((output.quantized * weight.to(device)).sum() + output.loss).backward()
    assert torch.equal(quantizer.lookup(output.codes), output.quantized)

    z = batch().double().requires_grad_()
    expected = exact(z)
    assert share_of_equal(output.codes, expected.codes) >= (1 if assignment == "nearest" else 0.99)
    # From here on with the codes of the device: the rest of the quantizer is smooth.
    exact._assign = lambda features, codebook, *_: (
        torch.nn.functional.embedding(output.codes.cpu().movedim(1, -1).flatten(), codebook),
        output.codes.cpu().movedim(1, -1).flatten(),
        {},
    )
    expected = exact(z)
    ((expected.quantized * weight).sum() + expected.loss).backward()
    torch.testing.assert_close(output.loss.cpu().double(), expected.loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad.cpu().double(), z.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.perplexity.cpu().double(), expected.perplexity.double(), rtol=1e-4, atol=0)
    for (name, parameter), other in zip(quantizer.named_parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad.cpu().double(), other.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("assignment", ["sinkhorn", "nearest", "soft"])
def test_autocast_changes_nothing(assignment, dtype, device):
    expected = make(training_assignment=assignment).to(device)(batch().to(device))
    quantizer, x = make(training_assignment=assignment).to(device), batch().to(device).requires_grad_()
    with torch.autocast(device.type, dtype=dtype):
        found = quantizer(x)
    found.loss.backward()
    assert found.loss.dtype == torch.float32 and x.grad.isfinite().all()
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.quantized, expected.quantized)
    torch.testing.assert_close(found.loss, expected.loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_inputs_have_the_codes_of_their_values(dtype, device):
    quantizer, x = make().to(device).eval(), batch().to(device, dtype)
    output = quantizer(x)
    assert output.quantized.dtype == dtype
    assert torch.equal(output.codes, quantizer(x.float()).codes)


@pytest.mark.parametrize("shape", [(40, 16), (3, 10, 16), (3, 16, 4, 5), (2, 16, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_masks_and_layouts(training, shape, device):
    x = batch(shape).to(device)
    last = x.movedim(1, -1) if len(shape) >= 4 else x
    mask = torch.rand(last.shape[:-1], generator=torch.Generator().manual_seed(3)).to(device) > 0.3
    output = (
        make()
        .to(device)
        .train(training)(x.masked_fill(~mask.unsqueeze(1 if len(shape) >= 4 else -1), torch.nan), mask=mask)
    )
    codes, quantized = ((t.movedim(1, -1) if len(shape) >= 4 else t) for t in (output.codes, output.quantized))
    expected = make().to(device).train(training)(last[mask])
    assert torch.equal(codes[mask], expected.codes) and torch.equal(quantized[mask], expected.quantized)
    assert (codes[~mask] == -1).all() and (quantized[~mask] == 0).all()
    torch.testing.assert_close(output.loss, expected.loss)
    other = make(channels_first=False).to(device).train(training)(last.contiguous())
    plain = make().to(device).train(training)(x)
    assert torch.equal(other.codes, plain.codes.movedim(1, -1) if len(shape) >= 4 else plain.codes)


@pytest.mark.parametrize(
    "fields", [{}, {"warm_start": True, "iterations": 2}, EMA, {**EMA, "training_assignment": "nearest"}], ids=str
)
@pytest.mark.parametrize("deferred", [False, True])
def test_running_state(deferred, fields, device):
    """After three steps, of which one is skipped if updates are deferred, as on the CPU."""
    states = []
    for place in (torch.device("cpu"), device):
        quantizer = make(**fields).to(place).train()
        for step in range(3):
            with quantizer.deferring() if deferred else contextlib.nullcontext():
                quantizer(batch(seed=step).to(place))
                quantizer(batch(seed=step + 10).to(place))
                quantizer.apply_updates(torch.tensor(step != 1, device=place))
        states.append({name: tensor.cpu() for name, tensor in quantizer.state_dict().items()})
    for name, expected in states[0].items():
        torch.testing.assert_close(states[1][name], expected, rtol=1e-3, atol=1e-3, msg=name)


def test_start_of_the_codebook_by_kmeans(device):
    pytest.importorskip("sklearn")
    model = make_untrained(plain_config()).to(device)
    start_codebook(model, [pixels(8, 3, 32, 32)], CodebookArguments("kmeans", 1), seed=0)
    assert model.get_codebook().device.type == device.type
    output = model(pixels(8, 3, 32, 32).to(device), return_loss=True)
    assert (output.code_counts > 0).double().mean() > 0.9


@pytest.mark.parametrize("assignment", ["nearest", "sinkhorn"])
def test_compiled(assignment, device, record_property):
    """In training mode: the same codes, loss and running state."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, quantizer = (make(training_assignment=assignment).to(device) for _ in range(2))
    compiled = torch.compile(quantizer, backend="inductor" if device.type == "cuda" else "aot_eager")
    for seed in range(2):
        x = batch(seed=seed).to(device).requires_grad_()
        output = compiled(x)
        (output.quantized.square().mean() + output.loss).backward()
        expected = eager(batch(seed=seed).to(device))
        assert torch.equal(output.codes, expected.codes)
        torch.testing.assert_close(output.loss, expected.loss, rtol=1e-4, atol=1e-5)
    for name, tensor in eager.named_buffers():
        torch.testing.assert_close(quantizer.get_buffer(name), tensor, rtol=1e-4, atol=1e-4, msg=name)
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    record_property("graph breaks", breaks)
    assert breaks == 0
