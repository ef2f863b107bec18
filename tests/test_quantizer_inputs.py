"""What the quantizer takes: layouts, masks, dtypes of codes; weights that accelerate has moved away."""

import pytest
import torch
from accelerate import cpu_offload

from grids import slow
from optvq_hf import OptVQQuantizer
from optvq_hf.quantizer_optvq import ASSIGNMENTS


def make(**arguments):
    torch.manual_seed(0)
    return OptVQQuantizer(**{"codebook_size": 32, "dim": 8, "num_heads": 2, **arguments})


# ---- layouts ---------------------------------------------------------------------------------------------------------

# Constructor's argument, shape of the input, its axis of channels.
LAYOUTS = [
    (None, (6, 8), -1),
    (None, (3, 5, 8), -1),
    (None, (3, 8, 4, 6), 1),
    (None, (3, 8, 2, 4, 6), 1),
    (True, (6, 8), 1),
    (True, (3, 8, 5), 1),
    (True, (3, 8, 4, 6), 1),
    (True, (3, 8, 2, 4, 6), 1),
    (False, (6, 8), -1),
    (False, (3, 5, 8), -1),
    (False, (3, 4, 6, 8), -1),
    (False, (3, 2, 4, 6, 8), -1),
    (True, (3, 8, 8), 1),  # the shape alone does not tell
    (False, (3, 8, 8), -1),
    (False, (3, 8, 8, 8), -1),
]


@pytest.mark.parametrize(("channels_first", "shape", "axis"), LAYOUTS)
def test_every_layout_is_read_as_vectors_are(channels_first, shape, axis):
    x = torch.randn(shape)
    rows = x.movedim(axis, -1)
    want = make()(rows.reshape(-1, 8))
    quantizer = make(channels_first=channels_first)
    got = quantizer(x)
    assert got.quantized.shape == x.shape and got.codes.shape[axis] == 2 and got.codes.ndim == x.ndim
    assert torch.equal(got.quantized.movedim(axis, -1).reshape(-1, 8), want.quantized)
    assert torch.equal(got.codes.movedim(axis, -1).reshape(-1, 2), want.codes)
    assert got.loss == want.loss and got.perplexity == want.perplexity
    assert torch.equal(quantizer.lookup(got.codes), got.quantized)
    mask = torch.rand(rows.shape[:-1]) < 0.6
    assert torch.equal(quantizer.eval()(x, mask=mask).codes.movedim(axis, -1)[mask], make().eval()(rows[mask]).codes)


@pytest.mark.parametrize(
    ("channels_first", "shape"),
    [(None, (8,)), (None, (3, 8, 5)), (True, (3, 5, 8)), (False, (3, 8, 4, 6)), (None, (1, 1, 8, 1, 1, 1)), (None, ())],
)
def test_wrong_layouts(channels_first, shape):
    with pytest.raises(ValueError, match=r"hidden_states must be \(N, 8\) or .*, got \("):
        make(channels_first=channels_first)(torch.randn(shape))
    with pytest.raises(ValueError, match=r"codes must be \(N, 2\) or .*, got \("):
        make(channels_first=channels_first).lookup(torch.zeros(shape, dtype=torch.int64))


# ---- masks -----------------------------------------------------------------------------------------------------------

SHAPES = {(40, 8): (40,), (5, 12, 8): (5, 12), (3, 8, 5, 6): (3, 5, 6), (3, 8, 2, 5, 4): (3, 2, 5, 4)}


