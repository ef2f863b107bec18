import copy
import pickle

import pytest
import torch

from grids import slow
from optvq_hf import OptVQQuantizer, distances
from optvq_hf.quantizer_optvq import ASSIGNMENTS
from optvq_hf.sinkhorn import sinkhorn_assign


def make(**arguments):
    torch.manual_seed(0)
    return OptVQQuantizer(**{"codebook_size": 64, "dim": 8, "num_heads": 2, **arguments})


@pytest.mark.parametrize("shape", [(3, 8, 4, 6), (3, 10, 8)])
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_shapes_and_lookup_inverts(shape, assignment):
    quantizer = make()
    x = torch.randn(shape)
    output = quantizer(x, assignment=assignment)
    assert output.quantized.shape == x.shape
    assert output.codes.shape == ((3, 2, 4, 6) if len(shape) == 4 else (3, 10, 2)) and output.codes.dtype == torch.int64
    if assignment != "soft":
        assert torch.equal(quantizer.lookup(output.codes), output.quantized)


def test_heads_are_contiguous_chunks_of_the_width():
    quantizer = make(use_projection=False)
    x = quantizer.lookup(torch.tensor([[[3, 7]]]))
    assert torch.equal(x[0, 0], torch.cat([quantizer.embedding.weight[3], quantizer.embedding.weight[7]]))
    assert quantizer.eval()(x).codes.tolist() == [[[3, 7]]]


def test_the_gradient_goes_straight_through():
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    weight = torch.randn(2, 8, 4, 4)
    (make()(x).quantized * weight).sum().backward()
    assert torch.equal(x.grad, weight)


def test_both_loss_terms_have_their_own_weight():
    x = torch.randn(2, 10, 8, requires_grad=True)
    commitment = make(commitment_weight=3.0, codebook_weight=0.0)
    output = commitment(x)
    output.loss.backward()
    assert x.grad.abs().sum() > 0
    assert commitment.embedding.weight.grad is None or not commitment.embedding.weight.grad.any()
    torch.testing.assert_close(output.loss, 3 * (x - output.quantized).square().mean())
    x.grad = None
    codebook = make(commitment_weight=0.0, codebook_weight=1.0)
    codebook(x).loss.backward()
    assert not x.grad.any() and codebook.embedding.weight.grad.any() and codebook.projection.weight.grad.any()


@pytest.mark.parametrize("loss_type", ["l2", slow("l1"), "cross_entropy"])
@pytest.mark.parametrize("assignment", ["sinkhorn", slow("sample"), "soft", slow("nearest")])
def test_training_moves_codes_and_features_closer(loss_type, assignment):
    quantizer = make(loss_type=loss_type, training_assignment=assignment)
    x = torch.randn(4, 32, 8).mul(0.3).requires_grad_()
    optimizer = torch.optim.Adam([x, *quantizer.parameters()], lr=0.02)
    losses = []
    for _ in range(60):
        loss = quantizer(x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_transport_uses_codes_that_nearest_leaves_dead():
    quantizer = make(codebook_size=256, num_heads=1)
    x = torch.randn(8, 256, 8) * 0.1
    sinkhorn, nearest = (quantizer(x, assignment=name) for name in ("sinkhorn", "nearest"))
    assert len(sinkhorn.codes.unique()) > 2 * len(nearest.codes.unique())
    assert sinkhorn.perplexity > 2 * nearest.perplexity


def test_soft_quantizes_to_the_average_of_codes_by_the_plan():
    quantizer = make(num_heads=1, epsilon=1e-3)  # next to no preference: every feature gets the mean of the codebook
    output = quantizer(torch.randn(2, 50, 8), assignment="soft")
    expected = quantizer.get_codebook().mean(0).expand(2, 50, 8)
    torch.testing.assert_close(output.quantized, expected, rtol=0, atol=1e-2)


def full_matrix_loss(features, codebook, codes):
    return torch.nn.functional.cross_entropy(-torch.cdist(features, codebook), codes)


def full_matrix_average(features, codebook, solution):
    scores = -solution.scale * torch.cdist(features, codebook).detach() + solution.potentials
    return scores.softmax(1) @ codebook


@pytest.mark.parametrize("kind", ["cross_entropy", "soft"])
def test_no_matrix_of_features_by_codes_is_kept_for_the_backward_pass(monkeypatch, kind):
    """Values and gradients are those of the full matrix, of which no more than a block is saved."""
    monkeypatch.setitem(distances.BLOCK_ELEMENTS, "cpu", 64 * 40)  # four blocks of 40 rows
    quantizer = make(loss_type="cross_entropy", num_heads=1)
    x = torch.randn(2, 80, 8, requires_grad=True)
    weight = torch.randn(2, 80, 8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        if kind == "soft":
            vectors, _, _ = quantizer._assign(x.detach().flatten(0, 1), quantizer.get_codebook(), "soft")
            found = (vectors * weight.flatten(0, 1)).sum()
        else:
            output = quantizer(x)
            found = output.loss
    assert max(saved) <= 160 * 8

    features, codebook = x.flatten(0, 1), quantizer.get_codebook()
    if kind == "soft":
        solution = sinkhorn_assign(
            features.detach(), codebook.detach(), epsilon=10.0, iterations=5, normalization="zscore"
        )
        expected = (full_matrix_average(features, codebook, solution) * weight.flatten(0, 1)).sum()
    else:
        expected = full_matrix_loss(features, codebook, output.codes.flatten())
    torch.testing.assert_close(found, expected)
    inputs = [quantizer.embedding.weight, *([] if kind == "soft" else [x])]
    for gradient, reference in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs)):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)


