"""The table for those who come from vector-quantize-pytorch: its names are there, and what it calls the same is the same."""

import copy
import inspect
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from optvq_hf import OptVQQuantizer, ResidualOptVQQuantizer
from optvq_hf.training import codebook as codebook_module


theirs = pytest.importorskip("vector_quantize_pytorch")

PAGE = (Path(__file__).parents[2] / "docs" / "quantizer.md").read_text()
TABLE = re.findall(r"^\| (.*?) \| (.*?) \|$", PAGE.split("| theirs | ours |")[1], re.MULTILINE)[1:]


def parameters(*functions):
    return {name for function in functions for name in inspect.signature(function).parameters}


def names(cell):
    return set(re.findall(r"`([a-z_]+)(?:=[^`]*)?`", cell))


@pytest.mark.parametrize(("left", "right"), TABLE, ids=lambda cell: cell[:30])
def test_the_names_of_a_row_exist(left, right):
    kinds = (theirs.VectorQuantize, theirs.ResidualVQ, theirs.GroupedResidualVQ)
    assert names(left) and names(left) <= parameters(*kinds, *(kind.forward for kind in kinds))
    ours = parameters(OptVQQuantizer, ResidualOptVQQuantizer, OptVQQuantizer.forward)
    assert names(right) - {"set_codebook"} <= ours and hasattr(codebook_module, "set_codebook")


def pair(their_settings, our_settings, kind=OptVQQuantizer):
    """Both with the same codes, nearest assignment, and gradients of the loss for features and codes alike."""
    torch.manual_seed(0)
    their_kind = theirs.VectorQuantize if kind is OptVQQuantizer else theirs.ResidualVQ
    learns = {"learnable_codebook": True, "ema_update": False, "rotation_trick": False}
    one = their_kind(dim=8, codebook_size=32, **{**learns, **their_settings})
    settings = {"use_projection": False, "training_assignment": "nearest", "codebook_weight": 1.0, **our_settings}
    other = kind(codebook_size=32, dim=8, **settings)
    their_levels = [one] if kind is OptVQQuantizer else one.layers
    for level, their_level in zip(other.levels, their_levels, strict=True):
        level.embedding.weight.data.copy_(their_level._codebook.embed[0].detach())
    return one, other


@pytest.mark.parametrize(
    ("their_settings", "our_settings"),
    [
        ({}, {}),
        ({"commitment_weight": 3.0}, {"commitment_weight": 3.0, "codebook_weight": 3.0}),
        ({"rotation_trick": True}, {"gradient_estimator": "rotation"}),
        ({"heads": 2, "codebook_dim": 4}, {"num_heads": 2}),
    ],
    ids=str,
)
def test_codes_gradients_and_lookup_are_the_same(their_settings, our_settings):
    one, other = pair(their_settings, our_settings)
    above, gradients = torch.randn(3, 20, 8), []
    for quantizer in (one, other):
        x = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        output = quantizer(x)
        (output[0] * above).sum().backward()
        gradients.append(x.grad)
    codes = one(x)[1].view(3, 20, -1)
    assert torch.equal(codes, other(x).codes)
    torch.testing.assert_close(one(x)[0], other(x).quantized)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
    looked_up = one.get_output_from_indices(codes if "heads" in their_settings else codes[..., 0])
    torch.testing.assert_close(looked_up.reshape(3, 20, 8), other.lookup(codes))
    of_loss = []
    for quantizer in (one, other):
        x = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        quantizer.zero_grad()
        quantizer(x)[2].sum().backward()
        of_loss.append(x.grad)
    torch.testing.assert_close(*of_loss)
    torch.testing.assert_close(one._codebook.embed.grad[0], other.embedding.weight.grad)


def test_cosine_codes_of_unit_vectors_are_the_same():
    fixed = {"learnable_codebook": False, "freeze_codebook": True}
    one, other = pair({"use_cosine_sim": True, **fixed}, {"cost": "cosine"})
    x = torch.randn(3, 20, 8)
    quantized, codes, _ = one(x)
    assert torch.equal(codes[..., None], other(x).codes)
    torch.testing.assert_close(quantized, other(F.normalize(x, dim=-1)).quantized)


def test_residual_codes_are_the_same():
    one, other = pair({"num_quantizers": 3}, {"num_quantizers": 3}, ResidualOptVQQuantizer)
    x = torch.randn(3, 20, 8)
    quantized, codes, losses = one(x)
    output = other(x)
    assert torch.equal(codes, output.codes)
    torch.testing.assert_close(quantized, output.quantized)
    torch.testing.assert_close(2 * losses.sum(), output.loss)  # ours has one term for features, and one for codes
    first = F.pad(codes[..., :2], (0, 1), value=-1)  # theirs marks levels that are not there
    torch.testing.assert_close(one.get_output_from_indices(first), other.lookup(codes[..., :2]))


