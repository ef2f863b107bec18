"""The image processor: pictures to pixel values in [-1, 1], and back."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from math import inf, isfinite
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs, Unpack

from .image_opening_optvq import open_image, read_array


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
    pad_to_multiple_of (`int`, *optional*):
        Repeat the last row and the last column until both sides are multiples of this number, and also return
        `original_sizes`.
    """

    num_channels: int
    pad_to_multiple_of: int | None


class OptVQImageProcessor(TorchvisionBackend):
    """Prepares pictures for [`OptVQModel`]: RGB or grayscale, shortest edge resized (bilinear, antialiased), centre
    crop, scaled to [-1, 1].

    Takes what [`open_image`] opens and arrays and tensors as [`read_array`] reads them, alone or in a flat list, and a batch
    of arrays as one of four dimensions. Returns one picture for each: `pixel_values` (B, num_channels, H, W) float32 with
    `return_tensors="pt"`.

    Args:
        num_channels: 3 for RGB, 1 for grayscale (luma of BT.601), whatever `do_convert_rgb` says.
        size: Default `{"shortest_edge": 256}`.
        crop_size: Default `{"height": 256, "width": 256}`.
        pad_to_multiple_of: Repeat the last row and the last column until both sides are multiples of this number, of the
            model's `downsample_factor` f for pictures of any size. Then the result has `original_sizes` too, (B, 2) with height
            and width before, to which [`postprocess`] crops. By default pictures are not padded.
        kwargs: The other attributes every image processor has (`do_resize`, `resample`, ...).

    Raises:
        FileNotFoundError, ValueError: For what is no picture or would be misread, and a picture smaller than the crop.
    """

    valid_kwargs = OptVQImageProcessorKwargs
    model_input_names = ["pixel_values"]

    num_channels = 3
    pad_to_multiple_of = None
    resample = PILImageResampling.BILINEAR  # as the original resizes MNIST and CIFAR-10
    size: Any = {"shortest_edge": 256}  # each instance has a SizeDict
    default_to_square = False
    crop_size: Any = {"height": 256, "width": 256}
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def __init__(self, **kwargs: Unpack[OptVQImageProcessorKwargs]):
        _check_names(kwargs)
        super().__init__(**kwargs)
        _check_num_channels(self.num_channels)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; a mistyped setting is an error."""
        _check_names(kwargs)
        return super().from_dict(image_processor_dict, **kwargs)

    def _prepare_image_like_inputs(self, images: Any, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        """One tensor for each picture; transformers would flatten nested lists and open files in its own way."""
        if isinstance(images, (np.ndarray, torch.Tensor)):
            images = list(images) if images.ndim == 4 else [images]
        elif not isinstance(images, Sequence) or isinstance(images, (str, bytes, bytearray, memoryview)):
            images = [images]
        if len(images) == 0:
            raise ValueError("there are no pictures to process: the list is empty")
        return [self.process_image(image, *args, **kwargs) for image in images]

    def process_image(
        self,
        image: Any,
        do_rescale: bool | None = True,
        do_normalize: bool | None = True,
        input_data_format: str | None = None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """One picture as a (1, H, W) or (3, H, W) tensor, uint8, or float32 where it is given as floats."""
        if isinstance(image, (np.ndarray, torch.Tensor)):
            pixels = read_array(image, input_data_format, floats=not do_rescale)
        else:
            pixels = read_array(np.asarray(open_image(image)), "channels_last")
        if do_normalize and not do_rescale and not pixels.is_floating_point():
            raise ValueError("do_rescale=False is for floats in [0, 1]: pictures from 0 to 255 need do_rescale=True")
        return pixels if device is None else pixels.to(device)

    def resize(self, image: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(..., C, H, W) to the size; floats stay in [0, 1], as uint8 does, where a bicubic filter overshoots."""
        resized = super().resize(image, *args, **kwargs)
        return resized.clamp(0, 1) if resized.is_floating_point() else resized

    def center_crop(self, image: torch.Tensor, size: SizeDict, **kwargs: Any) -> torch.Tensor:
        """(B, C, H, W) to the crop's size; transformers would fill up smaller pictures with black."""
        check_crop(image, size)
        return super().center_crop(image, size, **kwargs)

    def _standardize_kwargs(self, **kwargs: Any) -> dict:
        for name in ("size", "crop_size"):
            if isinstance(kwargs.get(name), (list, tuple)) and len(kwargs[name]) != 2:
                raise ValueError(f"{name} must be one number, a height and a width, or a dict; got {kwargs[name]}")
        return super()._standardize_kwargs(**kwargs)

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:
        super()._validate_preprocess_kwargs(**kwargs)
        _check_num_channels(kwargs["num_channels"])
        multiple = kwargs["pad_to_multiple_of"]
        if multiple is not None and (type(multiple) is not int or multiple < 1):
            raise ValueError(f"pad_to_multiple_of must be a positive integer, got {multiple!r}")
        for name in ("size", "crop_size"):
            if any(length < 1 for length in dict(kwargs[name] or {}).values()):
                raise ValueError(f"{name} must be positive, got {dict(kwargs[name])}")
        if kwargs["do_center_crop"] and dict(kwargs["crop_size"]).keys() != {"height", "width"}:
            raise ValueError(f"crop_size must have a height and a width, got {dict(kwargs['crop_size'])}")
        if kwargs["do_resize"] and kwargs["resample"] not in (*PILImageResampling, *InterpolationMode):
            raise ValueError(f"resample must be one of {list(PILImageResampling)}, got {kwargs['resample']}")
        for name in ("image_mean", "image_std"):
            values = _per_channel(kwargs[name], 3) if kwargs["do_normalize"] else (1.0,) * 3
            if len(values) != 3 or not all(map(isfinite, values)) or (name == "image_std" and min(values) <= 0):
                raise ValueError(f"{name} must be one or three finite numbers, image_std above 0; got {kwargs[name]}")
        if kwargs["do_rescale"] and not 0 < kwargs["rescale_factor"] < inf:
            raise ValueError(f"rescale_factor must be positive and finite, got {kwargs['rescale_factor']}")
        if kwargs["data_format"] not in (None, "channels_first"):
            raise ValueError(
                f"pixel values are (B, num_channels, H, W): data_format must be channels_first, got {kwargs['data_format']}"
            )

    def _preprocess(
        self,
        images: list[torch.Tensor],
        num_channels: int,
        image_mean: float | Sequence[float],
        image_std: float | Sequence[float],
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        images = [to_grayscale(image) if num_channels == 1 else image.expand(3, -1, -1) for image in images]
        kwargs.update(
            image_mean=_per_channel(image_mean, num_channels), image_std=_per_channel(image_std, num_channels)
        )
        features = super()._preprocess(images, return_tensors=None, **kwargs)
        if pad_to_multiple_of is not None:
            unpadded = features["pixel_values"]
            features["original_sizes"] = [tuple(pixels.shape[-2:]) for pixels in unpadded]
            features["pixel_values"] = [_padded(pixels, pad_to_multiple_of) for pixels in unpadded]
        sizes = {tuple(pixels.shape[-2:]) for pixels in features["pixel_values"]}
        if return_tensors is not None and len(sizes) > 1:
            raise ValueError(f"pictures of different sizes, {sorted(sizes)}, make no batch: crop them (do_center_crop)")
        return BatchFeature(features.data, tensor_type=return_tensors)

    def postprocess(
        self, reconstruction: torch.Tensor, original_sizes: torch.Tensor | Sequence[Sequence[int]] | None = None
    ) -> list[Image.Image]:
        """Turns pixel values back into pictures.

        Args:
            reconstruction: (B, num_channels, H, W) float in [-1, 1]; values outside are clamped.
            original_sizes: Height and width of each picture before it was padded, integers (B, 2): what was padded is cropped.

        Returns:
            B PIL images of size W x H or of the original size, mode "RGB" or, for one channel, "L".

        Raises:
            ValueError: For another shape or dtype, values that are not finite, or sizes that are not those of such pictures.
        """
        if not isinstance(reconstruction, torch.Tensor) or not reconstruction.is_floating_point():
            kind = getattr(reconstruction, "dtype", type(reconstruction).__name__)
            raise ValueError(f"reconstruction must be a tensor of floats in [-1, 1], got {kind}")
        if reconstruction.ndim != 4 or reconstruction.shape[1] not in (1, 3):
            raise ValueError(f"reconstruction must be (B, 1, H, W) or (B, 3, H, W), got {tuple(reconstruction.shape)}")
        pixels = reconstruction.detach().float().cpu()
        if not pixels.isfinite().all():
            raise ValueError("reconstruction has values that are not finite")
        mean, std = (
            torch.tensor(_per_channel(values, pixels.shape[1]))[:, None, None]
            for values in (self.image_mean, self.image_std)
        )
        pixels = ((pixels * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).movedim(1, -1)
        cropped = list(pixels) if original_sizes is None else _cropped(pixels, original_sizes)
        return [
            Image.fromarray(image.squeeze(-1).numpy() if image.shape[-1] == 1 else image.numpy()) for image in cropped
        ]


def _check_names(names: Iterable[str]) -> None:
    """Raises ValueError for what looks like a mistyped setting. Other names are of transformers and of saved files."""
    known = OptVQImageProcessorKwargs.__annotations__
    for name in names:
        nearest = [] if name in known else get_close_matches(name, known, n=1, cutoff=0.8)
        if nearest:
            raise ValueError(f"OptVQImageProcessor has no setting {name!r}, did you mean {nearest[0]!r}?")


def _check_num_channels(num_channels: int) -> None:
    if num_channels not in (1, 3):
        raise ValueError(f"num_channels must be 1 (grayscale) or 3 (RGB), got {num_channels}")


def _per_channel(values: float | Sequence[float], num_channels: int) -> tuple[float, ...]:
    """The mean or standard deviation of each channel."""
    values = tuple(values) if isinstance(values, Sequence) else (values,)
    return values[:num_channels] if len(values) > 1 else values * num_channels


def _padded(pixels: torch.Tensor, multiple: int) -> torch.Tensor:
    """(C, H, W) with the last row and column repeated until both sides are multiples."""
    height, width = pixels.shape[-2:]
    return F.pad(pixels, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def _cropped(pixels: torch.Tensor, sizes: torch.Tensor | Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Each of (B, H, W, C) to its height and width."""
    try:
        pairs = np.asarray(sizes.cpu() if isinstance(sizes, torch.Tensor) else sizes)
    except (TypeError, ValueError):  # of different lengths
        pairs = np.zeros((1, 0), int)
    is_sizes = pairs.shape == (len(pixels), 2) and pairs.dtype.kind in "iu"
    if not is_sizes or (pairs < 1).any() or (pairs > pixels.shape[1:3]).any():
        raise ValueError(
            f"original_sizes must be height and width of {len(pixels)} pictures of at most "
            f"{pixels.shape[1]} x {pixels.shape[2]}, in integers, got {sizes}"
        )
    return [image[:height, :width] for image, (height, width) in zip(pixels, pairs.tolist())]


def check_crop(image: torch.Tensor, size: SizeDict) -> None:
    """Raises ValueError if pictures (..., H, W) are smaller than the crop."""
    height, width = image.shape[-2:]
    if height < (size.height or 0) or width < (size.width or 0):
        raise ValueError(
            f"a picture of {height} x {width} pixels is smaller than the crop of {size.height} x {size.width}: "
            "resize it (do_resize, size) or choose a smaller crop_size"
        )


def to_grayscale(image: torch.Tensor) -> torch.Tensor:
    """(3, H, W) or (1, H, W), uint8 or float, to (1, H, W) of the same dtype."""
    if image.shape[0] == 1:
        return image
    luma = (image.float() * torch.tensor(LUMA_WEIGHTS, device=image.device)[:, None, None]).sum(dim=0, keepdim=True)
    return luma.to(image.dtype) if image.is_floating_point() else luma.round().to(image.dtype)


OptVQImageProcessor.register_for_auto_class("AutoImageProcessor")
