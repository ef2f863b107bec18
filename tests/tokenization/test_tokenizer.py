"""The tokenizer of batches, as `datasets.map` and others call it."""

import io
import pickle
import shutil
import weakref

import datasets
import numpy as np
import PIL.Image
import pytest
from datasets.fingerprint import Hasher

from builders import make_untrained, noise, plain_config
from optvq_hf import OptVQImageProcessor, OptVQModel
from optvq_hf.data.loading import UnreadableImageError, decode_image
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


def test_a_map_does_not_return_codes_of_other_files(model_folder, rows, tmp_path):
    """Results that `datasets` keeps are found by the content of the model, wherever it lies, and not by its name."""
    rows, folder = rows.select(range(3)), tmp_path / "model"
    hashes = []

    def codes():
        hashes.append(Hasher.hash(OptVQTokenizer(str(folder))))
        tokenizer = OptVQTokenizer(str(folder))
        mapped = rows.map(tokenizer, batched=True, remove_columns=rows.column_names)
        assert Hasher.hash(tokenizer) == hashes[-1]  # also once it is loaded
        return np.array(mapped["codes"])

    shutil.copytree(model_folder, folder)
    before, pickled = codes(), pickle.dumps(OptVQTokenizer(str(folder)))
    model = OptVQModel.from_pretrained(folder)
    model.quantizer.embedding.weight.data = model.quantizer.embedding.weight.data.flip(0)
    model.save_pretrained(folder)
    assert np.array_equal(codes(), 299 - before)
    OptVQImageProcessor.from_pretrained(folder, size={"shortest_edge": 30}).save_pretrained(folder)
    assert (codes() != 299 - before).any() and len(set(hashes)) == 3
    with pytest.raises(ValueError, match="have changed since its tokenizer was pickled"):
        pickle.loads(pickled)(rows[:])


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


@pytest.mark.parametrize("crops", [0, 1])
def test_a_picture_smaller_than_the_crop_is_named(model_folder, crops):
    processor = OptVQImageProcessor.from_pretrained(model_folder, do_resize=False)
    tokenizer = OptVQTokenizer(str(model_folder), image_processor=processor, crops=crops)
    pictures = [PIL.Image.fromarray(noise(1, size, number)[:, :, 0]) for number, size in enumerate((20, 8, 16, 600, 8))]
    batch = {"image": pictures, "number": list(range(5))}
    with pytest.raises(
        UnreadableImageError, match="image 1 of a batch: a picture of 8 x 8 pixels is smaller than the crop"
    ):
        tokenizer(batch)
    tokenizer.skip_unreadable = True
    made = tokenizer(batch)
    assert made["number"][:: crops + 1] == [0, 2, 3] and [
        number for number, _ in tokenizer.prepare(batch).unreadable
    ] == [1, 4]
    alone = [tokenizer({"image": [pictures[number]]})["codes"] for number in (0, 2, 3)]
    assert np.array_equal(made["codes"], np.concatenate(alone))


def test_large_pictures_are_cropped_one_by_one(model_folder, monkeypatch):
    """A batch does not hold them all at their full size."""
    content = io.BytesIO()
    PIL.Image.fromarray(noise(1, 520)[:, :, 0]).save(content, "jpeg")
    decoded, most = [], []

    def decode(record):
        picture = decode_image(record)
        decoded.append(weakref.ref(picture))
        most.append(sum(reference() is not None for reference in decoded))
        return picture

    monkeypatch.setattr("optvq_hf.tokenization.tokenizer.decode_image", decode)
    tokenizer = OptVQTokenizer(str(model_folder))
    codes = tokenizer({"image": [{"bytes": content.getvalue(), "path": None}] * 6})["codes"]
    assert len(most) == 6 and max(most) <= 2
    processor = OptVQImageProcessor.from_pretrained(model_folder)
    pixel_values = processor([PIL.Image.open(content)] * 6, return_tensors="pt").pixel_values
    assert np.array_equal(codes, tokenizer.model.encode(pixel_values).codes)


def test_a_batch_without_images(model_folder):
    with pytest.raises(ValueError, match="the batch has no column 'image'; its columns are picture"):
        OptVQTokenizer(str(model_folder))({"picture": []})


@pytest.mark.parametrize(
    ("codebook_size", "dtype"), [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)]
)
def test_the_smallest_type_that_holds_all_codes(codebook_size, dtype):
    model = make_untrained(plain_config(codebook_size=codebook_size))
    assert OptVQTokenizer(model, image_processor=OptVQImageProcessor()).value_dtype == dtype


def test_bfloat16(model_folder, rows):
    tokenizer = OptVQTokenizer(str(model_folder), dtype="bfloat16")
    together = tokenizer(rows[:16])["codes"]
    assert tokenizer.model.dtype.itemsize == 2
    alone = np.concatenate([tokenizer({"image": [rows[number]["image"]]})["codes"] for number in range(16)])
    assert np.array_equal(together, alone)


def test_codes_without_a_fixed_shape(model_folder, rows):
    processor = OptVQImageProcessor.from_pretrained(model_folder, do_center_crop=False)
    with pytest.raises(ValueError, match="set do_center_crop"):
        OptVQTokenizer(str(model_folder), image_processor=processor).value_shape()
    processor = OptVQImageProcessor.from_pretrained(model_folder, crop_size={"height": 18, "width": 16})
    with pytest.raises(ValueError, match="crops to 18 x 16 pixels, which the downsampling factor 4"):
        OptVQTokenizer(str(model_folder), image_processor=processor).value_shape()