def gradients_of(one, other):
    """Of the input, from the same gradient of the output."""
    above, gradients = torch.randn(3, 20, 8), []
    for quantizer in (one, other):
        x = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        (quantizer(x)[0] * above).sum().backward()
        gradients.append(x.grad)
    return gradients


@pytest.mark.parametrize("number", [1, 3])
def test_their_residual_gradients_are_a_multiple(number):
    one, other = pair({"num_quantizers": number}, {"num_quantizers": number}, ResidualOptVQQuantizer)
    per_level, once = gradients_of(one, other)
    torch.testing.assert_close(per_level, number * once)


@pytest.mark.parametrize("number", [1, 3])
def test_levels_are_rotated_one_by_one_or_as_a_sum(number):
    ours = {"num_quantizers": number, "gradient_estimator": "rotation"}
    one, other = pair({"num_quantizers": number, "rotation_trick": True}, ours, ResidualOptVQQuantizer)
    assert torch.allclose(*gradients_of(one, other), rtol=1e-3, atol=1e-4) == (number == 1)
    assert theirs.VectorQuantize(dim=8, codebook_size=4).rotation_trick
    assert OptVQQuantizer(4, 8).gradient_estimator != "rotation"


def test_only_their_cross_entropy_has_a_weight():
    weighted = {"commitment_use_cross_entropy_loss": True, "commitment_weight": 3.0}
    one, other = pair(weighted, {"loss_type": "cross_entropy", "commitment_weight": 3.0})
    x = torch.randn(3, 20, 8)
    torch.testing.assert_close(one(x)[2].squeeze(), 3 * other(x).loss)


AVERAGES = {"learnable_codebook": False, "ema_update": True}


def test_averages_are_the_same_from_one_feature_per_code():
    one, other = pair({**AVERAGES, "decay": 0.9}, {"codebook_update": "ema", "ema_decay": 0.9})
    empty = copy.deepcopy(other)
    codebook_module.set_codebook(other, one._codebook.embed[0])
    for step in range(3):
        x = torch.randn(3, 20, 8)
        assert torch.equal(one(x)[1][..., None], other(x).codes)
        torch.testing.assert_close(one._codebook.embed[0], other.embedding.weight, rtol=1e-3, atol=1e-4)
        if step == 0:
            codes = empty(x).codes.flatten()
            torch.testing.assert_close(empty.embedding.weight[codes[0]], x.view(-1, 8)[codes == codes[0]].mean(dim=0))


def test_averages_of_a_shared_codebook_decay_for_each_level_or_once():
    settings = {"num_quantizers": 2, "codebook_update": "ema", "ema_decay": 0.5, "share_codebook": True}
    one, other = pair(
        {**AVERAGES, "num_quantizers": 2, "decay": 0.5, "shared_codebook": True}, settings, ResidualOptVQQuantizer
    )
    codebook_module.set_codebook(other.levels[0], one.layers[0]._codebook.embed[0].clone())
    x = torch.randn(3, 20, 8)
    output = other(x)
    quantized, codes, _ = one(x)
    assert torch.equal(codes, output.codes)
    torch.testing.assert_close(quantized, output.quantized)
    first, second = (part.flatten().bincount(minlength=32) for part in codes.unbind(-1))
    torch.testing.assert_close(one.layers[0]._codebook.cluster_size[0], 0.5 * (0.5 + 0.5 * first) + 0.5 * second)
    torch.testing.assert_close(other.levels[0].ema_counts, 0.5 + 0.5 * (first + second))


def test_masks_lengths_and_layouts_are_the_same():
    one, other = pair({}, {})
    x, lengths = torch.randn(3, 20, 8), torch.tensor([20, 7, 1])
    mask = torch.arange(20) < lengths[:, None]
    by_mask, by_lengths = one(x, mask=mask), one(x, lens=lengths)
    output = other(x, mask=mask)
    assert torch.equal(by_mask[1], by_lengths[1]) and torch.equal(by_mask[1][..., None], output.codes)
    torch.testing.assert_close(by_mask[0], output.quantized)
    one, other = pair({"channel_last": False}, {"channels_first": True})
    assert torch.equal(one(x.mT)[1][:, None], other(x.mT).codes)


def test_images_need_no_flag():
    one, other = pair({"accept_image_fmap": True}, {})
    x = torch.randn(2, 8, 4, 5)
    quantized, codes, _ = one(x)
    assert torch.equal(codes[:, None], other(x).codes)
    torch.testing.assert_close(quantized, other(x).quantized)
