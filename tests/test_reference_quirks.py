"""Defects of the original that no other test meets; docs/reference.md lists them all, with the test of each."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist

from optvq_hf import OptVQConfig, OptVQModel, OptVQQuantizer
from optvq_hf.sinkhorn import sinkhorn_assign, sinkhorn_plan
from optvq_hf.training.optimization import make_optimizer
from reference import PAPER, exact_iteration, margins, points


def small_model():
    torch.manual_seed(0)
    return OptVQModel(OptVQConfig(backbone="plain_cnn", image_size=32, codebook_size=64, codebook_dim=8))


@pytest.mark.parametrize("constant", [10.4, 1e3, -1e3])
def test_large_costs_do_not_empty_the_plan(constant):
    """The original's kernel is all zeros for [[0, 1], [1, 0]] + 10.4, and infinite for large negative costs."""
    cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    settings = {"epsilon": 10.0, "iterations": 5, "normalization": "none"}
    plan = sinkhorn_plan(cost + constant, **settings)
    torch.testing.assert_close(plan, sinkhorn_plan(cost, **settings), rtol=1e-2, atol=1e-6)
    assert plan.argmax(1).tolist() == [0, 1]


def test_nearest_codes_quantize_best():
    features, codebook = points(1024, 256, 16)
    errors = {}
    for assignment in ("nearest", "sinkhorn"):
        quantizer = OptVQQuantizer(codebook_size=256, dim=16, use_projection=False, inference_assignment=assignment)
        quantizer.embedding.weight.data.copy_(codebook)
        with torch.no_grad():
            errors[assignment] = (quantizer.eval()(features[None]).quantized - features).square().mean().item()
    assert errors["nearest"] < errors["sinkhorn"]


def test_nothing_is_drawn_at_inference():
    quantizer = OptVQQuantizer(codebook_size=64, dim=8, training_assignment="sample").eval()
    x = torch.randn(4, 32, 8)
    assert torch.equal(quantizer(x).codes, quantizer(x).codes)
    assert torch.equal(quantizer(x, assignment="sinkhorn").codes, quantizer(x, assignment="sinkhorn").codes)


@pytest.mark.parametrize("assignment", ["sinkhorn", "sample", "nearest"])
def test_one_feature_and_cross_entropy(assignment):
    quantizer = OptVQQuantizer(codebook_size=16, dim=8, loss_type="cross_entropy", training_assignment=assignment)
    output = quantizer(torch.randn(1, 1, 8))
    assert output.codes.shape == (1, 1, 1) and output.loss.isfinite()


def test_codes_and_features_of_any_layout():
    """Maps that are not square, sequences, and tensors that are not contiguous."""
    quantizer = OptVQQuantizer(codebook_size=64, dim=8, num_heads=2).eval()
    x = torch.randn(8, 10, 3).permute(2, 1, 0)  # (B, T, C), a view
    output = quantizer(x)
    assert torch.equal(output.codes, quantizer(x.contiguous()).codes)
    turned = output.codes.transpose(0, 1).contiguous().transpose(0, 1)
    assert not turned.is_contiguous() and torch.equal(quantizer.lookup(turned), output.quantized)
    image = torch.randn(2, 8, 6, 4).to(memory_format=torch.channels_last)
    output = quantizer(image)
    assert output.codes.shape == (2, 2, 6, 4) and torch.equal(quantizer.lookup(output.codes), output.quantized)


def test_models_are_copied_and_pickled():
    model = small_model()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), model.state_dict().values()))


def test_a_model_carries_no_training_objective():
    with torch.device("meta"):
        model = OptVQModel(OptVQConfig())
    assert {name.partition(".")[0] for name in model.state_dict()} == {
        "encoder", "decoder", "quantizer", "quant_conv", "post_quant_conv"
    }  # fmt: skip


def test_an_image_is_encoded_once():
    model, calls = small_model().train(), []
    for name in ("encoder", "quantizer", "decoder"):
        getattr(model, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    model(torch.rand(2, 3, 32, 32) * 2 - 1)
    assert calls == ["encoder", "quantizer", "decoder"]


def test_betas_reach_the_optimizer():
    optimizer = make_optimizer(small_model(), 1e-3, 0.05, beta2=0.97)
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.97)] * 2


def test_the_paper_loss_is_the_default():
    assert (
        OptVQConfig().codebook_loss_type == "l2"
        and OptVQConfig(training_assignment="nearest").codebook_loss_type == "l2"
    )
    quantizer = OptVQQuantizer(training_assignment="nearest")
    assert (quantizer.loss_type, quantizer.commitment_weight, quantizer.codebook_weight) == ("l2", 1.0, 0.25)


def test_one_process_needs_no_process_group(trained_folder):
    assert (trained_folder / "model.safetensors").exists() and not dist.is_initialized()
    assert small_model().train()(torch.zeros(1, 3, 32, 32)).loss.isfinite()


def test_a_far_feature_leaves_the_others_alone():
    """Its row of the original's kernel underflows, which sends it to code 0; here it gets its most likely code."""
    features, codebook = points(512, 64, 8)
    features[7] *= 30
    log_plan = exact_iteration(torch.cdist(features.double(), codebook.double()), **PAPER)
    codes = sinkhorn_assign(features, codebook, **PAPER).codes
    assert codes[7] == log_plan[7].argmax() != 0
    decided = margins(log_plan) > 1e-3
    assert torch.equal(codes[decided], log_plan.argmax(1)[decided])
