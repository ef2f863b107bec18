"""Writes docs/inputs.md: what every door of the library takes, by giving it to the doors.

python scripts/make_inputs_page.py
"""

import base64
import io
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import pipeline

from optvq_hf import OptVQConfig, OptVQImageProcessor, OptVQModel, OptVQQuantizer
from optvq_hf.data.batches import ImageCollator


PAGE = Path(__file__).parents[1] / "docs" / "inputs.md"
SIZE = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
LONGEST_MESSAGE = 150

TEXT = """\
# What every door takes

This page is made by giving all of it to the doors: `python scripts/make_inputs_page.py`. A test compares.

## Pictures

Image processor, pipelines, training and evaluation open pictures in one way: one picture per input, the first frame of several,
turned as EXIF says, transparency on white, 16 bits scaled to 8, other colour spaces converted. The pictures here are of one
shade of grey, 51 of 255, which is -0.60 in [-1, 1]; cells show the value that comes out. Files may have every format that
Pillow reads, and URLs are opened as files are.

{pictures}

The built-in `image-feature-extraction` pipeline opens pictures by itself; the page on [models](models.md) says what differs.

## Arrays and tensors

They are uint8, from 0 to 255: other dtypes have no range that can be known. With `do_rescale=False` the processor takes floats
in [0, 1]. A raw batch (N, H, W) of grayscale pictures is passed as `list(batch)`.

{arrays}

## The quantizer

`OptVQQuantizer(dim=8, num_heads=2)` with 16 codes; a cell shows the shape of the codes.

{quantizer}

## The model: pixel values, codes, token ids

A model with f = 4, 128 codes and 2 heads, for pictures of 32 x 32: 8 x 8 tokens. A cell shows the shape that comes out.

{model}
"""


def said(door: Callable[[], Any]) -> str:
    """What a door answers: its result, or its error."""
    try:
        return door()
    except Exception as error:  # noqa: BLE001  the page shows errors of any type
        message = str(error).replace("|", "\\|")
        short = message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE].rsplit(' ', 1)[0]} ..."
        return f"**{type(error).__name__}**: {short}"


