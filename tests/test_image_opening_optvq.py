"""Every mode, file kind and source through every door, against values computed without the library."""

import base64
import colorsys
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from builders import noise, on_white, plain_config, spread
from optvq_hf import OptVQImageProcessor, OptVQModel
from optvq_hf.data.batches import ImageCollator
from optvq_hf.image_opening_optvq import open_image


SIDE = 32


def with_palette(alpha=None):
    """A picture of mode "P", and the colours (H, W, 3) and alpha (H, W) that its palette means."""
    indices, palette = noise(1)[..., 0] % 8, noise(3, seed=1).reshape(-1, 3)[:8]
    image = Image.fromarray(indices).convert("P")
    image.putpalette(palette.tobytes())
    if alpha is not None:
        image.info["transparency"] = bytes(alpha)
    return image, palette[indices], np.array([255] * 8 if alpha is None else alpha)[indices]


def of_bands(mode, values):
    bands = [Image.fromarray(np.ascontiguousarray(values[..., band])) for band in range(values.shape[2])]
    return Image.merge(mode, bands)


def premultiplied(mode):
    """A picture whose colours are multiplied by its alpha already: white adds the rest."""
    image = of_bands({"La": "LA", "RGBa": "RGBA"}[mode], noise(len(mode))).convert(mode)
    values = np.asarray(image).astype(float)
    return image, np.broadcast_to(values[..., :-1] + 255 - values[..., -1:], (SIDE, SIDE, 3))


def lab():
    """A picture of mode "LAB", whose lightness and colours are those of CIE L*a*b* under D50; made from sRGB."""
    colours = 96 + noise(3, seed=2) // 4  # far from the ends, where steps of L*a*b* are steps of sRGB
    linear = colours / 255.0
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    to_d50 = np.array(
        [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
    )
    xyz = linear @ to_d50.T / (0.9642, 1.0, 0.8249)
    root = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    lightness = 116 * root[..., 1] - 16
    a, b = 500 * (root[..., 0] - root[..., 1]), 200 * (root[..., 1] - root[..., 2])
    values = np.stack([lightness * 2.55, a, b], -1).round().astype(int)
    stored = np.concatenate([values[..., :1], values[..., 1:] % 256], -1).astype(np.uint8)  # a and b are signed
    return Image.frombytes("LAB", (SIDE, SIDE), stored.tobytes()), colours


def case(mode):
    """A picture of a mode and the float (H, W, 3) it means, 0..255."""
    grey, rgb, rgba = noise(1)[..., 0], noise(3), noise(4)
    deep = np.random.default_rng(0).integers(0, 65536, (SIDE, SIDE), dtype=np.uint16)
    deep[0, :3] = 0, 65535, 32768
    as_grey = np.repeat(deep[..., None] / 257, 3, -1)
    palette, colours, _ = with_palette()
    clear, clear_colours, clear_alpha = with_palette([0, 255, 128, 10, 240, 77, 200, 31])
    cmyk = noise(4, seed=3)
    keyed, keyed_grey = Image.fromarray(rgb), Image.fromarray(grey)
    keyed.info["transparency"], keyed_grey.info["transparency"] = tuple(map(int, rgb[5, 5])), int(grey[5, 5])
    key16 = Image.fromarray(deep)
    key16.info["transparency"] = int(deep[5, 5])
    hsv = noise(3, seed=4)
    of_hsv = np.array([[colorsys.hsv_to_rgb(*(pixel / 255)) for pixel in row] for row in hsv]) * 255
    y, cb, cr = np.moveaxis(noise(3, seed=5).astype(float), -1, 0)
    of_ycbcr = np.stack(
        [y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)], -1
    )
    clear_with_alpha = clear.copy()
    return {
        "1": lambda: (Image.fromarray(grey > 127), np.repeat((grey[..., None] > 127) * 255.0, 3, -1)),
        "L": lambda: (Image.fromarray(grey), np.repeat(grey[..., None], 3, -1)),
        "RGB": lambda: (Image.fromarray(rgb), rgb),
        "RGBX": lambda: (of_bands("RGBX", rgba), rgba[..., :3]),
        "P": lambda: (palette, colours),
        "P with transparency": lambda: (clear, on_white(clear_colours, clear_alpha)),
        "PA": lambda: (clear_with_alpha.convert("PA"), on_white(clear_colours, clear_alpha)),
        "LA": lambda: (of_bands("LA", rgba[..., :2]), on_white(rgba[..., :1], rgba[..., 1])),
        "RGBA": lambda: (of_bands("RGBA", rgba), on_white(rgba[..., :3], rgba[..., 3])),
        "La": lambda: premultiplied("La"),
        "RGBa": lambda: premultiplied("RGBa"),
        "RGB with a key": lambda: (keyed, np.where((rgb == rgb[5, 5]).all(-1, keepdims=True), 255, rgb)),
        "L with a key": lambda: (keyed_grey, np.repeat(np.where(grey == grey[5, 5], 255, grey)[..., None], 3, -1)),
        "CMYK": lambda: (of_bands("CMYK", cmyk), (255.0 - cmyk[..., :3]) * (255.0 - cmyk[..., 3:]) / 255),
        "YCbCr": lambda: (of_bands("YCbCr", noise(3, seed=5)), of_ycbcr.clip(0, 255)),
        "HSV": lambda: (of_bands("HSV", hsv), of_hsv),
        "LAB": lab,
        "I;16": lambda: (Image.fromarray(deep), as_grey),
        "I;16B": lambda: (Image.fromarray(deep.astype(">u2")), as_grey),
        "I;16 with a key": lambda: (key16, np.where((deep == deep[5, 5])[..., None], 255, as_grey)),
        "I": lambda: (Image.fromarray(deep.astype(np.int32)), as_grey),
    }[mode]()


