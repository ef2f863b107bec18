import functools

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
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


def test_lists_of_mixed_sources_give_one_picture_each(tmp_path):
    path = tmp_path / "frames.gif"
    frames = [Image.new("RGB", (32, 32), (shade, 0, 0)) for shade in (0, 64, 128)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    image = picture(size=(32, 32))
    sources = [str(path), image, np.array(image), path.read_bytes(), np.array(image)[..., 0], picture("RGBA")]
    for given in (sources, tuple(sources)):
        pixels = small()(given, return_tensors="pt")["pixel_values"]
        assert pixels.shape == (6, 3, 32, 32)
        for source, one in zip(sources, pixels):
            assert torch.equal(small()(source, return_tensors="pt")["pixel_values"][0], one)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_batches_of_arrays(channels):
    batch = np.random.default_rng(0).integers(0, 256, (5, 40, 48, channels), dtype=np.uint8)
    expected = small()(list(batch), return_tensors="pt")["pixel_values"]
    assert expected.shape == (5, 3, 32, 32)
    for same in (batch, np.moveaxis(batch, -1, 1), torch.tensor(batch), torch.tensor(batch).movedim(-1, 1)):
        assert torch.equal(small()(same, return_tensors="pt")["pixel_values"], expected)


def test_raw_mnist_is_grayscale():
    digits = np.random.default_rng(0).integers(0, 256, (10, 28, 28), dtype=np.uint8)
    processor = small(num_channels=1, do_resize=False, do_center_crop=False)
    pixels = processor(list(digits), return_tensors="pt")["pixel_values"]
    assert torch.equal(((pixels[:, 0] + 1) * 127.5).round().byte(), torch.tensor(digits))
    with pytest.raises(ValueError, match=r"\(10, 28, 28\) is not that of one picture.*Pass many pictures as a list"):
        processor(digits)


def test_a_column_of_a_dataset(tmp_path):
    images = [picture(size=(32 + number, 40)) for number in range(3)]
    dataset = datasets.Dataset.from_dict({"image": images}, datasets.Features({"image": datasets.Image()}))
    expected = small()(images, return_tensors="pt")["pixel_values"]
    for column in (dataset["image"], dataset.cast_column("image", datasets.Image(decode=False))["image"]):
        assert torch.equal(small()(column, return_tensors="pt")["pixel_values"], expected)


def test_floats_are_taken_where_nothing_rescales_them():
    image = picture(size=(32, 32))
    expected = small()(image, return_tensors="pt")["pixel_values"]
    floats = np.asarray(image) / 255
    for array in (floats, torch.tensor(floats), floats.astype(np.float32), np.moveaxis(floats, -1, 0)[None]):
        pixels = small(do_rescale=False)(array, return_tensors="pt")["pixel_values"]
        assert pixels.dtype == torch.float32
        torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)
    checkers = np.indices((48, 48)).sum(0) // 5 % 2 * 1.0
    bicubic = small(do_rescale=False, resample=3)(checkers, return_tensors="pt")["pixel_values"]
    assert bicubic.min() == -1 and bicubic.max() == 1  # the filter overshoots; uint8 cannot
    for wrong in (image, np.asarray(image)):
        with pytest.raises(ValueError, match="do_rescale=False is for floats"):
            small()(wrong, do_rescale=False)
    with pytest.raises(ValueError, match=r"floats must lie in \[0, 1\], got 0 to 255"):
        small()(np.asarray(image) * 1.0, do_rescale=False)
    for wrong in (floats, np.asarray(image).astype(np.uint16), np.asarray(image).astype(np.int64)):
        with pytest.raises(ValueError, match=f"must be uint8, .* got {wrong.dtype}"):
            small()(wrong)


@pytest.mark.parametrize(
    ("size", "shape"),
    [(40, (40, 48)), ({"shortest_edge": 40}, (40, 48)), ({"height": 40, "width": 36}, (40, 36)), ([40, 36], (40, 36))],
)
def test_sizes(size, shape):
    image = picture(size=(96, 80))
    pixels = small(size=size, do_center_crop=False)(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, *shape)
    assert small(size=size)(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)


