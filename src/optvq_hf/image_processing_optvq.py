"""The image processor: pictures to pixel values in [-1, 1], and back."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import ImagesKwargs, Unpack


# ITU-R BT.601, as in PIL's conversion to "L". The weights sum to 1, so grey stays the same grey.
LUMA_WEIGHTS = (0.299, 0.587, 0.114)


# In dB. That of a perfect image, which would otherwise be infinite: no mean and no JSON file could hold it.
LARGEST_PSNR = 100.0


def psnr(mse: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB, from the mean squared error of images in [-1, 1] (peak 2); at most 100."""
    return (10 * torch.log10(4 / mse)).clamp_max(LARGEST_PSNR)


def image_columns(features: Mapping) -> list[str]:
    """Names of the image columns, from the features of a dataset of the `datasets` library."""
    return [column for column, feature in features.items() if type(feature).__name__ == "Image"]


class OptVQImageProcessorKwargs(ImagesKwargs, total=False):
    """
    num_channels (`int`, *optional*, defaults to 3):
        Channels of the pixel values: 3 for RGB, 1 for grayscale. Pictures of the other kind are converted.
    """

    num_channels: int


class OptVQImageProcessor(TorchvisionBackend):
    """Prepares pictures for [`OptVQModel`]: RGB or grayscale, shortest edge resized (bilinear, antialiased), centre
    crop, scaled to [-1, 1].

    Takes PIL images of any mode, uint8 arrays and tensors, paths and URLs, alone or in lists, and returns
    `pixel_values` (B, num_channels, H, W) float32 with `return_tensors="pt"`.

    Args:
        num_channels: 3 for RGB, 1 for grayscale (luma of BT.601).
        size: Default `{"shortest_edge": 256}`.
        crop_size: Default `{"height": 256, "width": 256}`.
        kwargs: The other attributes every image processor has (`do_resize`, `resample`, ...).
    """

    valid_kwargs = OptVQImageProcessorKwargs
    model_input_names = ["pixel_values"]

    num_channels = 3
    resample = PILImageResampling.BILINEAR  # as the original resizes MNIST and CIFAR-10
    size = {"shortest_edge": 256}
    default_to_square = False
    crop_size = {"height": 256, "width": 256}
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def __init__(self, **kwargs: Unpack[OptVQImageProcessorKwargs]):
        super().__init__(**kwargs)
        _check_num_channels(self.num_channels)

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One picture as a (C, H, W) tensor; pictures of 16 bits per pixel are converted to 8 first."""
        return super().process_image(_to_8_bits(image), *args, **kwargs)

    def _preprocess(
        self,
        images: list[torch.Tensor],
        num_channels: int,
        image_mean: list[float],
        image_std: list[float],
        **kwargs: Any,
    ) -> BatchFeature:
        _check_num_channels(num_channels)
        if num_channels == 1:
            images = [to_grayscale(image) for image in images]
            image_mean, image_std = image_mean[:1], image_std[:1]
        return super()._preprocess(images, image_mean=image_mean, image_std=image_std, **kwargs)

    def postprocess(self, reconstruction: torch.Tensor) -> list[Image.Image]:
        """Turns pixel values back into pictures.

        Args:
            reconstruction: (B, num_channels, H, W) float in [-1, 1]; values outside are clamped.

        Returns:
            B PIL images of size W x H, mode "RGB" or, for one channel, "L".

        Raises:
            ValueError: For any other shape.
        """
        if reconstruction.ndim != 4 or reconstruction.shape[1] not in (1, 3):
            raise ValueError(f"reconstruction must be (B, 1, H, W) or (B, 3, H, W), got {tuple(reconstruction.shape)}")
        pixels = reconstruction.detach().float().cpu()
        mean, std = (
            torch.tensor(values)[: pixels.shape[1], None, None] for values in (self.image_mean, self.image_std)
        )
        pixels = ((pixels * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).movedim(1, -1)
        return [
            Image.fromarray(image.squeeze(-1).numpy() if image.shape[-1] == 1 else image.numpy()) for image in pixels
        ]


def _check_num_channels(num_channels: int) -> None:
    if num_channels not in (1, 3):
        raise ValueError(f"num_channels must be 1 (grayscale) or 3 (RGB), got {num_channels}")


def _to_8_bits(image: Any) -> Any:
    if not isinstance(image, Image.Image) or image.mode not in ("I", "I;16", "I;16B", "I;16L", "I;16N", "F"):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"pictures of mode {image.mode} have no fixed range; convert them to 8 or 16 bits per pixel")
    return Image.fromarray((values / 257).round().astype(np.uint8))


def to_grayscale(image: torch.Tensor) -> torch.Tensor:
    """(3, H, W) or (1, H, W), uint8 or float, to (1, H, W) of the same dtype."""
    if image.shape[0] == 1:
        return image
    luma = (image.float() * torch.tensor(LUMA_WEIGHTS, device=image.device)[:, None, None]).sum(dim=0, keepdim=True)
    return luma.to(image.dtype) if image.is_floating_point() else luma.round().to(image.dtype)


OptVQImageProcessor.register_for_auto_class("AutoImageProcessor")