# Mode, kind of file or None where no file holds it, and how many of 255 steps PIL's integer conversion may be off.
MODES = [
    ("1", "PNG", 0.5),
    ("L", "PNG", 0.5),
    ("RGB", "PNG", 0.5),
    ("RGBX", None, 0.5),
    ("P", "PNG", 0.5),
    ("P with transparency", "PNG", 0.5),
    ("PA", None, 0.5),
    ("LA", "PNG", 0.5),
    ("RGBA", "PNG", 0.5),
    ("La", None, 1.5),
    ("RGBa", None, 1.5),
    ("RGB with a key", "PNG", 0.5),
    ("L with a key", "PNG", 0.5),
    ("CMYK", "TIFF", 1.0),
    ("YCbCr", None, 2.0),
    ("HSV", None, 2.5),
    ("LAB", "TIFF", 3.0),
    ("I;16", "PNG", 0.5),
    ("I;16B", "TIFF", 0.5),
    ("I;16 with a key", "PNG", 0.5),
    ("I", "TIFF", 0.5),
]


def file_of(image, kind, **options):
    file = io.BytesIO()
    if "transparency" in image.info:
        options = {"transparency": image.info["transparency"], **options}
    image.save(file, kind, **options)
    return file.getvalue()


def processor(**fields):
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    return OptVQImageProcessor(**{**sizes, **fields})


@pytest.fixture(scope="module")
def tokenize():
    torch.manual_seed(0)
    model = spread(OptVQModel(plain_config()).eval())
    return pipeline("image-tokenization", model=model, image_processor=processor())


def pixels_of(image):
    return processor()(image, return_tensors="pt").pixel_values


def in_steps(pixel_values):
    """(H, W, 3) float in 0..255."""
    return ((pixel_values[0] + 1) * 127.5).movedim(0, -1).numpy()