def test_small_pictures_are_not_filled_up_with_black():
    with pytest.raises(ValueError, match="a picture of 20 x 40 pixels is smaller than the crop of 32 x 32: resize it"):
        small(do_resize=False)(picture(size=(40, 20)))
    with pytest.raises(ValueError, match="a picture of 16 x 32 pixels is smaller than the crop of 32 x 32"):
        small(size={"shortest_edge": 16})(picture(size=(40, 20)))
    assert small()(picture(size=(2, 1)), return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)


def test_pictures_of_different_sizes():
    images = [picture(size=(40, 36)), picture(size=(48, 36))]
    processor = small(do_center_crop=False, do_resize=False)
    with pytest.raises(ValueError, match=r"different sizes, \[\(36, 40\), \(36, 48\)\], make no batch"):
        processor(images, return_tensors="pt")
    assert [tuple(one.shape) for one in processor(images)["pixel_values"]] == [(3, 36, 40), (3, 36, 48)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_channels": 5}, "num_channels must be .*, got 5"),
        ({"size": 0}, "size must be positive, got {'shortest_edge': 0}"),
        ({"size": {"height": -1, "width": 8}}, "size must be positive"),
        ({"crop_size": {"height": 8, "width": 0}}, "crop_size must be positive, got"),
        ({"size": (32,)}, r"size must be one number, a height and a width, or a dict; got \(32,\)"),
        ({"crop_size": {"shortest_edge": 8}}, "crop_size must have a height and a width, got {'shortest_edge': 8}"),
        ({"resample": 77}, "resample must be one of .*, got 77"),
        ({"image_mean": [0.5, 0.5]}, "image_mean must be one or three finite numbers"),
        ({"image_mean": float("nan")}, "image_mean must be one or three finite numbers"),
        ({"image_std": 0.0}, "image_std above 0; got 0.0"),
        ({"rescale_factor": float("inf")}, "rescale_factor must be positive and finite, got inf"),
        ({"rescale_factor": 0.0}, "rescale_factor must be positive and finite, got 0.0"),
        ({"data_format": "channels_last"}, "data_format must be channels_first, got channels_last"),
        ({"input_data_format": "none"}, "input_data_format must be"),
    ],
)
def test_wrong_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        small()(np.asarray(picture()), return_tensors="pt", **fields)


def test_one_mean_for_all_channels():
    expected = small()(picture(), return_tensors="pt")["pixel_values"]
    processor = small(image_mean=0.5, image_std=0.5)
    assert torch.equal(processor(picture(), return_tensors="pt")["pixel_values"], expected)
    assert processor.postprocess(expected)[0].tobytes() == small().postprocess(expected)[0].tobytes()


def test_do_convert_rgb_does_not_decide_the_channels():
    for image in (picture("L"), picture("RGBA"), picture()):
        expected = small()(image, return_tensors="pt")["pixel_values"]
        assert torch.equal(small(do_convert_rgb=False)(image, return_tensors="pt")["pixel_values"], expected)


def test_errors():
    for nothing in ([], (), np.zeros((0, 3, 8, 8), np.uint8)):
        with pytest.raises(ValueError, match="there are no pictures to process"):
            small()(nothing)
    image = picture()
    for wrong, name in (
        (None, "NoneType"),
        ([[image], [image]], "list"),
        ([image, None], "NoneType"),
        ({1}, "set"),
    ):
        with pytest.raises(ValueError, match=f"expected a picture: .* got {name}"):
            small()(wrong)
    with pytest.raises(ValueError, match="mode F have no fixed range"):
        small()(Image.new("F", (32, 32)))
    with pytest.raises(ValueError, match="num_channels must be 1 .* or 3 .*, got 2"):
        OptVQImageProcessor(num_channels=2)