def table(header: list[str], rows: Iterator[list[str]]) -> str:
    lines = [header, ["-"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- pictures --------------------------------------------------------------------------------------------------------


def grey(*shape: int, dtype: Any = np.uint8, value: float = 51) -> np.ndarray:
    return np.full(shape, value, dtype)


def pictures() -> list[tuple[str, Any]]:
    """Pictures of grey by what they are; files are written to the working directory."""
    image = Image.fromarray(grey(32, 40, 3))
    clear, deep = (
        Image.new("RGBA", (40, 32), (51, 51, 51, 0)),
        Image.fromarray(grey(32, 40, dtype=np.uint16, value=51 * 257)),
    )
    lighter, exif = Image.new("RGB", (40, 32), (204, 204, 204)), Image.Exif()
    exif[0x0112] = 6
    image.save("picture.png")
    clear.save("clear.png")
    deep.save("16bit.png")
    image.save("frames.gif", save_all=True, append_images=[lighter])
    image.save("pages.tiff", save_all=True, append_images=[lighter])
    image.save("animation.webp", save_all=True, append_images=[lighter], lossless=True)
    image.save("picture.bmp")
    image.save("turned.png", exif=exif)
    Path("text.png").write_text("no picture")
    Path("cut.png").write_bytes(Path("picture.png").read_bytes()[:-30])
    Path("folder").mkdir()
    data = Path("picture.png").read_bytes()
    encoded = base64.b64encode(data).decode()
    hsv = Image.new("HSV", (40, 32), (0, 0, 51))
    return [
        ("path", "picture.png"),
        ("`pathlib.Path`", Path("picture.png")),
        ("BMP", "picture.bmp"),
        ("transparent PNG", "clear.png"),
        ("PNG of 16 bits", "16bit.png"),
        ("animated GIF", "frames.gif"),
        ("TIFF of several pages", "pages.tiff"),
        ("animated WEBP", "animation.webp"),
        ("PNG turned by EXIF", "turned.png"),
        ("bytes", data),
        ('`{"bytes", "path"}` of `datasets`', {"bytes": data, "path": None}),
        ("file object", io.BytesIO(data)),
        ("base64", encoded),
        ("`data:` URI", f"data:image/png;base64,{encoded}"),
        ("PIL RGB", image),
        ("PIL L", image.convert("L")),
        ("PIL RGBA, transparent", clear),
        ("PIL CMYK", image.convert("CMYK")),
        ("PIL YCbCr", image.convert("YCbCr")),
        ("PIL HSV", hsv),
        ("PIL I;16", deep),
        ("PIL I, to 65535", Image.fromarray(grey(32, 40, dtype=np.int32, value=51 * 257))),
        ("PIL I, to 255", Image.fromarray(grey(32, 40, dtype=np.int32))),
        ("PIL I, above 65535", Image.fromarray(grey(32, 40, dtype=np.int32, value=70000))),
        ("PIL F", Image.fromarray(grey(32, 40, dtype=np.float32))),
        ("PIL of 0 pixels", Image.new("RGB", (0, 5))),
        ("list", ["picture.png", image, data]),
        ("nested list", [[image], [image]]),
        ("empty list", []),
        ("missing path", "missing.png"),
        ("folder", "folder"),
        ("text file", "text.png"),
        ("truncated file", "cut.png"),
        ("None", None),
    ]


def value_of(pixel_values: torch.Tensor) -> str:
    if len(pixel_values) == 0:
        return "no pictures"
    count = f"{len(pixel_values)} pictures, " if len(pixel_values) > 1 else ""
    return f"{count}{pixel_values.mean():.2f}"


def picture_rows(processor: OptVQImageProcessor, tokenize: Any) -> Iterator[list[str]]:
    def of_training(given: Any) -> str:
        is_file = isinstance(given, (str, Path)) and os.path.exists(given)
        records = {"bytes": None, "path": str(given)} if is_file else given
        records = {"bytes": given, "path": None} if isinstance(given, bytes) else records
        if not isinstance(records, dict):
            return ""  # datasets hold none of this
        return value_of(ImageCollator(processor, random_crop=True)([{"image": records}]))

    for name, given in pictures():
        by_processor = said(lambda given=given: value_of(processor(given, return_tensors="pt").pixel_values))
        by_pipeline = said(lambda given=given: value_of(seen(tokenize, given)))
        of_data = said(lambda given=given: of_training(given))
        yield [name, by_processor, "the same" if by_pipeline == by_processor else by_pipeline, of_data]


def seen(tokenize: Any, given: Any) -> torch.Tensor:
    """The pixel values that a pipeline gives to its model, in one batch, which the model may fill up."""
    batches = []
    hook = tokenize.model.encoder.register_forward_pre_hook(lambda _, arguments: batches.append(arguments[0]))
    try:
        results = tokenize(given)
    finally:
        hook.remove()
    if not batches:
        return torch.zeros(0)
    [pixel_values] = batches
    return pixel_values[: len(results) if isinstance(results, list) else 1]


def array_rows(processor: OptVQImageProcessor) -> Iterator[list[str]]:
    rows: list[tuple[str, Any, dict]] = [
        ("uint8 (H, W)", grey(32, 40), {}),
        ("uint8 (H, W, 1)", grey(32, 40, 1), {}),
        ("uint8 (H, W, 3)", grey(32, 40, 3), {}),
        ("uint8 (H, W, 4), alpha 51", grey(32, 40, 4), {}),
        ("uint8 (3, H, W)", torch.tensor(grey(3, 32, 40)), {}),
        ("uint8 (B, H, W, 3)", grey(2, 32, 40, 3), {}),
        ("uint8 (60, 28, 28)", grey(60, 28, 28), {}),
        ("uint8 (3, W, 3)", grey(3, 40, 3), {}),
        ('the same, `input_data_format="channels_last"`', grey(3, 40, 3), {"input_data_format": "channels_last"}),
        ("uint8, no pixels", grey(0, 40, 3), {}),
        *((f"{dtype} (H, W, 3)", grey(32, 40, 3, dtype=dtype), {}) for dtype in ("uint16", "int64", "bool", "float32")),
        ("float32 in [0, 1], `do_rescale=False`", grey(32, 40, 3, dtype="float32", value=0.2), {"do_rescale": False}),
        ("float32 to 255, `do_rescale=False`", grey(32, 40, 3, dtype="float32"), {"do_rescale": False}),
        ("uint8, `do_rescale=False`", grey(32, 40, 3), {"do_rescale": False}),
        ("uint8, smaller than the crop, `do_resize=False`", grey(20, 40, 3), {"do_resize": False}),
    ]
    for name, given, options in rows:
        call = said(lambda: value_of(processor(given, return_tensors="pt", **options).pixel_values))  # noqa: B023
        yield [name, call]


# ---- tensors ---------------------------------------------------------------------------------------------------------


def shape(tensor: torch.Tensor) -> str:
    return str(tuple(tensor.shape))


def quantizer_rows() -> Iterator[list[str]]:
    def codes(x: Any, channels_first: bool | None = None, mask: Any = None) -> str:
        quantizer = OptVQQuantizer(codebook_size=16, dim=8, num_heads=2, channels_first=channels_first)
        return shape(quantizer(x, mask=mask).codes)

    nan = torch.full((3, 5, 8), torch.nan)
    rows = [
        ("(N, 8)", lambda: codes(torch.randn(6, 8))),
        ("(B, T, 8)", lambda: codes(torch.randn(3, 5, 8))),
        ("(B, 8, T), `channels_first=True`", lambda: codes(torch.randn(3, 8, 5), True)),
        ("(B, 8, T)", lambda: codes(torch.randn(3, 8, 5))),
        ("(B, 8, H, W)", lambda: codes(torch.randn(3, 8, 4, 6))),
        ("(B, H, W, 8), `channels_first=False`", lambda: codes(torch.randn(3, 4, 6, 8), False)),
        ("(B, 8, T, H, W)", lambda: codes(torch.randn(3, 8, 2, 4, 6))),
        ("bfloat16, float16, float64", lambda: codes(torch.randn(3, 5, 8).bfloat16())),
        ("int64", lambda: codes(torch.zeros(3, 5, 8, dtype=torch.int64))),
        ("NaN", lambda: codes(nan)),
        ("NaN at masked positions", lambda: codes(nan, mask=torch.zeros(3, 5, dtype=torch.bool))),
        ("mask of floats", lambda: codes(torch.randn(3, 5, 8), mask=torch.ones(3, 5))),
        ("mask of another shape", lambda: codes(torch.randn(3, 5, 8), mask=torch.ones(5, 3, dtype=torch.bool))),
        ("numpy array", lambda: codes(np.zeros((3, 5, 8)))),
    ]
    return ([name, said(door)] for name, door in rows)


def model_rows(model: OptVQModel) -> Iterator[list[str]]:
    codes, ids = torch.zeros(2, 2, 8, 8, dtype=torch.int64), torch.tensor([0, 128]).repeat(2, 64)
    pixels = torch.zeros(2, 3, 32, 32)
    rows = [
        ("`encode` (B, 3, H, W)", lambda: shape(model.encode(pixels).codes)),
        ("`encode`, sizes that 4 divides", lambda: shape(model.encode(torch.zeros(2, 3, 20, 44)).codes)),
        ("`encode`, other sizes", lambda: shape(model.encode(torch.zeros(2, 3, 30, 32)).codes)),
        ("`encode`, one channel", lambda: shape(model.encode(pixels[:, :1]).codes)),
        ("`encode`, uint8", lambda: shape(model.encode(pixels.byte()).codes)),
        ("`encode`, NaN", lambda: shape(model.encode(pixels / 0).codes)),
        ("`decode(codes=)`, int64", lambda: shape(model.decode(codes=codes).reconstruction)),
        (
            "`decode(codes=)`, any integers, as uint16",
            lambda: shape(model.decode(codes=codes.to(torch.uint16)).reconstruction),
        ),
        ("`decode(codes=)`, 128", lambda: shape(model.decode(codes=codes + 128).reconstruction)),
        ("`decode(codes=)`, -1", lambda: shape(model.decode(codes=codes - 1).reconstruction)),
        ("`decode(codes=)`, floats", lambda: shape(model.decode(codes=codes.float()).reconstruction)),
        ("`decode(codes=)`, one head", lambda: shape(model.decode(codes=codes[:, :1]).reconstruction)),
        ("`to_token_ids`", lambda: shape(model.to_token_ids(codes))),
        ("`to_token_ids`, (B, H, W)", lambda: shape(model.to_token_ids(codes[:, 0]))),
        ("`to_token_ids`, 128", lambda: shape(model.to_token_ids(codes + 128))),
        ("`from_token_ids`", lambda: shape(model.from_token_ids(ids))),
        ("`from_token_ids`, floats", lambda: shape(model.from_token_ids(ids.float()))),
        ("`from_token_ids`, ids of the other head", lambda: shape(model.from_token_ids(ids.flip(1)))),
        ("`from_token_ids`, too few", lambda: shape(model.from_token_ids(ids[:, 1:]))),
        ("`from_token_ids(grid=(4, 16))`", lambda: shape(model.from_token_ids(ids, grid=(4, 16)))),
    ]
    return ([name, said(door)] for name, door in rows)


def make_page() -> str:
    """The text of docs/inputs.md."""
    torch.manual_seed(0)
    processor = OptVQImageProcessor(**SIZE)
    config = OptVQConfig(backbone="plain_cnn", image_size=32, codebook_size=128, codebook_dim=8, num_codebook_heads=2)
    model = OptVQModel(config).eval()
    tokenize = pipeline("image-tokenization", model=model, image_processor=processor)
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.chdir(folder)
        try:
            of_pictures = table(
                ["picture", "image processor", "pipelines", "datasets"], picture_rows(processor, tokenize)
            )
        finally:
            os.chdir(before)
    return TEXT.format(
        pictures=of_pictures,
        arrays=table(["array or tensor", "image processor, pipelines"], array_rows(processor)),
        quantizer=table(["input", "codes"], quantizer_rows()),
        model=table(["call", "result"], model_rows(model)),
    )


if __name__ == "__main__":
    PAGE.write_text(make_page())
