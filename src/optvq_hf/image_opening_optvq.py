"""Opens pictures: every way to give one ends in the same RGB or grayscale pixels."""

import base64
import os
from contextlib import nullcontext
from io import BytesIO
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import httpx  # the client of transformers, under the name that huggingface_hub gives it
from PIL import Image, ImageOps, UnidentifiedImageError


# Seconds to wait for a server to connect, and for each part of its answer.
FETCH_TIMEOUT = 30.0


def open_image(source: Any) -> Image.Image:
    """The picture in a source, upright, of mode "RGB" or, for grayscale, "L".

    The orientation that EXIF tells is applied, transparency is laid on white, 16 bits per pixel are scaled to 8, and other
    colour spaces are converted. A file with several frames or pages gives the first, a PIL picture the one it stands at.

    Args:
        source: A PIL picture, path, URL (http, https), base64 text, data: URI, the bytes of an image file, a binary file
            object, or an undecoded record {"bytes", "path"} of the `datasets` library.

    Raises:
        FileNotFoundError: If there is no such file, or a URL cannot be fetched.
        ValueError: If the source is no picture, cannot be decoded, or has numbers without a known range: mode "F", mode "I"
            outside 0..65535, and mode "I" up to 1..255, which may be 8 or 16 bits per pixel (a PGM file is always 16).
    """
    is_open = isinstance(source, Image.Image)
    file: Any
    file, name = (source, getattr(source, "filename", "") or "in memory") if is_open else _file_of(source)
    try:
        with nullcontext(file) if is_open else Image.open(file) as image:
            image.load()
            return _to_rgb_or_grayscale(_upright(image), is_pgm=image.format == "PPM")
    except Exception as error:  # decoders raise errors of many types at corrupt files
        reason = "not an image file" if isinstance(error, UnidentifiedImageError) else _one_line(error)
        raise ValueError(f"cannot read image {name}: {reason}") from error


def read_array(
    array: np.ndarray | torch.Tensor, input_data_format: str | None = None, floats: bool = False
) -> torch.Tensor:
    """The picture in an array, (1, H, W) or (3, H, W) of the same device; transparency is laid on white.

    Args:
        array: uint8, of shape (H, W), which is grayscale, (H, W, C) or (C, H, W) with 1, 3 or 4 channels (the fourth is alpha).
        input_data_format: "channels_first" or "channels_last"; needed only where both would fit.
        floats: Take floats in [0, 1] instead, and return float32.

    Raises:
        ValueError: For another dtype, range or shape, or a shape that can be read in two ways.
    """
    shape, dtype = tuple(array.shape), str(array.dtype).removeprefix("torch.")
    if dtype != "uint8" and not (floats and dtype in ("float16", "bfloat16", "float32", "float64")):
        raise ValueError(
            f"arrays and tensors must be uint8, 0 to 255, or with do_rescale=False floats in [0, 1]; got {dtype} {shape}"
        )
    if isinstance(array, torch.Tensor) and (array.layout != torch.strided or array.is_meta):
        raise ValueError(f"tensors must be dense and hold values, got layout {array.layout} on {array.device}")
    axes = _channel_axes(shape, input_data_format)
    if len(axes) != 1 or 0 in shape:
        problem = "has no pixels" if 0 in shape else "can be read in two ways" if axes else "is not that of one picture"
        raise ValueError(
            f"the shape {shape} {problem}: arrays and tensors must be (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels. "
            'Pass many pictures as a list, and input_data_format="channels_first" or "channels_last" where both fit'
        )
    pixels = torch.from_numpy(np.array(array)) if isinstance(array, np.ndarray) else array
    pixels = pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.movedim(axes[0], 0)
    if dtype != "uint8":
        pixels = pixels.float()
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # false for NaN too
            raise ValueError(f"floats must lie in [0, 1], got {pixels.min().item():g} to {pixels.max().item():g}")
    return _on_white(pixels) if pixels.shape[0] == 4 else pixels.contiguous()


