import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from optvq_hf import OptVQImageProcessor


def small(**fields):
    return OptVQImageProcessor(**{"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, **fields})


def picture(mode="RGB", size=(48, 40)):
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK"])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_every_mode_gives_the_channels_asked_for(mode, num_channels):
    pixels = small(num_channels=num_channels)(picture(mode), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, num_channels, 32, 32) and pixels.dtype == torch.float32
    assert -1 <= pixels.min() < pixels.max() <= 1


def test_values_are_scaled_to_minus_one_and_one():
    stripes = Image.fromarray(np.tile(np.array([0, 255], dtype=np.uint8), (32, 16)))
    pixels = small(num_channels=1)(stripes, return_tensors="pt")["pixel_values"]
    assert sorted(pixels.unique().tolist()) == [-1, 1]


def test_grey_keeps_its_values_as_one_channel():
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    processor = small(num_channels=1, do_resize=False, do_center_crop=False)
    pixels = processor([ramp, ramp.convert("RGB")], return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels[0], pixels[1])
    assert processor.postprocess(pixels)[0].tobytes() == ramp.tobytes()


def test_colour_to_grey_is_luma():
    red = Image.new("RGB", (32, 32), (255, 0, 0))
    pixels = small(num_channels=1)(red, return_tensors="pt")["pixel_values"]
    assert small(num_channels=1).postprocess(pixels)[0].getpixel((0, 0)) == red.convert("L").getpixel((0, 0)) == 76


def test_shortest_edge_is_resized_and_the_centre_cropped():
    halves = Image.new("RGB", (96, 48), (0, 0, 0))
    halves.paste((255, 255, 255), (24, 0, 72, 48))  # the middle square is white
    pixels = small()(halves, return_tensors="pt")["pixel_values"]
    assert pixels[..., 2:-2].min() > 0.99


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_postprocess_inverts(mode):
    image = picture(mode, (32, 32))
    processor = small(num_channels=len(image.getbands()))
    [again] = processor.postprocess(processor(image, return_tensors="pt")["pixel_values"])
    assert again.mode == mode and again.tobytes() == image.tobytes()
    [clamped] = processor.postprocess(torch.full((1, len(image.getbands()), 4, 6), 7.0))
    assert clamped.size == (6, 4) and set(clamped.tobytes()) == {255}


def test_round_trip_and_auto_class(tmp_path):
    processor = small(num_channels=1)
    processor.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(again, OptVQImageProcessor) and again.num_channels == 1
    image = picture()
    assert torch.equal(
        again(image, return_tensors="pt")["pixel_values"], processor(image, return_tensors="pt")["pixel_values"]
    )


def test_arrays_tensors_and_lists():
    image = picture(size=(32, 32))
    array = np.array(image)
    expected = small()(image, return_tensors="pt")["pixel_values"]
    for same in (array, torch.from_numpy(array).permute(2, 0, 1), [image, array]):
        assert torch.equal(small()(same, return_tensors="pt")["pixel_values"][-1:], expected)


def test_16_bit_pictures_keep_their_greys():
    ramp = np.linspace(0, 65535, 1024).astype(np.uint16).reshape(32, 32)
    processor = small(num_channels=1)
    for image in (Image.fromarray(ramp), Image.fromarray(ramp.astype(np.int32))):
        pixels = processor(image, return_tensors="pt")["pixel_values"].flatten()
        assert pixels[0] == -1 and pixels[-1] == 1 and abs(pixels.mean()) < 0.01 and len(pixels.unique()) == 256


def test_errors():
    with pytest.raises(ValueError, match="mode F have no fixed range"):
        small()(Image.new("F", (32, 32)))
    with pytest.raises(ValueError, match="got 5"):
        small()(picture(), num_channels=5)
    with pytest.raises(ValueError, match="num_channels must be 1 .* or 3 .*, got 2"):
        OptVQImageProcessor(num_channels=2)
    with pytest.raises(ValueError, match=r"reconstruction must be .* got \(2, 4, 8, 8\)"):
        small().postprocess(torch.zeros(2, 4, 8, 8))