def padded(shape, filler=float("nan"), seed=0):
    """An input, its mask, and its real positions alone."""
    generator = torch.Generator().manual_seed(seed)
    x, mask = torch.randn(shape, generator=generator), torch.rand(SHAPES[shape], generator=generator) < 0.5
    axis = 1 if x.ndim >= 4 else -1
    rows = x.movedim(axis, -1)
    real = rows[mask].clone()
    rows[~mask] = filler
    return x, mask, real


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
@pytest.mark.parametrize("filler", [float("nan"), slow(0.0), slow(1e30), slow(float("inf"))])
def test_masked_positions_take_part_in_nothing(shape, assignment, filler):
    x, mask, real = padded(shape, filler)
    settings = {"normalization": "robust", "warm_start": True} if assignment == "sinkhorn" else {}
    quantizer, alone = make(**settings), make(**settings)
    for module in (quantizer, alone):
        module(torch.randn(64, 8, generator=torch.Generator().manual_seed(1)))  # potentials to start from
    x.requires_grad_(), real.requires_grad_()
    torch.manual_seed(2)
    got = quantizer(x, assignment=assignment, mask=mask)
    torch.manual_seed(2)
    want = alone(real, assignment=assignment)
    axis = 1 if x.ndim >= 4 else -1
    codes, quantized = got.codes.movedim(axis, -1), got.quantized.movedim(axis, -1)
    assert torch.equal(codes[mask], want.codes) and (codes[~mask] == -1).all()
    assert torch.equal(quantized[mask], want.quantized) and not quantized[~mask].any()
    assert got.loss == want.loss and got.perplexity == want.perplexity
    assert got.diagnostics.keys() == want.diagnostics.keys()
    assert all(torch.equal(got.diagnostics[name], want.diagnostics[name]) for name in want.diagnostics)
    for (name, state), (_, other) in zip(quantizer.state_dict().items(), alone.state_dict().items()):
        assert torch.equal(state, other), name
    if assignment != "soft":
        assert torch.equal(quantizer.lookup(got.codes), got.quantized)
    (got.loss + got.quantized.square().sum()).backward()
    (want.loss + want.quantized.square().sum()).backward()
    gradients = x.grad.movedim(axis, -1)
    assert torch.equal(gradients[mask], real.grad) and not gradients[~mask].any()
    for ours, theirs in zip(quantizer.parameters(), alone.parameters()):
        assert torch.equal(ours.grad, theirs.grad)


def test_a_mask_of_an_ema_codebook():
    x, mask, real = padded((5, 12, 8))
    settings = {"codebook_update": "ema", "use_projection": False, "ema_decay": 0.5}
    quantizer, alone = make(**settings), make(**settings)
    quantizer(x, mask=mask), alone(real)
    assert torch.equal(quantizer.embedding.weight, alone.embedding.weight)
    assert torch.equal(quantizer.ema_counts, alone.ema_counts) and quantizer.ema_counts.sum() == real.shape[0]


def test_a_padded_sample_gets_the_codes_it_has_alone():
    quantizer = make().eval()
    x, mask, _ = padded((5, 12, 8), filler=0.0)
    mask[2] = False  # a sample of padding alone
    codes = quantizer(x, mask=mask).codes
    for row in range(5):
        assert torch.equal(codes[row][mask[row]], quantizer(x[row, mask[row]]).codes)
    assert (codes[2] == -1).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bypass", [True, False])
def test_masks_of_nothing_and_of_everything(training, bypass):
    x = torch.randn(3, 4, 8)
    for everything in (True, False):
        quantizer, plain = make().train(training), make().train(training)
        quantizer.bypass = plain.bypass = bypass
        before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
        mask = torch.full((3, 4), everything)
        got = quantizer(x, mask=mask)
        if everything:
            want = plain(x)
            assert torch.equal(got.quantized, want.quantized) and torch.equal(got.codes, want.codes)
            assert got.loss == want.loss
        else:
            assert not got.quantized.any() and (got.codes == -1).all() and got.loss == 0 and got.perplexity == 1
            assert all(torch.equal(before[name], tensor) for name, tensor in quantizer.state_dict().items())