def test_warm_start_continues_from_the_step_before():
    cold, warm = make(iterations=2), make(iterations=2, warm_start=True)
    x = 3 * torch.randn(8, 8, 6, 6) + 1
    errors = {q: [q(x).diagnostics["marginal_error"].item() for _ in range(6)] for q in (cold, warm)}
    assert errors[cold][0] == errors[cold][5] and errors[warm][5] < 0.2 * errors[cold][5]
    assert sorted(errors[warm], reverse=True) == errors[warm]

    wide = make(iterations=2, warm_start=True, dim=256, codebook_size=128)
    for _ in range(4):  # potentials of hundreds
        assert wide(torch.randn(4, 256, 6, 6)).diagnostics["marginal_error"] < 2 and wide.potentials.isfinite().all()

    resumed = make(iterations=2, warm_start=True)
    resumed.load_state_dict(warm.state_dict())
    assert torch.equal(resumed.last_potentials, warm.last_potentials)
    assert resumed(x).diagnostics["marginal_error"] == warm(x).diagnostics["marginal_error"]
    # At inference nothing of the past enters.
    assert torch.equal(warm.eval()(x, assignment="sinkhorn").codes, cold.eval()(x, assignment="sinkhorn").codes)


def test_frozen_codebook_stays_and_features_still_learn():
    quantizer = make(freeze_codebook=True)
    before = quantizer.get_codebook().clone()
    x = torch.randn(2, 10, 8, requires_grad=True)
    quantizer(x).loss.backward()
    assert not any(p.requires_grad for p in quantizer.parameters()) and x.grad.any()
    assert torch.equal(quantizer.get_codebook(), before)


def test_perplexity_and_counts():
    quantizer = make(num_heads=1, use_projection=False)
    x = quantizer.lookup(torch.tensor([[[0], [0], [5], [5]]]))
    output = quantizer.eval()(x)
    torch.testing.assert_close(output.perplexity, torch.tensor(2.0))
    assert output.diagnostics["code_counts"].sum() == 4 and output.diagnostics["code_counts"][5] == 2
    without = quantizer(x, return_loss=False)
    assert without.loss is None and without.perplexity is None


# ---- running averages ------------------------------------------------------------------------------------------------


def test_running_averages_are_kept_in_training_only():
    quantizer = make()
    x = torch.randn(4, 8, 8, 8)
    quantizer.eval()(x, assignment="sinkhorn")
    assert quantizer.num_updates == 0 and not quantizer.potentials.any()
    quantizer.train()
    for _ in range(3):
        quantizer(x)
    assert quantizer.num_updates == 3
    # The same batch three times: the average is that batch's solution, and "potentials" repeats the transport's codes.
    sinkhorn, potentials = (quantizer.eval()(x, assignment=name).codes for name in ("sinkhorn", "potentials"))
    assert (sinkhorn == potentials).float().mean() > 0.99


