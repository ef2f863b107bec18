"""How gradients pass the quantizer, beside their formulas."""

import pytest
import torch
from torch.nn import functional as F

from optvq_hf import OptVQQuantizer, ResidualOptVQQuantizer
from optvq_hf.gradients_optvq import rotated


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