def _file_of(source: Any) -> tuple[Any, str]:
    """What PIL opens, and how messages call it."""
    if isinstance(source, dict) and source and source.keys() <= {"bytes", "path"}:
        data, path = source.get("bytes"), source.get("path")
        if data is None and path is None:
            raise ValueError("the record of the dataset holds no picture: both its bytes and its path are None")
        file, name = _file_of(path if data is None else data)
        return file, path if path and data is not None else name
    if isinstance(source, (bytes, bytearray, memoryview)):
        return BytesIO(source), f"of {len(source)} bytes without a file name"
    if isinstance(source, str) and not os.path.exists(source):
        return _file_of_text(source)
    if isinstance(source, (str, os.PathLike)):
        if os.path.isdir(source):
            raise ValueError(f"{source} is a folder: pass the paths of its pictures")
        if not os.path.isfile(source):
            raise FileNotFoundError(f"there is no picture {source}")
        return source, str(source)
    if hasattr(source, "read"):
        return source, str(getattr(source, "name", "in memory"))
    raise ValueError(
        "expected a picture: a PIL image, path, URL, base64 text, bytes, file, array or tensor; got "
        f"{type(source).__name__}. Pass many as a flat list"
    )


def _file_of_text(text: str) -> tuple[BytesIO, str]:
    """The file behind a URL, or in base64."""
    if text.startswith(("http://", "https://")):
        return BytesIO(_fetch(text)), text
    short = text if len(text) <= 100 else f"{text[:60]}..."
    is_uri = text.startswith("data:")
    encoded = text.partition(",")[2] if is_uri else text
    try:
        data = base64.b64decode("".join(encoded.split()), validate=True)
    except ValueError as error:
        if is_uri:
            raise ValueError(f"cannot read image {short}: not base64") from error
        raise FileNotFoundError(f"there is no picture {short}") from error
    return BytesIO(data), short if is_uri else f"{short!r}, which is no existing file and was taken as base64"


def _fetch(url: str) -> bytes:
    try:
        return httpx.get(url, timeout=FETCH_TIMEOUT, follow_redirects=True).raise_for_status().content
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise FileNotFoundError(f"cannot fetch picture {url}: {_one_line(error)}") from error


def _upright(image: Image.Image) -> Image.Image:
    """A copy, turned and mirrored as EXIF says."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # corrupt EXIF data, which raise errors of many types, tell no orientation
        return image.copy()


def _to_rgb_or_grayscale(image: Image.Image, is_pgm: bool) -> Image.Image:
    if 0 in image.size:
        raise ValueError("it has no pixels")
    if image.mode == "F":
        raise ValueError("pictures of mode F have no fixed range; convert them to 8 or 16 bits per pixel")
    if image.mode.startswith("I"):
        return _to_8_bits(image, is_pgm)
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(image, mask=image.getchannel("A"))
        return canvas
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")


def _to_8_bits(image: Image.Image, is_pgm: bool) -> Image.Image:
    """16 bits per pixel, of mode "I;16" or its kin, or of mode "I" if its values tell that."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if low < 0 or high > 65535:
        raise ValueError(
            f"pictures of mode I with values {low} to {high} have no fixed range; convert them to 8 or 16 bits per pixel"
        )
    if image.mode == "I" and 0 < high < 256 and not is_pgm:
        raise ValueError(
            f"pictures of mode I with values up to {high} may have 8 or 16 bits per pixel: convert them, 8 bits with "
            '.convert("L"), 16 bits with .convert("I;16")'
        )
    values = np.where(values == image.info.get("transparency", -1), 65535, values)
    return Image.fromarray((values / 257).round().astype(np.uint8))


def _channel_axes(shape: tuple[int, ...], input_data_format: str | None) -> list[int]:
    """Axes of an array that may be its channels; the new first axis for (H, W)."""
    if input_data_format not in (None, "channels_first", "channels_last"):
        raise ValueError(
            f'input_data_format must be "channels_first" or "channels_last", got {str(input_data_format)!r}'
        )
    if len(shape) == 2:
        return [0]
    if len(shape) != 3:
        return []
    asked = {"channels_first": (0,), "channels_last": (2,), None: (0, 2)}[input_data_format]
    return [axis for axis in asked if shape[axis] in (1, 3, 4)]


def _on_white(pixels: torch.Tensor) -> torch.Tensor:
    """(4, H, W) to (3, H, W); uint8 is rounded to the nearest."""
    if pixels.is_floating_point():
        return pixels[:3] * pixels[3:] + (1 - pixels[3:])
    colours, alpha = pixels[:3].int(), pixels[3:].int()
    return ((colours * alpha + 255 * (255 - alpha) + 127) // 255).to(torch.uint8)


def _one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
