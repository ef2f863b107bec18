"""Residual quantization beside a loop over quantizers, and models of several levels."""

import copy
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from builders import make_untrained, pixels, plain_config
from optvq_hf import OptVQModel, OptVQQuantizer, ResidualOptVQQuantizer
from optvq_hf.training.arguments import CodebookArguments
from optvq_hf.training.codebook import start_codebook


SIZES, EPSILONS = [32, 16, 64], [10.0, 20.0, 30.0]


def make(**arguments):
    torch.manual_seed(0)
    return ResidualOptVQQuantizer(**{"num_quantizers": 3, "codebook_size": 32, "dim": 8, "num_heads": 2, **arguments})


def clusters(number=600, seed=1):
    """Points around points around points: what levels are for."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(number, 8)
    for scale in (4.0, 1.0, 0.25):
        x += scale * torch.randn(8, 8, generator=generator)[torch.randint(8, (number,), generator=generator)]
    return x


# ---- levels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(50, 8), (3, 10, 8), (3, 8, 4, 6), (2, 8, 2, 3, 4)])
@pytest.mark.parametrize("assignment", ["sinkhorn", "nearest"])
def test_levels_quantize_what_is_left(shape, assignment):
    """The same as quantizers that are called one after the other; and codes and lookup invert bit for bit."""
    quantizer = make(codebook_size=SIZES, epsilon=EPSILONS)
    levels = copy.deepcopy(quantizer.levels)
    x = torch.randn(shape)
    output = quantizer(x, assignment=assignment)
    axis = 1 if len(shape) >= 4 else -1
    rest, codes, losses, counts = x, [], [], []
    for level in levels:
        of_level = level(rest, assignment=assignment)
        rest = rest - level.lookup(of_level.codes)
        codes.append(of_level.codes)
        losses.append(of_level.loss)
        counts.append(of_level.diagnostics["code_counts"])
    assert torch.equal(output.codes, torch.cat(codes, dim=axis))
    torch.testing.assert_close(output.loss, sum(losses))
    assert torch.equal(output.diagnostics["code_counts"], torch.cat(counts))
    assert torch.equal(quantizer.lookup(output.codes), output.quantized)
    torch.testing.assert_close(x - output.quantized, rest, rtol=1e-5, atol=1e-5)
    for level, other in zip(quantizer.levels, levels):
        assert torch.equal(level.potentials, other.potentials)


def test_more_levels_decode_better():
    """After training, and every level uses all of its codes."""
    quantizer, x = make(codebook_size=16, num_heads=1), clusters()
    optimizer = torch.optim.AdamW(quantizer.parameters(), 1e-2, weight_decay=0)
    for _ in range(100):
        optimizer.zero_grad()
        quantizer(x).loss.backward()
        optimizer.step()
    codes = quantizer.eval()(x).codes
    errors = [(x - quantizer.lookup(codes[:, :number])).square().mean().item() for number in (1, 2, 3)]
    assert x.var().item() > 4 * errors[0] and errors[0] > 1.5 * errors[1] > 1.5 * 1.2 * errors[2], errors
    used = quantizer(x, assignment="sinkhorn").diagnostics["code_counts"]
    assert (used > 0).all()


def test_a_mask_is_as_if_only_real_positions_were_there():
    x, mask = torch.randn(4, 10, 8), torch.rand(4, 10, generator=torch.Generator().manual_seed(0)) < 0.7
    x[~mask] = math.nan
    x.requires_grad_()
    quantizer, alone = make(), make()
    output, expected = quantizer(x, mask=mask), alone(x.detach()[mask])
    assert torch.equal(output.codes[mask], expected.codes) and (output.codes[~mask] == -1).all()
    assert torch.equal(output.quantized[mask], expected.quantized) and not output.quantized[~mask].any()
    assert torch.equal(output.loss, expected.loss) and torch.equal(quantizer.lookup(output.codes), output.quantized)
    output.quantized.sum().backward()
    assert torch.equal(x.grad, mask[..., None].float().expand_as(x))
    for name, tensor in quantizer.state_dict().items():
        assert torch.equal(tensor, alone.state_dict()[name]), name


def test_dropout_skips_the_last_levels():
    quantizer, x = make(quantizer_dropout=True), torch.randn(50, 8)
    seen = set()
    for _ in range(20):
        quantizer.zero_grad()
        output = quantizer(x)
        number = (output.codes[0] >= 0).sum().item() // 2
        seen.add(number)
        assert (output.codes[:, : 2 * number] >= 0).all() and (output.codes[:, 2 * number :] == -1).all()
        assert torch.equal(quantizer.lookup(output.codes), output.quantized)
        assert torch.equal(quantizer.lookup(output.codes[:, : 2 * number]), output.quantized)
        assert not output.diagnostics["code_counts"][32 * number :].any()
        assert [scale > 0 for scale in output.diagnostics["scale"]] == [True] * number + [False] * (3 - number)
        output.loss.backward()
        assert all(parameter.grad is not None for parameter in quantizer.parameters())
        assert not any(parameter.grad.any() for level in quantizer.levels[number:] for parameter in level.parameters())
    assert seen == {1, 2, 3}
    assert (quantizer.eval()(x).codes >= 0).all()


@pytest.mark.parametrize("fields", [{}, {"codebook_update": "ema", "use_projection": False}], ids=str)
def test_a_shared_codebook(fields):
    quantizer = make(share_codebook=True, **fields)
    alone = OptVQQuantizer(32, 8, 2, **fields)
    assert sum(p.numel() for p in quantizer.parameters()) == sum(p.numel() for p in alone.parameters())
    before = quantizer.get_codebook().detach().clone()
    assert torch.equal(before[:32], before[64:])
    quantizer(clusters().requires_grad_()).loss.backward()
    if fields:
        after = quantizer.get_codebook()
        assert not torch.equal(before, after) and torch.equal(after[:32], after[64:])
        owner = copy.deepcopy(quantizer).levels[0]
        assert torch.equal(owner.embedding.weight, after[:32])
    assert not torch.equal(quantizer.levels[0].potentials, quantizer.levels[1].potentials)
    again = make(share_codebook=True, **fields)
    again.load_state_dict(quantizer.state_dict())
    x = clusters(100, seed=2)
    assert torch.equal(again.eval()(x).codes, quantizer.eval()(x).codes)


@pytest.mark.parametrize("defers", [False, True])
def test_a_shared_ema_codebook_moves_once_a_step(defers):
    """All levels use the codes from before the step; the update is one, of the features of all levels, with one decay."""
    quantizer = make(
        share_codebook=True, codebook_update="ema", use_projection=False, ema_decay=0.5, loss_type="cross_entropy"
    )
    before, x = copy.deepcopy(quantizer), clusters().requires_grad_()
    codebook = quantizer.levels[0].get_codebook().clone()
    quantizer.defer_updates = defers
    output = quantizer(x)
    output.loss.backward()
    quantizer.apply_updates()
    assert torch.equal(output.quantized, before.lookup(output.codes))
    rest, sums, counts = x.detach(), torch.zeros(32, 4), torch.zeros(32)
    for codes in output.codes.split(2, dim=1):
        sums.index_add_(0, codes.flatten(), rest.reshape(-1, 4))
        counts += codes.flatten().bincount(minlength=32)
        rest = rest - codebook[codes].flatten(1)
    owner = quantizer.levels[0]
    torch.testing.assert_close(owner.ema_counts, 0.5 * counts)
    torch.testing.assert_close(owner.ema_sums, 0.5 * sums)
    torch.testing.assert_close(owner.get_codebook()[counts > 0], (sums / counts[:, None])[counts > 0])
    assert all(level.num_updates == 1 and not level._collected for level in quantizer.levels)
    with pytest.raises(ValueError, match="found NaN"):  # in the last level, after others have collected
        quantizer.levels[2].register_forward_pre_hook(lambda _, arguments: (arguments[0] * math.nan,))
        quantizer(x.detach())
    assert defers or not any(level._collected for level in quantizer.levels)


@pytest.mark.parametrize("rules", [["sinkhorn", "nearest", "nearest"], ["nearest", "sinkhorn", "soft"]], ids=str)
@pytest.mark.parametrize("in_training", [False, True])
def test_levels_of_different_rules(rules, in_training):
    """What a level has not is 0 in the diagnostics, and not part of means."""
    quantizer, x = make(codebook_size=SIZES), clusters(100)
    quantizer(x)
    rules = rules if in_training else [rule.replace("soft", "potentials") for rule in rules]
    name = "training_assignment" if in_training else "inference_assignment"
    setattr(quantizer.train(in_training), name, rules)
    levels, rest = copy.deepcopy(quantizer.levels), x
    diagnostics, of_levels = quantizer(x).diagnostics, []
    for level in levels:
        output = level(rest)
        of_levels.append(output.diagnostics)
        rest = rest - output.quantized
    errors = [of_level["marginal_error"] for of_level in of_levels if "scale" in of_level]
    torch.testing.assert_close(diagnostics["marginal_error"], torch.stack(errors).mean())
    torch.testing.assert_close(
        diagnostics["scale"], torch.stack([of_level.get("scale", torch.tensor(0.0)) for of_level in of_levels])
    )
    potentials = [of_level.get("potentials", torch.zeros(size)) for size, of_level in zip(SIZES, of_levels)]
    torch.testing.assert_close(diagnostics["potentials"], torch.cat(potentials))
    assert torch.equal(diagnostics["code_counts"], torch.cat([of_level["code_counts"] for of_level in of_levels]))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(use_reentrant, shared):
    fields = {"codebook_update": "ema", "use_projection": False, "warm_start": True, "share_codebook": shared}
    plain, again = (make(quantizer_dropout=True, **fields) for _ in range(2))
    for seed in range(4):
        x, y = (clusters(100, seed).requires_grad_() for _ in range(2))
        torch.manual_seed(seed)
        plain(x).loss.backward()
        torch.manual_seed(seed)
        checkpoint(lambda z: again(z).loss, y, use_reentrant=use_reentrant).backward()
        torch.testing.assert_close(y.grad, x.grad)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, msg=name)


def test_deferred_updates_wait_in_every_level():
    quantizer, x = make(codebook_update="ema", use_projection=False), clusters()
    before = copy.deepcopy(quantizer.state_dict())
    with quantizer.deferring():
        quantizer(x)
        assert all(torch.equal(before[name], tensor) for name, tensor in quantizer.state_dict().items())
        quantizer.apply_updates(torch.tensor(True))
    assert all(level.num_updates == 1 and level.ema_counts.any() for level in quantizer.levels)
    moved = copy.deepcopy(quantizer.state_dict())
    with quantizer.deferring():
        quantizer(x)
        quantizer.apply_updates(torch.tensor(False))
    assert all(torch.equal(moved[name], tensor) for name, tensor in quantizer.state_dict().items())


def test_settings_of_all_levels():
    quantizer = make(epsilon=EPSILONS)
    assert quantizer.epsilon == EPSILONS and quantizer.balance == 1.0 and quantizer.codebook_size == 32
    quantizer.epsilon, quantizer.balance = 50.0, [1.0, 0.5, 0.0]
    assert [level.epsilon for level in quantizer.levels] == [50.0] * 3
    assert [level.balance for level in quantizer.levels] == [1.0, 0.5, 0.0]
    with pytest.raises(ValueError, match="balance must have one entry per level, 3, got "):
        quantizer.balance = [1.0, 0.5]
    for name, values in {"gradient_estimator": ["rotation"] * 3, "defer_updates": [True] * 3}.items():
        with pytest.raises(ValueError, match=f"{name} is one for all levels, got "):
            setattr(quantizer, name, values)
    quantizer.max_starts, quantizer.averaging_momentum = 64, 0.5
    assert all(level.max_starts == 64 and level.averaging_momentum == 0.5 for level in quantizer.levels)
    quantizer.bypass = True
    x = torch.randn(20, 8)
    assert torch.equal(quantizer(x).quantized, x) and not torch.equal(quantizer.eval()(x).quantized, x)


def test_reset_parameters_resets_every_level():
    quantizer = make(share_codebook=True, codebook_update="ema", use_projection=False)
    quantizer(clusters())
    quantizer.reset_parameters()
    assert not any(level.num_updates or level.potentials.any() for level in quantizer.levels)
    assert not quantizer.levels[0].ema_counts.any()


def test_bfloat16():
    quantizer, x = make(), torch.randn(50, 8)
    quantizer(x)
    half = copy.deepcopy(quantizer).eval().to(torch.bfloat16)
    output = half(x.bfloat16())
    assert output.quantized.dtype == torch.bfloat16 and torch.equal(half.lookup(output.codes), output.quantized)
    assert all(level.potentials.dtype == torch.float32 for level in half.levels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_quantizers": 0}, "num_quantizers must be an integer of at least 1, got 0"),
        ({"num_quantizers": True}, "num_quantizers must be an integer of at least 1, got True"),
        ({"codebook_size": [32, 16]}, r"codebook_size must have one entry per level, 3, got \[32, 16\]"),
        ({"epsilon": [1.0]}, r"epsilon must have one entry per level, 3, got \[1.0\]"),
        ({"share_codebook": True, "codebook_size": SIZES}, r"a shared codebook has one size, got codebook_size \[32,"),
        ({"quantizer_dropout": 0.5}, "quantizer_dropout must be True or False, got 0.5"),
        ({"share_codebook": 1}, "share_codebook must be True or False, got 1"),
        ({"epsilon": [10.0, -1.0, 10.0]}, "epsilon must be finite and greater than 0, got -1.0"),
        ({"cost": "manhattan"}, "cost must be one of .*, got 'manhattan'"),
        ({"gradient_estimator": "none"}, "gradient_estimator must be one of .*, got 'none'"),
    ],
)
def test_wrong_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_wrong_inputs():
    for x, error in (
        (torch.zeros(3, 8, dtype=torch.int64), "must be floats"),
        (torch.zeros(3, 7), r"must be \(N, 8\)"),
    ):
        with pytest.raises(ValueError, match=error):
            make()(x)
    with pytest.raises(TypeError, match="hidden_states must be a tensor, got list"):
        make()([1.0])
    with pytest.raises(ValueError, match="found NaN or inf in features"):
        make()(torch.full((3, 8), math.nan))


def test_wrong_codes():
    quantizer = make(codebook_size=SIZES)
    for shape in ((4, 1), (4, 5), (4, 8), (4,)):
        with pytest.raises(
            ValueError, match=r"codes must be \(N, 6\) or .* 2 of each of 3 levels, or those of the first"
        ):
            quantizer.lookup(torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(IndexError, match=r"codes of level 1 must lie in \[0, 16\) or be -1, got values from 0 to 16"):
        quantizer.lookup(torch.tensor([[31, 31, 16, 0, 0, 0]]))


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> OptVQModel:
    model = make_untrained(plain_config(num_quantizers=3, codebook_size=32)).train()
    start_codebook(model, [pixels(16, 3, 32, 32)], CodebookArguments(codebook_start="kmeans"), seed=0)
    model(pixels(16, 3, 32, 32))  # which gives it potentials
    return model.eval()


def test_codes_of_a_model_level_by_level(model):
    x = pixels(4, 3, 32, 32)
    encoded = model.encode(x)
    assert encoded.codes.shape == (4, 6, 8, 8) and encoded.code_counts.shape == (96,)
    assert (model.config.codes_per_token, model.config.vocab_size) == (6, 192)
    assert torch.equal(model.quantizer.lookup(encoded.codes), encoded.quantized)
    decoded = [model.decode(codes=encoded.codes[:, : 2 * level]).reconstruction for level in (1, 2, 3)]
    assert torch.equal(decoded[2], model.decode(quantized=encoded.quantized).reconstruction)
    assert not torch.equal(decoded[0], decoded[1])
    errors = [
        (encoded.latents - model.quantizer.lookup(encoded.codes[:, : 2 * level])).square().mean() for level in (1, 2, 3)
    ]
    assert errors[0] > errors[1] > errors[2]
    for wrong in (encoded.codes[:, :3], torch.cat([encoded.codes] * 2, dim=1)):
        with pytest.raises(ValueError, match="or those of the first levels"):
            model.decode(codes=wrong)


def test_ids_of_levels(model):
    codes = model.encode(pixels(2, 3, 32, 32)).codes
    ids = model.to_token_ids(codes, first_token_id=7)
    assert ids.shape == (2, 8 * 8 * 6) and ids.min() >= 7 and ids.max() < 7 + model.config.vocab_size
    assert ids[1, :6].tolist() == [7 + 32 * entry + int(codes[1, entry, 0, 0]) for entry in range(6)]
    assert torch.equal(model.from_token_ids(ids, first_token_id=7), codes)


@pytest.mark.parametrize("settings", [{"codebook_size": SIZES, "epsilon": EPSILONS}, {"share_codebook": True}], ids=str)
def test_a_quantizer_alone_is_saved_as_a_whole(tmp_path, settings):
    """With its settings and its running state, and the sharing of codes."""
    quantizer = make(**settings, cost="squared_euclidean", channels_first=False, warm_start=True).train()
    quantizer(clusters())
    quantizer.save_pretrained(tmp_path)
    again = ResidualOptVQQuantizer.from_pretrained(tmp_path)
    assert not again.training and again.cost == "squared_euclidean" and again.epsilon == quantizer.epsilon
    assert (again.levels[0].embedding is again.levels[1].embedding) == ("share_codebook" in settings)
    for name, tensor in quantizer.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    x = clusters(seed=2)
    for assignment in ("nearest", "potentials"):
        assert torch.equal(again(x, assignment=assignment).codes, quantizer.eval()(x, assignment=assignment).codes)
    with pytest.raises(RuntimeError, match="size mismatch"):
        ResidualOptVQQuantizer.from_pretrained(tmp_path, dim=16)


def test_a_model_of_levels_is_saved_as_a_whole(model, tmp_path):
    x = pixels(2, 3, 32, 32)
    model.save_pretrained(tmp_path)
    again = OptVQModel.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    for assignment in ("nearest", "potentials"):
        codes = model.encode(x, assignment=assignment).codes
        assert torch.equal(again.encode(x, assignment=assignment).codes, codes)
    half = OptVQModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.quantizer.levels[2].potentials.dtype == torch.float32
    codes = half.encode(x).codes
    assert torch.equal(half.quantizer.lookup(codes), half.encode(x).quantized)
    wider = OptVQModel.from_pretrained(tmp_path, codebook_size=48, ignore_mismatched_sizes=True)
    assert all(level.num_updates == 0 and level.codebook_size == 48 for level in wider.quantizer.levels)
    with pytest.raises(ValueError, match="the checkpoint has .* weights that the model does not have"):
        OptVQModel.from_pretrained(tmp_path, num_quantizers=2)


def test_settings_of_a_model_are_those_of_all_levels(model):
    other = copy.deepcopy(model)
    other.quantizer.epsilon = 33.0
    assert other.config.sinkhorn_epsilon == 33.0 and model.config.sinkhorn_epsilon == 10.0
    assert all(level.epsilon == 33.0 and level.config is other.config for level in other.quantizer.levels)


def test_one_level_keeps_the_names_of_weights():
    names = [name for name in make_untrained(plain_config()).state_dict() if name.startswith("quantizer.")]
    assert names[0] == "quantizer.potentials" and "quantizer.embedding.weight" in names
    assert type(make_untrained(plain_config(num_quantizers=1)).quantizer).__name__ == "OptVQModelQuantizer"


def test_compiled_codes_are_the_eager_ones(model):
    x = pixels(2, 3, 32, 32)
    compiled = torch.compile(model.quantizer, fullgraph=True, backend="eager")
    latents = model.encode(x).latents
    with torch.no_grad():
        assert torch.equal(compiled(latents, return_loss=False).codes, model.quantizer(latents).codes)