def test_untrained_potentials_are_nearest():
    quantizer = make().eval()
    x = torch.randn(4, 8, 8, 8)
    assert torch.equal(quantizer(x, assignment="potentials").codes, quantizer(x, assignment="nearest").codes)


def test_the_average_forgets():
    quantizer = make()
    quantizer._update_averages(torch.arange(64.0), torch.tensor(2.0))
    assert quantizer.cost_scale == 2 and quantizer.potentials.mean() == 0
    for _ in range(1500):
        quantizer._update_averages(torch.zeros(64) + 9, torch.tensor(4.0))
    torch.testing.assert_close(quantizer.cost_scale, torch.tensor(4.0), rtol=1e-3, atol=0)
    assert quantizer.potentials.abs().max() < 0.1


@pytest.mark.parametrize("convert", [lambda q: q.half(), lambda q: q.to(torch.bfloat16), lambda q: q.double()])
def test_running_averages_stay_float32(convert):
    quantizer = make()
    quantizer._update_averages(torch.randn(64), torch.tensor(3.14159265))
    before = quantizer.potentials.clone()
    convert(quantizer)
    assert quantizer.potentials.dtype == quantizer.cost_scale.dtype == torch.float32
    assert torch.equal(quantizer.potentials, before) and quantizer.cost_scale == torch.tensor(3.14159265)
    assert quantizer.embedding.weight.dtype != torch.float32


# ---- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype):
    quantizer, x = make().to(dtype), torch.randn(2, 8, 4, 4, dtype=dtype)
    output = quantizer(x)
    assert output.quantized.dtype == dtype and quantizer.lookup(output.codes).dtype == dtype
    assert output.loss.dtype == torch.promote_types(dtype, torch.float32)
    output.loss.backward()


def test_autocast_changes_no_code():
    quantizer, x = make(num_heads=1).eval(), torch.randn(8, 8, 8, 8)
    plain = quantizer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = quantizer(x)
    assert torch.equal(plain.codes, autocast.codes) and torch.equal(plain.quantized, autocast.quantized)


def test_soft_is_float32_under_autocast():
    quantizer, x = make(), torch.randn(2, 8, 4, 4)
    plain = quantizer(x, assignment="soft").quantized
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer(x, assignment="soft").quantized, plain)


@pytest.mark.parametrize("loss_type", ["l2", "cross_entropy"])
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_an_empty_batch_changes_nothing(assignment, loss_type):
    quantizer = make(loss_type=loss_type)
    output = quantizer(torch.zeros(0, 8, 4, 4, requires_grad=True), assignment=assignment)
    output.loss.backward()
    assert output.loss == 0 and output.codes.shape == (0, 2, 4, 4) and quantizer.num_updates == 0


def test_results_can_be_viewed():
    output = make()(torch.randn(2, 8, 4, 4))
    assert output.quantized.view(-1).numel() == 256 and output.codes.view(-1).numel() == 64


