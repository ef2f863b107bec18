"""Arrays and tensors as pictures."""

import numpy as np
import pytest
import torch

from builders import noise, on_white
from optvq_hf.image_opening_optvq import read_array


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor], ids=["array", "tensor"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_arrays_of_every_shape(kind, channels):
    values = noise(channels, side=8)
    expected = on_white(values[..., :3], values[..., 3]).round() if channels == 4 else values
    for array, layout in (
        (values, None),
        (values, "channels_last"),
        (np.moveaxis(values, -1, 0).copy(), None),
        (np.moveaxis(values, -1, 0).copy(), "channels_first"),
    ):
        pixels = read_array(kind(array), layout)
        assert pixels.dtype == torch.uint8 and pixels.shape == (3 if channels == 4 else channels, 8, 8)
        assert np.array_equal(pixels.movedim(0, -1).numpy(), expected)
        floats = read_array(kind(array / np.float32(255)), layout, floats=True)
        assert floats.dtype == torch.float32 and np.abs(floats.movedim(0, -1).numpy() * 255 - expected).max() <= 0.501
    if channels == 1:
        assert np.array_equal(read_array(kind(values[..., 0]))[0].numpy(), values[..., 0])


def test_arrays_of_odd_memory():
    values = noise(3, side=8)
    frozen = values.copy()
    frozen.flags.writeable = False
    for array in (values[::-1, ::-1][::-1, ::-1], np.asfortranarray(values), frozen):
        assert np.array_equal(read_array(array).movedim(0, -1).numpy(), values)


def test_input_data_format_decides_what_can_be_read_in_two_ways():
    array = np.arange(3 * 5 * 3, dtype=np.uint8).reshape(3, 5, 3)
    assert read_array(array, "channels_first").shape == (3, 5, 3)
    assert read_array(array, "channels_last").shape == (3, 3, 5)
    with pytest.raises(ValueError, match=r"the shape \(3, 5, 3\) can be read in two ways: .*input_data_format"):
        read_array(array)


@pytest.mark.parametrize(
    "dtype",
    ["bool", "int8", "uint16", "int16", "int32", "uint32", "int64", "float16", "float32", "float64", "complex64"],
)
@pytest.mark.parametrize("kind", [np.asarray, torch.tensor], ids=["array", "tensor"])
def test_other_dtypes_are_refused(dtype, kind):
    with pytest.raises(ValueError, match=rf"must be uint8, .*got {dtype} \(3, 8, 8\)"):
        read_array(kind(np.zeros((3, 8, 8), dtype)))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.zeros((28, 28, 28), np.uint8),
            r"\(28, 28, 28\) is not that of one picture: .*Pass many pictures as a list",
        ),
        (np.zeros((100, 28, 28), np.uint8), r"\(100, 28, 28\) is not that of one picture"),
        (np.zeros((2, 8, 8), np.uint8), r"\(2, 8, 8\) is not that of one picture"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"\(2, 3, 8, 8\) is not that of one picture"),
        (np.zeros(8, np.uint8), r"\(8,\) is not that of one picture"),
        (np.zeros((), np.uint8), r"\(\) is not that of one picture"),
        (np.zeros((0, 8), np.uint8), r"\(0, 8\) has no pixels"),
        (np.zeros((3, 0, 8), np.uint8), r"\(3, 0, 8\) has no pixels"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8).to_sparse(), "must be dense"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8, device="meta"), "on meta"),
    ],
)
def test_shapes_that_are_no_picture(array, message):
    with pytest.raises(ValueError, match=message):
        read_array(array)


def test_floats_outside_of_the_unit_interval():
    for wrong in (255.0, -0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"floats must lie in \[0, 1\], got "):
            read_array(np.array([[0.5, wrong]]), floats=True)
    with pytest.raises(ValueError, match="input_data_format must be .* got 'none'"):
        read_array(np.zeros((3, 8, 8), np.uint8), "none")
