import copy
import json
import pickle

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

import builders
from builders import make_untrained as make
from builders import pixels, plain_config, vqgan_config
from grids import slow
from optvq_hf import OptVQConfig, OptVQModel, OptVQQuantizer
from optvq_hf.configuration_optvq import CHANGEABLE_FIELDS


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
@pytest.mark.parametrize("number", [40, slow(400)])
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


# ---- one truth -------------------------------------------------------------------------------------------------------

# Field of the configuration, attribute of the quantizer, a value that is not the default.
CHANGES = [
    ("training_assignment", "training_assignment", "nearest"),
    ("inference_assignment", "inference_assignment", "sinkhorn"),
    ("sinkhorn_epsilon", "epsilon", 40.0),
    ("sinkhorn_iterations", "iterations", 2),
    ("sinkhorn_balance", "balance", 0.5),
    ("sinkhorn_warm_start", "warm_start", True),
    ("cost", "cost", "cosine"),
    ("cost_normalization", "normalization", "none"),
    ("gradient_estimator", "gradient_estimator", "rotation"),
    ("codebook_ema_decay", "ema_decay", 0.5),
    ("codebook_loss_type", "loss_type", "l1"),
    ("commitment_loss_weight", "commitment_weight", 2.0),
    ("codebook_loss_weight", "codebook_weight", 0.5),
]


@pytest.mark.parametrize(("field", "attribute", "value"), CHANGES)
def test_configuration_and_quantizer_hold_one_value(field, attribute, value, tmp_path):
    for holder, name in (("config", field), ("quantizer", attribute)):
        model = make()
        assert getattr(model.config, field) != value
        setattr(getattr(model, holder), name, value)
        assert getattr(model.config, field) == getattr(model.quantizer, attribute) == value
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert copied.quantizer.config is copied.config is not model.config
            assert getattr(copied.quantizer, attribute) == value
        model.save_pretrained(tmp_path)
        again = OptVQModel.from_pretrained(tmp_path)
        assert getattr(again.config, field) == getattr(again.quantizer, attribute) == value


def test_a_replaced_configuration_or_quantizer_is_the_one_that_is_read(tmp_path):
    model, x = builders.make(), pixels(3, 3, 32, 32)
    model.config = copy.deepcopy(model.config)
    model.config.sinkhorn_epsilon, model.config.inference_assignment = 99.0, "sinkhorn"
    assert model.quantizer.epsilon == 99.0 and model.encode(x).marginal_error is not None
    model.quantizer = copy.deepcopy(model.quantizer)
    model.quantizer.epsilon = 55.0
    assert model.config.sinkhorn_epsilon == 55.0
    model.quantizer = OptVQQuantizer(128, 8, 2, epsilon=77.0)
    for use in (lambda: model.encode(x), lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="model.quantizer must be an OptVQModelQuantizer of model.config"):
            use()


def test_models_of_one_configuration_do_not_change_each_other():
    config = plain_config()
    first, second = OptVQModel(config), OptVQModel(config)
    first.quantizer.epsilon = 3.0
    assert second.quantizer.epsilon == config.sinkhorn_epsilon == 10.0


def test_every_changeable_field_is_listed_above():
    assert {field: attribute for field, attribute, _ in CHANGES} == CHANGEABLE_FIELDS


def test_a_changed_assignment_acts_at_once():
    model, x = builders.make(), pixels(3, 3, 32, 32)
    want = {name: model.encode(x, assignment=name).codes for name in ("nearest", "sinkhorn")}
    assert not torch.equal(want["nearest"], want["sinkhorn"])
    model.config.inference_assignment = "sinkhorn"
    assert torch.equal(model.encode(x).codes, want["sinkhorn"])
    model.quantizer.inference_assignment = "nearest"
    assert torch.equal(model.encode(x).codes, want["nearest"])
    with pytest.raises(StrictDataclassError, match="inference_assignment"):
        model.quantizer.inference_assignment = "soft"
    with pytest.raises(StrictDataclassError, match="sinkhorn_epsilon"):
        model.quantizer.epsilon = -1.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("codebook_size", 64),
        ("num_codebook_heads", 4),
        ("freeze_codebook", True),
        ("dropout", 0.5),
        ("num_channels", 1),
    ],
)
def test_other_fields_may_not_change(field, value, tmp_path):
    model = make()
    before = getattr(model.config, field)
    setattr(model.config, field, value)
    codes = torch.zeros(1, 2, 8, 8, dtype=torch.int64)
    uses = [
        lambda: model.encode(pixels(1, 3, 32, 32)),
        lambda: model.decode(codes=codes),
        lambda: model.to_token_ids(codes),
        lambda: model.from_token_ids(torch.zeros(1, 128, dtype=torch.int64)),
        lambda: model.save_pretrained(tmp_path),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=f"model.config.{field} was changed from {before} to {value}"):
            use()
    setattr(model.config, field, before)
    model.save_pretrained(tmp_path)


def test_the_image_size_may_change():
    model = make()
    model.config.image_size = 64
    assert model.from_token_ids(model.to_token_ids(torch.zeros(1, 2, 16, 16, dtype=torch.int64))).shape == (
        1,
        2,
        16,
        16,
    )
    model.config.image_size = 63
    with pytest.raises(StrictDataclassError, match="image_size must be divisible by the downsampling factor 4, got 63"):
        model.from_token_ids(torch.zeros(1, 450, dtype=torch.int64))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            pixels(1, 3, 32, 32) * 255,
            r"pixel_values must lie in \[-1, 1\] \(use OptVQImageProcessor\), got values up to 25",
        ),
        (torch.zeros(1, 3, 0, 32), "divisible by the downsampling factor 4, got 0 x 32"),
        (pixels(1, 3, 32, 32).to(torch.float8_e4m3fn), "pixel_values must be floats"),
    ],
)
def test_pixels_that_are_none(images, message):
    with pytest.raises(ValueError, match=message):
        make().encode(images)


def test_not_a_tensor():
    for wrong in (None, [[1.0]], "picture.png"):
        with pytest.raises(TypeError, match="pixel_values must be a tensor, got"):
            make().encode(wrong)
    with pytest.raises(TypeError, match="codes must be a tensor, got list"):
        make().decode(codes=[[1]])
    with pytest.raises(ValueError, match="quantized must be floats, got torch.int64"):
        make().decode(torch.zeros(1, 8, 8, 8, dtype=torch.int64))
    with pytest.raises(IndexError, match="from -1 to -1"):  # of a masked position, which a picture has not
        make().decode(codes=torch.full((1, 2, 8, 8), -1))
