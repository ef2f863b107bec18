"""How gradients pass the quantizer, beside their formulas."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from optvq_hf import OptVQQuantizer, ResidualOptVQQuantizer
from optvq_hf.costs import COSTS
from optvq_hf.gradients_optvq import LOSS_TYPES, MAX_STRETCH, rotated


def rotation(feature, vector):
    """lambda R of Fifty et al. (2024), section 4, as a matrix in float64."""
    feature, vector = feature.double(), vector.double()
    e, q = feature / feature.norm(), vector / vector.norm()
    r = (e + q) / (e + q).norm()
    matrix = torch.eye(len(e), dtype=torch.float64) - 2 * torch.outer(r, r) + 2 * torch.outer(q, e)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(e), dtype=torch.float64))  # a rotation
    torch.testing.assert_close(matrix.det(), torch.ones((), dtype=torch.float64))
    return vector.norm() / feature.norm() * matrix


def test_the_jacobian_is_the_rotation_that_takes_features_to_their_codes():
    torch.manual_seed(0)
    features, vectors = torch.randn(5, 6), torch.randn(5, 6)
    features[1], vectors[2] = 1e-3 * features[1], 30 * features[2]  # short; the same direction
    torch.testing.assert_close(rotated(features, vectors), vectors)
    jacobian = torch.autograd.functional.jacobian(lambda x: rotated(x, vectors), features)
    for n in range(5):
        torch.testing.assert_close(jacobian[n, :, n].double(), rotation(features[n], vectors[n]), rtol=1e-5, atol=1e-5)
        assert not jacobian[n, :, [m for m in range(5) if m != n]].any()


@pytest.mark.parametrize("shape", [(40, 8), (2, 8, 3, 4), (2, 5, 8)])
def test_the_gradient_of_the_quantizer_is_rotated_head_by_head(shape):
    torch.manual_seed(0)
    quantizer = OptVQQuantizer(codebook_size=16, dim=8, num_heads=2, gradient_estimator="rotation")
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(shape)
    mask = torch.rand((*shape[:1], *shape[2:]) if len(shape) == 4 else shape[:-1]) < 0.8
    output = quantizer(x, mask=mask)
    assert torch.equal(output.quantized, quantizer.lookup(output.codes))
    (output.quantized * weight).sum().backward()
    axis = 1 if len(shape) == 4 else -1
    features, vectors, upstream, gradients = (
        t.detach().movedim(axis, -1)[mask].reshape(-1, 4) for t in (x, output.quantized, weight, x.grad)
    )
    for feature, vector, above, gradient in zip(features, vectors, upstream, gradients):
        expected = rotation(feature, vector).T @ above.double()
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-5)
    assert not x.grad.movedim(axis, -1)[~mask].any()


def test_the_angle_to_the_gradient_is_kept():
    """What the paper asks for: the gradient is at the same angle to the feature as to its code."""
    torch.manual_seed(0)
    features, vectors, above = (torch.randn(20, 6) for _ in range(3))
    features.requires_grad_()
    (rotated(features, vectors) * above).sum().backward()
    of_codes = F.cosine_similarity(vectors, above)
    torch.testing.assert_close(F.cosine_similarity(features, features.grad), of_codes, rtol=1e-4, atol=1e-5)


def test_features_without_a_direction():
    features = torch.zeros(3, 4, requires_grad=True)
    vectors, above = torch.randn(3, 4), torch.randn(3, 4)
    (rotated(features, vectors) * above).sum().backward()
    assert torch.equal(features.grad, above)
    opposite = torch.randn(3, 4, requires_grad=True)
    turned = rotated(opposite, -2 * opposite.detach())
    torch.testing.assert_close(turned, -2 * opposite.detach())
    turned.sum().backward()
    assert opposite.grad.isfinite().all()


@pytest.mark.parametrize("factor", [-3.0, -0.7])
def test_opposite_directions_are_a_half_turn(factor):
    """A rotation, to the sixth digit, although the sum of both directions is rounding alone."""
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    features[0] = torch.eye(6)[2]
    jacobian = torch.autograd.functional.jacobian(lambda x: rotated(x, factor * features), features)
    for n in range(50):
        matrix = jacobian[n, :, n].double() / abs(factor)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-5)
        torch.testing.assert_close(matrix.det().item(), 1.0, rtol=0, atol=1e-5)
        torch.testing.assert_close(matrix @ features[n].double(), -features[n].double(), rtol=0, atol=1e-5)
    assert torch.equal(rotated(torch.ones(1, 1), -torch.ones(1, 1)), -torch.ones(1, 1))  # one entry: nothing to turn in


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("length", [0.1, 1e-6, 1e-20, 1e-25, 1e-37, 1e-44])
def test_short_features_have_directions_and_bounded_gradients(length, dtype):
    quantizer = OptVQQuantizer(codebook_size=16, dim=8, gradient_estimator="rotation").eval()
    x = (length * torch.randn(50, 8, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()
    output = quantizer(x)
    output.quantized.sum().backward()
    assert torch.equal(output.quantized, quantizer.lookup(output.codes).to(dtype)) and x.grad.isfinite().all()
    stretch = x.grad.float().norm(dim=1) / 8**0.5  # the gradient of `quantized` is of this length
    assert (stretch <= 1.01 * MAX_STRETCH).all()
    if 1e-37 <= length <= 1e-6 and x.any(dim=1).all() and dtype != torch.float16:
        torch.testing.assert_close(stretch, torch.full_like(stretch, MAX_STRETCH), rtol=0.02, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_levels_are_rotated_as_a_whole(dtype):
    torch.manual_seed(0)
    quantizer = ResidualOptVQQuantizer(3, 16, dim=4, gradient_estimator="rotation")
    x, above = torch.randn(30, 4).to(dtype).requires_grad_(), torch.randn(30, 4).to(dtype)
    output = quantizer(x)
    (output.quantized * above).sum().backward()
    total = quantizer.lookup(output.codes)
    assert torch.equal(output.quantized, total.to(dtype))
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    for n in range(30):
        expected = rotation(x[n].detach(), total[n].detach()).T @ above[n].double()
        torch.testing.assert_close(x.grad[n].double(), expected, **tolerance)


@pytest.mark.parametrize("cost", ["squared_euclidean", "cosine"])
@pytest.mark.parametrize("assignment", ["sinkhorn", "nearest", "sample", "soft", "potentials"])
def test_every_assignment_by_every_cost(cost, assignment):
    torch.manual_seed(0)
    quantizer = OptVQQuantizer(codebook_size=32, dim=8, cost=cost, loss_type="cross_entropy")
    x = torch.randn(200, 8, requires_grad=True)
    quantizer(x)
    output = quantizer(x, assignment=assignment)
    output.loss.backward()
    assert x.grad.isfinite().all() and quantizer.embedding.weight.grad.any()
    codebook, with_gradient = quantizer.get_codebook().detach().double(), x.detach().double()
    if cost == "cosine":
        costs = 1 - F.normalize(with_gradient, dim=1) @ F.normalize(codebook, dim=1).T
    else:
        costs = torch.cdist(with_gradient, codebook).square()
    torch.testing.assert_close(output.loss.double(), F.cross_entropy(-costs, output.codes[:, 0]), rtol=1e-5, atol=1e-5)
    if assignment == "nearest":
        assert torch.equal(output.codes[:, 0], costs.argmin(dim=1))
    if assignment == "soft":
        diagnostics = output.diagnostics
        plan = (diagnostics["potentials"].double() - diagnostics["scale"].double() * costs).softmax(dim=1)
        torch.testing.assert_close(output.quantized.double(), plan @ codebook, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("num_quantizers", [1, 2])
def test_losses_of_an_ema_codebook_are_of_the_codes_before_their_update(cost, loss_type, num_quantizers):
    torch.manual_seed(0)
    ema = {"codebook_update": "ema", "use_projection": False}
    quantizer = ResidualOptVQQuantizer(num_quantizers, 16, dim=8, cost=cost, loss_type=loss_type, **ema)
    fixed, gradients = copy.deepcopy(quantizer), []
    fixed.defer_updates = True
    for module in (quantizer, fixed):
        x = torch.randn(100, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        module(x).loss.backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients) and gradients[0].any()
    assert not torch.equal(quantizer.get_codebook(), fixed.get_codebook())


def test_vectors_without_a_direction_get_no_gradient_from_cosines():
    """Of the features or of the codes; short ones have a direction."""
    torch.manual_seed(0)
    quantizer = OptVQQuantizer(16, 8, cost="cosine", loss_type="cross_entropy", use_projection=False)
    quantizer.embedding.weight.data[3] = 0
    x, losses = torch.randn(50, 8), []
    for factor in (1.0, 1e-25, 0.0, 1e-44):
        features = (factor * x).requires_grad_()
        quantizer.zero_grad()
        loss = quantizer(features, assignment="nearest").loss
        loss.backward()
        losses.append(loss.item())
        gradient = quantizer.embedding.weight.grad
        assert features.grad.isfinite().all() and gradient.isfinite().all() and not gradient[3].any()
        assert features.grad.any() == (factor >= 1e-25)
    assert losses[0] == pytest.approx(losses[1]) and losses[2] == pytest.approx(math.log(16))


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("num_quantizers", [1, 3])
@pytest.mark.parametrize("of_module", [torch.float32, torch.float64])
def test_float64_on_one_side(cost, num_quantizers, of_module):
    """The work is done in float64, and codes and lookup invert bit for bit."""
    torch.manual_seed(0)
    quantizer = ResidualOptVQQuantizer(num_quantizers, 16, dim=8, cost=cost, loss_type="cross_entropy").to(of_module)
    dtype = torch.float64 if of_module == torch.float32 else torch.float32
    x = torch.randn(100, 8, dtype=dtype, requires_grad=True)
    for assignment in ("sinkhorn", "nearest", "sample", "soft", "potentials"):
        output = quantizer(x, assignment=assignment)
        assert output.loss.dtype == torch.float64 and output.quantized.dtype == dtype
        (output.loss + output.quantized.sum()).backward()
        assert x.grad.isfinite().all() and x.grad.dtype == dtype
        if assignment != "soft":
            assert torch.equal(output.quantized, quantizer.lookup(output.codes).to(dtype))
