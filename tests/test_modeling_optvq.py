import json

import pytest
import torch

from builders import make_untrained as make
from builders import pixels, plain_config, vqgan_config
from grids import slow
from optvq_hf import OptVQConfig, OptVQModel


@pytest.mark.parametrize("config", [plain_config(), vqgan_config()], ids=["plain_cnn", "vqgan"])
@pytest.mark.parametrize("size", [(32, 32), (64, 32), (8, 40)])
def test_shapes(config, size):
    model, x = make(config), pixels(3, 3, *size)
    grid = tuple(n // config.downsample_factor for n in size)
    encoded = model.encode(x)
    assert encoded.codes.shape == (3, config.num_codebook_heads, *grid) and encoded.codes.dtype == torch.int64
    assert encoded.quantized.shape == encoded.latents.shape == (3, config.codebook_dim, *grid)
    assert encoded.quantizer_loss.ndim == 0 and 1 <= encoded.perplexity <= config.codebook_size
    output = model(x)
    assert output.reconstruction.shape == x.shape
    assert torch.equal(output.reconstruction, model.decode(codes=encoded.codes).reconstruction)
    assert torch.equal(output.reconstruction, model.decode(quantized=encoded.quantized).reconstruction)
    assert model.get_codebook().shape == (config.codebook_size, config.head_dim)


def test_loss_and_perplexity_in_training_or_when_asked_for():
    model, x = make(), pixels(2, 3, 32, 32)
    assert model(x).loss is None and model(x).perplexity is None
    assert model(x)[0] is not None and model(x)[0].shape == (2, 8, 8, 8)  # output[0] is the quantized latent
    assert model(x, return_loss=True).loss.ndim == 0
    assert model.train()(x).loss.ndim == 0 and model(x).perplexity.ndim == 0
    assert model(x, return_loss=False).loss is None
    assert isinstance(model(x, return_dict=False), tuple)


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_that_of_pixels_and_quantizer(training):
    model, x = make(plain_config(inference_assignment="sinkhorn")).train(training), pixels(2, 3, 32, 32)
    output = model(x, return_loss=True)
    difference = output.reconstruction - x
    expected = difference.abs().mean() + difference.square().mean() + output.quantizer_loss
    torch.testing.assert_close(output.loss, expected)
    assert output.code_counts.sum() == output.codes.numel() and output.code_counts.shape == (128,)
    assert 0 <= output.marginal_error <= 2
    encoded = model.eval().encode(x)
    assert 0 <= encoded.marginal_error <= 2 and not hasattr(encoded, "loss")
    assert torch.equal(encoded.code_counts, encoded.codes.flatten().bincount(minlength=128))
    assert model.encode(x, assignment="nearest").marginal_error is None
    without = model.encode(x, return_loss=False)
    belonging = ("quantizer_loss", "perplexity", "code_counts", "marginal_error")
    assert all(getattr(without, name) is None for name in belonging)


def test_assignments_are_selectable():
    model, x = make(plain_config(inference_assignment="sinkhorn")), pixels(4, 3, 32, 32)
    default, sinkhorn, nearest = (model.encode(x, assignment=name).codes for name in (None, "sinkhorn", "nearest"))
    assert torch.equal(default, sinkhorn) and not torch.equal(sinkhorn, nearest)
    assert torch.equal(model(x, assignment="nearest").codes, nearest)
    with pytest.raises(TypeError, match="assigment"):
        model(x, assigment="nearest")


@pytest.mark.parametrize(
    ("structure", "fields"), [("f16_h4", {}), ("f16_h8", {"num_codebook_heads": 8})], ids=["4 heads", "8 heads"]
)
def test_the_default_vqgan_has_the_parameters_of_the_original(golden, structure, fields):
    reference = json.loads((golden / f"structure_imagenet_{structure}.json").read_text())
    with torch.device("meta"):
        model = OptVQModel(OptVQConfig(**fields))
    counts = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
    expected = reference["param_counts"]
    assert counts["encoder"] == expected["encoder"] and counts["decoder"] == expected["decoder"]
    assert counts["quantizer"] == expected["quantize"] and counts["quant_conv"] == expected["quant_conv"]
    assert sum(counts.values()) == expected["total"]
    assert sorted(p.shape for p in model.parameters()) == sorted(
        torch.Size(entry["shape"]) for entry in reference["state_dict"].values()
    )


@pytest.mark.parametrize("config", [plain_config(), vqgan_config(dropout=0.0)], ids=["plain_cnn", "vqgan"])
def test_every_parameter_gets_a_gradient(config):
    model, x = make(config).train(), pixels(4, 3, 32, 32)
    output = model(x)
    output.loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("config", [plain_config(), vqgan_config()], ids=["plain_cnn", "vqgan"])
def test_dtypes(config, dtype):
    model = make(config).to(dtype)
    output = model(pixels(2, 3, 32, 32))
    assert output.reconstruction.dtype == output.quantized.dtype == dtype
    assert model.quantizer.potentials.dtype == torch.float32
    model.train()(pixels(2, 3, 32, 32)).reconstruction.sum().backward()


# ---- tokens do not depend on the batch -------------------------------------------------------------------------------


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("assignment", ["nearest", "potentials"])
@pytest.mark.parametrize("number", [40, slow(1000)])
@torch.no_grad()
def test_codes_do_not_depend_on_the_batch(assignment, number, threads, trained_model, test_pixels):
    """Images one by one, by 7, by 64, and shuffled: the latents, and so the codes, are the same to the last bit."""
    assert len(test_pixels) == 1000
    test_pixels = test_pixels[:number]
    latents, codes = encode_by(trained_model, test_pixels, 64, assignment)
    order = torch.randperm(number, generator=torch.Generator().manual_seed(0))
    for size, images in ((1, slice(None)), (7, slice(None)), (64, order)):
        same_latents, same_codes = encode_by(trained_model, test_pixels[images], size, assignment)
        assert torch.equal(same_codes, codes[images]) and torch.equal(same_latents, latents[images])


def encode_by(model, images, size, assignment):
    outputs = [model.encode(part, assignment=assignment) for part in images.split(size)]
    return torch.cat([output.latents for output in outputs]), torch.cat([output.codes for output in outputs])


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 1, 32, 32), r"pixel_values must be \(B, 3, H, W\).*num_channels=3.*got \(2, 1, 32, 32\)"),
        (torch.zeros(3, 32, 32), r"pixel_values must be \(B, 3, H, W\)"),
        (torch.zeros(2, 3, 30, 32), "divisible by the downsampling factor 4, got 30 x 32"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "must be floats.*torch.uint8"),
        (torch.full((2, 3, 32, 32), float("nan")), "NaN or inf in pixel_values"),
    ],
)
def test_wrong_pixels(images, message):
    with pytest.raises(ValueError, match=message):
        make().encode(images)


def test_wrong_codes():
    model = make()
    codes = torch.zeros(1, 2, 8, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="exactly one of quantized and codes, got neither"):
        model.decode()
    with pytest.raises(ValueError, match="exactly one of quantized and codes, got both"):
        model.decode(quantized=torch.zeros(1, 8, 8, 8), codes=codes)
    with pytest.raises(IndexError, match=r"codes must lie in \[0, 128\), got values from 0 to 128"):
        model.decode(codes=codes.index_fill(3, torch.tensor([0]), 128))
    with pytest.raises(ValueError, match="with 2 heads"):
        model.decode(codes=codes[:, :1])
    with pytest.raises(ValueError, match="4 dimensions"):
        model.decode(codes=codes[0])
    with pytest.raises(ValueError, match="by keyword"):
        model.decode(codes)