@pytest.mark.parametrize(
    ("reconstruction", "message"),
    [
        (torch.zeros(2, 4, 8, 8), r"reconstruction must be .* got \(2, 4, 8, 8\)"),
        (torch.zeros(3, 8, 8), r"reconstruction must be .* got \(3, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "must be a tensor of floats .* got torch.uint8"),
        (np.zeros((2, 3, 8, 8)), "must be a tensor of floats"),
        ([1], "must be a tensor of floats .* got list"),
        (torch.full((1, 3, 8, 8), torch.nan), "values that are not finite"),
        (torch.full((1, 3, 8, 8), torch.inf), "values that are not finite"),
    ],
)
def test_reconstructions_that_are_none(reconstruction, message):
    with pytest.raises(ValueError, match=message):
        small().postprocess(reconstruction)


def test_mistyped_settings(tmp_path):
    OptVQImageProcessor().save_pretrained(tmp_path)
    for name, nearest in {"crop_sise": "crop_size", "num_channel": "num_channels", "do_resise": "do_resize"}.items():
        for make in (OptVQImageProcessor, functools.partial(OptVQImageProcessor.from_pretrained, tmp_path)):
            with pytest.raises(
                ValueError, match=f"OptVQImageProcessor has no setting '{name}', did you mean '{nearest}'"
            ):
                make(**{name: 1})


# ---- pictures of any size --------------------------------------------------------------------------------------------


def test_pictures_of_any_size_are_padded_and_cropped_back():
    processor = small(do_resize=False, do_center_crop=False, pad_to_multiple_of=16)
    image = picture(size=(45, 33))
    features = processor(image, return_tensors="pt")
    assert features.pixel_values.shape == (1, 3, 48, 48) and features.original_sizes.tolist() == [[33, 45]]
    pixels = features.pixel_values[0]
    assert torch.equal(pixels[:, 33:], pixels[:, 32:33].expand(-1, 15, -1))  # the last row and the last column again
    assert torch.equal(pixels[:, :, 45:], pixels[:, :, 44:45].expand(-1, -1, 3))
    [back] = processor.postprocess(features.pixel_values, features.original_sizes)
    assert back.size == (45, 33) and back.tobytes() == image.tobytes()
    assert processor.postprocess(features.pixel_values)[0].size == (48, 48)

    both = processor([picture(size=(45, 33)), picture(size=(48, 48))], return_tensors="pt")
    assert both.pixel_values.shape == (2, 3, 48, 48) and both.original_sizes.tolist() == [[33, 45], [48, 48]]
    assert [one.size for one in processor.postprocess(both.pixel_values, [(33, 45), (48, 48)])] == [(45, 33), (48, 48)]


def test_padding_is_a_setting_like_others(tmp_path):
    assert "original_sizes" not in small()(picture(), return_tensors="pt")
    small(pad_to_multiple_of=16).save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert loaded.pad_to_multiple_of == 16
    assert loaded(picture(), do_center_crop=False, return_tensors="pt").pixel_values.shape == (1, 3, 32, 48)


@pytest.mark.parametrize("multiple", [0, -16, 2.0, 2.5, True, "16"])
def test_what_is_no_multiple(multiple):
    with pytest.raises((ValueError, StrictDataclassError), match="pad_to_multiple_of"):
        small()(picture(), pad_to_multiple_of=multiple)
    with pytest.raises((ValueError, StrictDataclassError), match="pad_to_multiple_of"):
        small(pad_to_multiple_of=multiple)(picture())


NO_SIZES = [[(33, 45), (33, 45)], [(49, 45)], [(0, 45)], [(33,)], [5], [(2.7, 3)], 5, "ab", [(33, 45), (33,)]]


@pytest.mark.parametrize("sizes", NO_SIZES, ids=str)
def test_sizes_that_are_not_of_the_reconstruction(sizes):
    with pytest.raises(ValueError, match="original_sizes must be height and width of 1 pictures of at most 48 x 48"):
        small().postprocess(torch.zeros(1, 3, 48, 48), sizes)