@pytest.mark.parametrize(("mode", "kind", "tolerance"), MODES, ids=[mode for mode, _, _ in MODES])
def test_every_mode_through_every_door(mode, kind, tolerance, tokenize, tmp_path):
    image, expected = case(mode)
    assert image.mode == mode.split()[0]
    pixels = pixels_of(image)
    assert np.abs(in_steps(pixels) - expected).max() <= tolerance + 1e-3
    assert np.abs(in_steps(pixels) - expected).mean() < 1
    doors = {"pipeline": tokenize.preprocess(image)["pixel_values"]}
    grey = processor(num_channels=1)(image, return_tensors="pt").pixel_values
    luma = (in_steps(pixels) * (0.299, 0.587, 0.114)).sum(-1)
    assert np.abs(in_steps(grey)[..., 0] - luma).max() <= 0.51
    if kind:
        file = file_of(image, kind)
        path = tmp_path / f"picture.{kind.lower()}"
        path.write_bytes(file)
        records = [{"image": {"bytes": file, "path": None}}, {"image": {"bytes": None, "path": str(path)}}]
        doors |= {
            "path": pixels_of(str(path)),
            "Path": pixels_of(path),
            "opened": pixels_of(Image.open(path)),
            "bytes": pixels_of(file),
            "file": pixels_of(io.BytesIO(file)),
            "record": pixels_of(records[1]["image"]),
            "pipeline by path": tokenize.preprocess(str(path))["pixel_values"],
            "training": ImageCollator(processor())(records[:1]),
            "training by path": ImageCollator(processor())(records[1:]),
            "training, random crop": ImageCollator(processor(), random_crop=True)(records[:1]),
        }
    assert [door for door, result in doors.items() if not torch.equal(result, pixels)] == []


