import datasets
import numpy as np
import pytest
from PIL import Image

from optvq_hf.data.arguments import DataArguments
from optvq_hf.data.loading import load_images
from optvq_hf.data.probe import look_at, warn_of_lost_colour


def make_dataset(folder, images):
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": images}, features).to_parquet(folder / "train-00000-of-00001.parquet")
    return load_images(DataArguments(dataset=str(folder)), "train")


def test_size_and_colour(tmp_path):
    sizes = [(30, 50), (60, 40), (200, 100)]
    grey = [Image.new("L", size, 80) for size in sizes] + [Image.new("RGB", (45, 45), (9, 9, 9))]
    facts = look_at(make_dataset(tmp_path, grey))
    assert (facts.num_images, facts.size, facts.num_colour, facts.num_channels, facts.total) == (4, 40, 0, 1, 4)
    assert str(facts) == "grayscale images of about 40 pixels"


def test_rows_are_looked_at_all_over_a_sorted_dataset(tmp_path, capsys):
    images = [Image.new("RGB", (8, 8), (9, 9, 9))] * 950 + [Image.new("RGB", (8, 8), (200, 9, 9))] * 50
    dataset = make_dataset(tmp_path, images)
    facts = look_at(dataset)
    assert facts.num_images == 64 and 1 <= facts.num_colour <= 6 and facts.num_channels == 3
    warn_of_lost_colour(dataset, 3)
    assert capsys.readouterr().out == ""
    warn_of_lost_colour(dataset, 1)
    assert capsys.readouterr().out == (
        f"warning: {facts.num_colour} of 64 images looked at have colour, and the model is grayscale (num_channels 1): it sees "
        "their luminance\n"
    )


def test_broken_images_are_skipped(tmp_path):
    broken = {"bytes": b"nothing", "path": None}
    facts = look_at(make_dataset(tmp_path, [broken, Image.fromarray(np.zeros((20, 30), np.uint8)), broken]))
    assert (facts.num_images, facts.size, facts.total) == (1, 20, 3)
    with pytest.raises(ValueError, match="none of 1 images looked at can be read; the last: .*not an image file"):
        look_at(make_dataset(tmp_path / "", [broken]))
