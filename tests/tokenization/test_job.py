"""All that decides the shards of a split: what is judged of them together, and what is compared when they are made again."""

import json
import os

import datasets
import pytest

from optvq_hf.tokenization import load_tokens


def refusal(capsys):
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("optvq tokenize: error: ")]
    return line


@pytest.fixture
def rows(pictures):
    return datasets.load_dataset(str(pictures), split="train").cast_column("image", datasets.Image(decode=False))


@pytest.fixture
def broken(tmp_path, rows):
    """broken(number, readable): a file of so many images that cannot be read, before so many that can."""

    def make(number, readable=0):
        images = [{"bytes": b"broken", "path": f"{n}.png"} for n in range(number)] + [rows[0]["image"]] * readable
        features = datasets.Features({"image": datasets.Image()})
        path = tmp_path / f"broken{number}.parquet"
        datasets.Dataset.from_dict({"image": images}, features=features).to_parquet(path)
        return path

    return make


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_no_image_can_be_read(tokenize, broken, tmp_path, capsys, streaming):
    flags = {"columns": None, "max_unreadable": 1, "streaming": streaming, "shard_size": 4}
    with pytest.raises(SystemExit):
        tokenize(tmp_path / "out", dataset=broken(8), **flags)
    assert "none of the 8 images can be read; the last: cannot read image 7.png" in refusal(capsys)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_the_shards_of_all_runs_are_judged_together(tokenize, broken, tmp_path, capsys):
    """Finished shards are not counted again, but judged again."""
    source, flags = broken(150, 1), {"columns": None, "max_unreadable": 1}
    out = tokenize(tmp_path / "out", dataset=source, **flags)
    with pytest.raises(SystemExit):
        tokenize(out, dataset=source, **{**flags, "max_unreadable": 0.5})
    assert "150 of 151 images cannot be read, --max-unreadable is 0.5" in refusal(capsys)


def test_names_may_be_spelled_differently(tokenize, tmp_path, model_folder, pictures, capsys):
    out = tokenize(tmp_path / "out", max_images=20)
    other = [os.path.relpath(path) for path in (model_folder, pictures)]
    tokenize(out, model=other[0], dataset=other[1], max_images=20)
    assert "1 finished shards" in capsys.readouterr().out
    assert json.loads((out / "manifest.json").read_text())["model"]["id"] == other[0]
    assert len(load_tokens(out, other[0])) in (19, 20)