@pytest.mark.parametrize("mode", ["1", "P", "P with transparency", "RGBA", "LA", "I;16", "CMYK", "LAB"])
def test_modes_are_converted_before_they_are_resized(mode):
    """With a random crop as without it; a crop of the whole picture is the picture."""
    image, _ = case(mode)
    kind = {mode: kind for mode, kind, _ in MODES}[mode]
    small = processor(size={"height": 20, "width": 20}, crop_size={"height": 20, "width": 20})
    records = [{"image": {"bytes": file_of(image, kind), "path": None}}]
    [plain, cropped] = (ImageCollator(small, random_crop=crop)(records) for crop in (False, True))
    whole = Image.fromarray(in_steps(pixels_of(image)).round().astype(np.uint8))
    assert torch.equal(plain, cropped) and torch.equal(plain, small(whole, return_tensors="pt").pixel_values)


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("GIF", {"save_all": True}, 0),
        ("TIFF", {"save_all": True}, 0),
        ("TIFF", {"save_all": True, "compression": "tiff_lzw"}, 0),
        ("WEBP", {"save_all": True, "lossless": True}, 0),
        ("PNG", {"save_all": True}, 0),
        ("AVIF", {"save_all": True, "quality": 100, "subsampling": "4:4:4"}, 3),
        ("BMP", {}, 0),
        ("PPM", {}, 0),
        ("TGA", {}, 0),
        ("JPEG2000", {}, 0),
        ("JPEG", {"quality": 100, "subsampling": 0}, 3),
        ("ICO", {"sizes": [(SIDE, SIDE)]}, 0),
        ("PCX", {}, 0),
        ("SGI", {}, 0),
        ("QOI", {}, 0),
    ],
)
def test_every_kind_of_file_gives_its_first_frame(kind, options, tolerance, tokenize, tmp_path):
    blocks = np.repeat(np.repeat(noise(3, side=4), 8, 0), 8, 1) // 64 * 64  # few colours: a GIF's palette holds them
    frames = [Image.fromarray(blocks), Image.fromarray(255 - blocks), Image.fromarray(blocks // 2)]
    more = {"append_images": frames[1:]} if "save_all" in options else {}
    path = tmp_path / "picture"
    path.write_bytes(file_of(frames[0], kind, **options, **more))
    pixels = pixels_of([str(path), frames[0], path.read_bytes()])
    assert pixels.shape == (3, 3, SIDE, SIDE)
    for opened in (pixels[:1], pixels[2:], tokenize.preprocess(path)["pixel_values"]):
        assert np.abs(in_steps(opened) - blocks).max() <= tolerance + 1e-3
    record = {"image": {"bytes": path.read_bytes(), "path": None}}
    for crop in (False, True):
        assert torch.equal(ImageCollator(processor(), random_crop=crop)([record]), pixels[:1])


def test_a_frame_that_was_chosen_is_kept(tmp_path):
    frames = [Image.new("RGB", (SIDE, SIDE), (shade, 0, 0)) for shade in (0, 64, 128)]
    frames[0].save(tmp_path / "three.tiff", save_all=True, append_images=frames[1:])
    image = Image.open(tmp_path / "three.tiff")
    image.seek(2)
    assert open_image(image).getpixel((0, 0)) == (128, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied_at_every_door(orientation, kind, tokenize, tmp_path):
    """The corners of an upright picture, in reading order, are black, red, green, blue."""
    corners = np.zeros((2, 2, 3), np.uint8)
    corners[0, 1, 0] = corners[1, 0, 1] = corners[1, 1, 2] = 255
    upright = np.repeat(np.repeat(corners, SIDE // 2, 0), SIDE // 2, 1)
    stored = {  # what a camera stores, by the meaning of the tag: where row 0 and column 0 are
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    path = tmp_path / f"turned.{kind.lower()}"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, kind, exif=exif, **options)
    record = {"bytes": path.read_bytes(), "path": None}
    doors = [pixels_of(path), pixels_of(Image.open(path)), pixels_of(record), tokenize.preprocess(path)["pixel_values"]]
    doors += [ImageCollator(processor(), random_crop=crop)([{"image": record}]) for crop in (False, True)]
    for pixels in doors:
        assert np.abs(in_steps(pixels) - upright)[4:-4, 4:-4].mean() < 2


def test_corrupt_exif_data_turn_nothing():
    image = Image.fromarray(noise(3))
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", b"x"):
        image.info["exif"] = exif
        assert open_image(image).tobytes() == image.tobytes()


def test_a_pgm_of_16_bits_is_one_whatever_its_values_are(tmp_path):
    path = tmp_path / "dark.pgm"
    path.write_bytes(b"P5\n2 1\n65535\n" + np.array([100, 257], ">u2").tobytes())
    assert np.asarray(open_image(path)).tolist() == [[0, 1]]
    path.write_bytes(b"P5\n2 1\n65535\n" + np.array([0, 200], ">u2").tobytes())
    assert np.asarray(open_image(path)).tolist() == [[0, 1]]
    path.write_bytes(b"P5\n2 1\n4095\n" + np.array([0, 4095], ">u2").tobytes())  # 12 bits: its header gives the scale
    assert np.asarray(open_image(path)).tolist() == [[0, 255]]


def test_every_source_gives_the_picture(serve, tmp_path):
    image = of_bands("RGBA", noise(4))
    file = file_of(image, "PNG")
    path = tmp_path / "picture.png"
    path.write_bytes(file)
    in_base64 = base64.encodebytes(file).decode()
    expected = pixels_of(image)
    with path.open("rb") as opened:
        sources = [image, str(path), path, file, bytearray(file), memoryview(file), io.BytesIO(file), opened]
        sources += [{"bytes": file, "path": "gone.png"}, {"bytes": None, "path": str(path)}, {"path": str(path)}]
        sources += [in_base64, in_base64.replace("\n", ""), "data:image/png;base64," + in_base64, serve(file)]
        sources += [np.array(image), torch.tensor(np.array(image)).movedim(-1, 0)]
        for source in sources:
            assert torch.equal(pixels_of(source), expected), source
        opened.seek(7)  # a file is read from its beginning
        assert torch.equal(pixels_of(sources), expected.repeat(len(sources), 1, 1, 1))


def test_16_bits_behind_a_url(serve):
    image, _ = case("I;16")
    assert torch.equal(pixels_of(serve(file_of(image, "PNG"))), pixels_of(image))


def test_what_is_no_picture(serve, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = file_of(Image.fromarray(noise(3, side=64)), "PNG")
    files = {
        "cut.png": whole[:2000],
        "text.png": b"no picture",
        "empty.png": b"",
        "corrupt.png": whole[:60] + bytes(2000),
    }
    for name, data in files.items():
        Path(name).write_bytes(data)
    Path("folder").mkdir()
    text = serve(b"<html>")
    cases = {
        "missing.png": (FileNotFoundError, "there is no picture missing.png"),
        Path("missing.png"): (FileNotFoundError, "there is no picture missing.png"),
        "s3://bucket/a.png": (FileNotFoundError, "there is no picture s3://bucket/a.png"),
        "a\0b": (FileNotFoundError, "there is no picture"),
        "no." * 5000: (FileNotFoundError, "there is no picture no.no."),
        "/dev/null": (FileNotFoundError, "there is no picture /dev/null"),
        "folder": (ValueError, "folder is a folder"),
        "cut.png": (ValueError, "cannot read image cut.png: .*truncated"),
        "corrupt.png": (ValueError, "cannot read image corrupt.png: "),
        "text.png": (ValueError, "cannot read image text.png: not an image file"),
        "empty.png": (ValueError, "cannot read image empty.png: not an image file"),
        "": (ValueError, "cannot read image '', which is no existing file"),
        "cats/cat0001": (ValueError, "cannot read image 'cats/cat0001', which is no existing file"),
        "data:image/png;base64,@@": (ValueError, "cannot read image data:image/png;base64,@@: not base64"),
        "http://127.0.0.1:9/a.png": (FileNotFoundError, "cannot fetch picture http://127.0.0.1:9/a.png: "),
        "http://": (FileNotFoundError, "cannot fetch picture http://: "),
        serve(b"", status=404): (FileNotFoundError, "cannot fetch picture .*404"),
        text: (ValueError, f"cannot read image {text}: not an image file"),
        b"abc": (ValueError, "cannot read image of 3 bytes without a file name: not an image file"),
        b"": (ValueError, "cannot read image of 0 bytes"),
        None: (ValueError, "expected a picture: .* got NoneType"),
        3: (ValueError, "expected a picture: .* got int"),
    }
    for source, (error, message) in cases.items():
        with pytest.raises(error, match=message) as caught:
            open_image(source)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    closed = Image.open(io.BytesIO(whole))
    closed.close()
    unhashable = [
        ({"bytes": None, "path": None}, "both its bytes and its path are None"),
        ({"bytes": b"abc", "path": "a.png"}, "cannot read image a.png: not an image file"),
        ({"image": whole}, "got dict"),
        ({}, "got dict"),
        ([whole], "got list. Pass many as a flat list"),
        (io.StringIO("text"), "cannot read image in memory"),
        (closed, "cannot read image in memory"),
        (Image.new("RGB", (0, 5)), "it has no pixels"),
        (Image.new("F", (4, 4)), "mode F have no fixed range"),
        (Image.fromarray(np.array([[-1, 5]], np.int32)), "values -1 to 5 have no fixed range"),
        (Image.fromarray(np.array([[0, 70000]], np.int32)), "values 0 to 70000 have no fixed range"),
        (Image.fromarray(np.array([[0, 200]], np.int32)), r"up to 200 may have 8 or 16 bits .*convert\(\"I;16\"\)"),
    ]
    for source, message in unhashable:
        with pytest.raises(ValueError, match=message) as caught:
            open_image(source)
        assert "\n" not in str(caught.value)


def test_the_ways_out_of_an_ambiguous_picture():
    image = Image.fromarray(np.array([[0, 200]], np.int32))
    assert np.asarray(open_image(image.convert("L"))).tolist() == [[0, 200]]
    assert np.asarray(open_image(image.convert("I;16"))).tolist() == [[0, 1]]
    assert np.asarray(open_image(Image.new("I", (2, 1)))).tolist() == [[0, 0]]  # black either way