def test_compiled_masks():
    quantizer = make().eval()
    compiled = torch.compile(make().eval())
    for seed in range(3):
        x, mask, _ = padded((5, 12, 8), seed=seed)
        want, got = quantizer(x, mask=mask), compiled(x, mask=mask)
        assert torch.equal(got.codes, want.codes) and torch.equal(got.quantized, want.quantized)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(3, 4), r"mask must be bool \(3, 4\), True where a position is real, got torch.float32 \(3, 4\)"),
        (torch.ones(3, 4, dtype=torch.int64), "got torch.int64"),
        (torch.ones(4, 3, dtype=torch.bool), r"got torch.bool \(4, 3\)"),
        (torch.ones(3, 4, 8, dtype=torch.bool), r"got torch.bool \(3, 4, 8\)"),
        (torch.ones(12, dtype=torch.bool), r"got torch.bool \(12,\)"),
        ([[True] * 4] * 3, "mask must be a tensor, got list"),
    ],
)
def test_wrong_masks(mask, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()(torch.randn(3, 4, 8), mask=mask)


# ---- codes -----------------------------------------------------------------------------------------------------------

INTEGERS = [getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_lookup_of_every_integer_dtype(dtype):
    codes = make()(torch.randn(3, 5, 8)).codes
    assert torch.equal(make().lookup(codes.to(dtype)), make().lookup(codes))
    largest = torch.full((1, 1, 2), torch.iinfo(dtype).max, dtype=dtype)
    with pytest.raises(IndexError, match=r"codes must lie in \[0, 32\)"):
        make().lookup(largest)


def test_a_masked_code_is_zeros():
    vectors = make().lookup(torch.tensor([[-1, 3], [4, -1]]))
    assert not vectors[0, :4].any() and not vectors[1, 4:].any() and vectors[0, 4:].any() and vectors[1, :4].any()


@pytest.mark.parametrize("wrong", [None, [1.0], "x", 3])
def test_not_a_tensor(wrong):
    with pytest.raises(TypeError, match="hidden_states must be a tensor, got"):
        make()(wrong)
    with pytest.raises(TypeError, match="codes must be a tensor, got"):
        make().lookup(wrong)


# ---- settings --------------------------------------------------------------------------------------------------------


def test_settings_that_change_are_checked_when_used():
    x = torch.randn(3, 5, 8)
    wrong = {
        "loss_type": "huber",
        "training_assignment": "best",
        "inference_assignment": "soft",
        "epsilon": -1,
        "balance": 2,
    }
    wrong |= {"ema_decay": 7, "commitment_weight": float("nan"), "codebook_weight": float("inf"), "channels_first": "x"}
    for name, value in wrong.items():
        quantizer = make()
        setattr(quantizer, name, value)
        with pytest.raises(ValueError, match=name if "assignment" not in name else "assignment"):
            quantizer(x)
    for name in ("use_projection", "freeze_codebook", "warm_start"):
        with pytest.raises(ValueError, match=f"{name} must be one of"):
            make(**{name: "yes"})
    with pytest.raises(TypeError, match="ema_decay must be a number"):
        make(ema_decay="a")
    with pytest.raises(AttributeError):
        make().freeze_codebook = True  # decided at construction


# ---- weights elsewhere -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_projection", [True, False])
@pytest.mark.parametrize("offload_buffers", [True, False])
def test_an_offloaded_quantizer(use_projection, offload_buffers):
    x = torch.randn(3, 5, 8)
    quantizer = make(use_projection=use_projection)
    quantizer(x)
    quantizer.eval()
    want = {name: quantizer(x, assignment=name) for name in ("nearest", "potentials", "sinkhorn", "soft")}
    cpu_offload(quantizer, execution_device=torch.device("cpu"), offload_buffers=offload_buffers)
    assert quantizer.embedding.weight.is_meta
    for name, output in want.items():
        got = quantizer(x, assignment=name)
        assert torch.equal(got.codes, output.codes) and torch.equal(got.quantized, output.quantized)
    assert torch.equal(quantizer.lookup(want["nearest"].codes), want["nearest"].quantized)
