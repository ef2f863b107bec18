"""The tokenizer of batches, as `datasets.map` and others call it."""

import pickle

import datasets
import numpy as np
import pytest

from builders import make_untrained, plain_config
from optvq_hf import OptVQImageProcessor, OptVQModel
from optvq_hf.data.loading import UnreadableImageError
from optvq_hf.tokenization import OptVQTokenizer


@pytest.fixture(scope="module")
def rows(pictures):
    return datasets.load_dataset(str(pictures), split="train")


@pytest.fixture(scope="module")
def expected(model_folder, rows):
    model = OptVQModel.from_pretrained(model_folder)
    processor = OptVQImageProcessor.from_pretrained(model_folder)
    pictures = [rows[number]["image"] for number in range(17)]
    return model.encode(processor(pictures, return_tensors="pt").pixel_values).codes.numpy()


@pytest.mark.parametrize("num_proc", [None, 2])
@pytest.mark.parametrize("decoded", [True, False])
def test_map_of_datasets(model_folder, rows, expected, decoded, num_proc):
    rows = rows.select(range(17)).cast_column("image", datasets.Image(decode=decoded))
    tokenizer = OptVQTokenizer(str(model_folder))
    mapped = rows.map(tokenizer, batched=True, batch_size=5, remove_columns=rows.column_names, num_proc=num_proc)
    assert mapped.column_names == ["label", "name", "codes"] and mapped["name"] == rows["name"]
    assert np.array_equal(mapped["codes"], expected)


def test_a_map_of_a_stream(model_folder, rows, expected):
    stream = rows.select(range(17)).to_iterable_dataset()
    mapped = list(stream.map(OptVQTokenizer(str(model_folder)), batched=True, batch_size=5, remove_columns=["image"]))
    assert np.array_equal([row["codes"] for row in mapped], expected) and mapped[3]["name"] == "picture 3"


def test_it_can_be_pickled_without_the_weights(model_folder, rows, expected):
    tokenizer = OptVQTokenizer(str(model_folder), flips=True)
    codes = tokenizer(rows[:3])["codes"]
    assert codes.dtype == np.uint16 and np.array_equal(codes[::2], expected[:3])
    content = pickle.dumps(tokenizer)
    assert len(content) < 2000 and np.array_equal(pickle.loads(content)(rows[:3])["codes"], codes)


def test_a_model_is_used_as_it_is(model_folder, rows, expected):
    model = OptVQModel.from_pretrained(model_folder)
    processor = OptVQImageProcessor.from_pretrained(model_folder)
    tokenizer = OptVQTokenizer(model, image_processor=processor, image_column="picture")
    batch = {"picture": [np.asarray(rows[number]["image"]) for number in range(2)], "number": [0, 1]}
    again = pickle.loads(pickle.dumps(tokenizer))
    assert np.array_equal(tokenizer(batch)["codes"], expected[:2]) and np.array_equal(
        again(batch)["codes"], expected[:2]
    )
    with pytest.raises(ValueError, match="pass image_processor"):
        OptVQTokenizer(model)
    with pytest.raises(ValueError, match="move this one yourself"):
        OptVQTokenizer(model, image_processor=processor, dtype="bfloat16")


def test_images_that_cannot_be_read(model_folder, rows):
    batch = rows.cast_column("image", datasets.Image(decode=False))[15:20]
    with pytest.raises(UnreadableImageError, match=r"image 2 of a batch: .*17\.png.*skip_unreadable=True"):
        OptVQTokenizer(str(model_folder))(batch)
    tokenizer = OptVQTokenizer(str(model_folder), skip_unreadable=True)
    assert tokenizer(batch)["name"] == [f"picture {number}" for number in (15, 16, 18, 19)]
    none = tokenizer({name: values[2:3] for name, values in batch.items()})
    assert none["codes"].shape == (0, 2, 4, 4) and none["name"] == []


def test_a_batch_without_images(model_folder):
    with pytest.raises(ValueError, match="the batch has no column 'image'; its columns are picture"):
        OptVQTokenizer(str(model_folder))({"picture": []})


@pytest.mark.parametrize(
    ("codebook_size", "dtype"), [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)]
)
def test_the_smallest_type_that_holds_all_codes(codebook_size, dtype):
    model = make_untrained(plain_config(codebook_size=codebook_size))
    assert OptVQTokenizer(model, image_processor=OptVQImageProcessor()).code_dtype == dtype


def test_bfloat16(model_folder, rows):
    tokenizer = OptVQTokenizer(str(model_folder), dtype="bfloat16")
    together = tokenizer(rows[:16])["codes"]
    assert tokenizer.model.dtype.itemsize == 2
    alone = np.concatenate([tokenizer({"image": [rows[number]["image"]]})["codes"] for number in range(16)])
    assert np.array_equal(together, alone)


def test_codes_without_a_fixed_shape(model_folder, rows):
    processor = OptVQImageProcessor.from_pretrained(model_folder, do_center_crop=False)
    with pytest.raises(ValueError, match="set do_center_crop"):
        OptVQTokenizer(str(model_folder), image_processor=processor).code_shape()
    processor = OptVQImageProcessor.from_pretrained(model_folder, crop_size={"height": 18, "width": 16})
    with pytest.raises(ValueError, match="crops to 18 x 16 pixels, which the downsampling factor 4"):
        OptVQTokenizer(str(model_folder), image_processor=processor).code_shape()