def test_copies_and_pickles():
    quantizer = make()
    for twin in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert torch.equal(twin.get_codebook(), quantizer.get_codebook())


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 9}, "dim must be divisible by num_heads, got 9 and 2"),
        ({"loss_type": "ce"}, "loss_type.*'ce'"),
        ({"training_assignment": "potentials"}, "training_assignment.*'potentials'"),
        ({"inference_assignment": "soft"}, "inference_assignment.*'soft'"),
        ({"codebook_size": 0}, "codebook_size must be an integer of at least 1, got 0"),
        ({"epsilon": -1.0}, "epsilon.*-1.0"),
        ({"iterations": 2.5}, "iterations.*2.5"),
        ({"normalization": "minmax"}, "normalization.*'minmax'"),
        ({"balance": 7}, "balance.*7"),
        ({"codebook_weight": float("nan")}, "loss weights.*nan"),
    ],
)
def test_wrong_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_wrong_inputs():
    quantizer = make()
    with pytest.raises(ValueError, match=r"\(B, T, 8\) or \(B, 8, H, W\) or .*, got \(2, 9, 4, 4\)"):
        quantizer(torch.randn(2, 9, 4, 4))
    with pytest.raises(ValueError, match="assignment must be one of"):
        quantizer(torch.randn(2, 4, 8), assignment="best")
    with pytest.raises(ValueError, match="NaN or inf in features"):
        quantizer(torch.full((2, 4, 8), float("nan")))
    with pytest.raises(IndexError, match=r"\[0, 64\) or be -1, got values from 0 to 64"):
        quantizer.lookup(torch.tensor([[[0, 64]]]))
    with pytest.raises(IndexError, match="from -2 to 3"):
        quantizer.lookup(torch.tensor([[[-2, 3]]]))
    with pytest.raises(ValueError, match="with 2 heads"):
        quantizer.lookup(torch.zeros(1, 3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="codes must be integers, got torch.float32"):
        quantizer.lookup(torch.zeros(1, 3, 2))


# ---- codes as moving averages of their features ----------------------------------------------------------------------


def by_average(**arguments):
    return make(**{"use_projection": False, "codebook_update": "ema", **arguments})


def test_codes_become_the_moving_average_of_their_features():
    """Against the definition: each code's average over all steps, weighted by the decay; unused codes stay."""
    quantizer = by_average(ema_decay=0.8, training_assignment="nearest")
    start = quantizer.embedding.weight.clone()
    counts, sums = torch.zeros(64, dtype=torch.float64), torch.zeros(64, 4, dtype=torch.float64)
    for _ in range(4):
        x = torch.randn(2, 5, 8) * 0.3
        codes = quantizer(x).codes.flatten()
        chosen = torch.nn.functional.one_hot(codes, 64).double()
        counts = 0.8 * counts + 0.2 * chosen.sum(0)
        sums = 0.8 * sums + 0.2 * chosen.T @ x.reshape(-1, 4).double()
    used = counts > 0
    assert 0 < used.sum() < 64
    expected = (sums[used] / counts[used, None]).float()
    torch.testing.assert_close(quantizer.embedding.weight[used], expected)
    assert torch.equal(quantizer.embedding.weight[~used], start[~used])


def test_averages_move_codes_in_training_alone_and_leave_no_gradient():
    quantizer = by_average()
    before = quantizer.embedding.weight.clone()
    x = torch.randn(4, 8, 5, 5, requires_grad=True)
    quantizer.eval()(x)
    assert torch.equal(quantizer.embedding.weight, before)
    output = quantizer.train()(x)
    assert torch.equal(
        output.quantized, before[output.codes].movedim(1, 3).flatten(-2).movedim(-1, 1)
    )  # the codes before the step
    (output.quantized.sum() + output.loss).backward()
    assert x.grad.isfinite().all() and not list(quantizer.parameters())[0].requires_grad
    assert not torch.equal(quantizer.embedding.weight, before)


def test_averages_follow_features_that_move_away():
    quantizer = by_average(ema_decay=0.9)
    for _ in range(60):
        output = quantizer(torch.randn(4, 64, 8) * 0.1 + 7)
    assert (quantizer.embedding.weight.mean() - 7).abs() < 0.05 and output.perplexity > 50
    assert quantizer.eval()(torch.randn(4, 64, 8) * 0.1 + 7).perplexity > 40


def test_a_code_unused_for_very_long_stays():
    quantizer = by_average(codebook_size=8, training_assignment="nearest", ema_decay=0.5)
    quantizer(quantizer.lookup(torch.arange(8).reshape(1, 4, 2)) + 0.01)
    before = quantizer.embedding.weight.clone()
    for _ in range(400):  # the averages of the other codes underflow
        quantizer(quantizer.lookup(torch.zeros(1, 4, 2, dtype=torch.long)))
    assert torch.equal(quantizer.embedding.weight[1:], before[1:])


def test_wrong_average():
    with pytest.raises(ValueError, match="it needs use_projection=False"):
        OptVQQuantizer(codebook_update="ema")
    with pytest.raises(ValueError, match="ema_decay must lie in"):
        by_average(ema_decay=1.0)
    with pytest.raises(ValueError, match="codebook_update must be one of"):
        by_average(codebook_update="adam")
    frozen = by_average(freeze_codebook=True)
    before = frozen.embedding.weight.clone()
    frozen(torch.randn(2, 5, 8))
    assert torch.equal(frozen.embedding.weight, before)


def test_bypass_is_of_training_alone():
    quantizer = make()
    quantizer.bypass = True
    x = torch.randn(2, 5, 8)
    assert torch.equal(quantizer(x).quantized, x) and not torch.equal(quantizer.eval()(x).quantized, x)
