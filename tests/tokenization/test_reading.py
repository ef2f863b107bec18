"""Tokens are read with the model that made them alone, and decode to its reconstructions."""

import json
import shutil
from datetime import datetime

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from builders import make, plain_config
from optvq_hf import OptVQImageProcessor, OptVQModel
from optvq_hf.commands import detokenize
from optvq_hf.tokenization import load_tokens
from optvq_hf.training.models import make_image_processor


@pytest.fixture
def tokens(tokenize, tmp_path):
    return tokenize(tmp_path / "tokens")


@pytest.fixture
def other_model(tmp_path):
    """A later revision of the model: the same configuration, other weights."""
    model = make(plain_config(image_size=16, num_channels=1, codebook_size=300))
    model.quantizer.embedding.weight.data.add_(0.01)
    model.save_pretrained(tmp_path / "other")
    make_image_processor(model.config).save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def test_pictures_are_the_reconstructions_of_the_model(tokens, model_folder, pictures, tmp_path, capsys):
    model, processor = OptVQModel.from_pretrained(model_folder), OptVQImageProcessor.from_pretrained(model_folder)
    rows = datasets.load_dataset(str(pictures), split="train")
    readable = [number for number in range(50) if number != 17]
    with torch.no_grad():
        pixel_values = processor([rows[number]["image"] for number in readable], return_tensors="pt").pixel_values
        expected = processor.postprocess(model(pixel_values).reconstruction)
    for batch_size in ("1", "32"):
        out = tmp_path / batch_size
        detokenize.main(["--tokens", str(tokens), "--output-dir", str(out), "--batch-size", batch_size])
        assert "49" in capsys.readouterr().out
        for number, picture in zip(readable, expected, strict=True):
            assert np.array_equal(Image.open(out / f"{number:08}.png"), picture)
    folder = datasets.load_dataset("imagefolder", data_dir=str(out), split="train")
    assert len(folder) == 49 and sorted(folder["index"]) == readable
    assert all(row["label"] == row["index"] % 3 for row in folder)


def test_names_of_flips_and_crops(tokenize, tmp_path):
    out = tokenize(tmp_path / "tokens", flips="true", crops=1, max_images=2)
    detokenize.main(["--tokens", str(out), "--output-dir", str(tmp_path / "out")])
    indices = sorted(set(load_tokens(out)["index"]))
    names = {f"{prefix}{index:08}.png" for index in indices for prefix in ("", "flipped_", "crop1_", "crop1_flipped_")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"metadata.jsonl", "tokens.json"}


def test_other_weights_are_refused(tokens, other_model, model_folder, tmp_path, capsys):
    message = r"were made by .* with weights \w{12}, but .* has weights \w{12}: load that model and revision"
    for model in (other_model, OptVQModel.from_pretrained(other_model)):
        with pytest.raises(ValueError, match=message):
            load_tokens(tokens, model)
    assert len(load_tokens(tokens, OptVQModel.from_pretrained(model_folder))) == 49
    with pytest.raises(SystemExit):
        detokenize.main(["--tokens", str(tokens), "--output-dir", str(tmp_path / "out"), "--model", str(other_model)])
    assert "load that model and revision" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_is_no_folder_of_tokens(tokens, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json: `optvq tokenize` writes one"):
        load_tokens(tmp_path)
    with pytest.raises(OSError, match="nobody/nothing"):
        load_tokens("nobody/nothing")
    with pytest.raises(ValueError, match="there is no split 'test'; its splits are train"):
        load_tokens(tokens, split="test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: "{", r"manifest\.json is broken"),
        (
            lambda manifest: json.dumps({**manifest, "format": 7}),
            "has format 7, this version of optvq_hf reads format 1",
        ),
        (lambda manifest: json.dumps({**manifest, "splits": []}), r"manifest\.json is broken.*splits"),
        (lambda manifest: json.dumps({**manifest, "splits": {"train": {"shards": [{}], "settings": {}}}}), "is broken"),
    ],
)
def test_a_broken_manifest(tokens, change, message):
    path = tokens / "manifest.json"
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(ValueError, match=message):
        load_tokens(tokens)


@pytest.mark.parametrize(("flags", "missing"), [(["--tokens", "x"], "output-dir"), (["--output-dir", "x"], "tokens")])
def test_missing_arguments(flags, missing, capsys):
    with pytest.raises(SystemExit) as stop:
        detokenize.main(flags)
    assert stop.value.code == 2 and f"--{missing} is missing" in capsys.readouterr().err


def test_pictures_of_a_missing_shard_are_not_begun(tokens, tmp_path, capsys):
    shutil.rmtree(tokens / "data")
    with pytest.raises(SystemExit):
        detokenize.main(["--tokens", str(tokens), "--output-dir", str(tmp_path / "out")])
    assert "is missing" in capsys.readouterr().err and not (tmp_path / "out").exists()


def detokenized(tokens, out, *flags):
    detokenize.main(["--tokens", str(tokens), "--output-dir", str(out), *flags])
    return [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]


def test_a_folder_holds_the_pictures_of_the_same_tokens(tokenize, tmp_path, capsys):
    """Others are refused, or removed with --overwrite; files of somebody else are never touched."""
    tokens, others, out = tokenize(tmp_path / "a", max_images=5), tokenize(tmp_path / "b"), tmp_path / "out"
    assert len(detokenized(tokens, out)) == len(detokenized(tokens, out)) == 5
    for flags in ([tokens, "--max-images", "2"], [others]):
        with pytest.raises(SystemExit):
            detokenized(flags[0], out, *flags[1:])
        assert "holds pictures of other tokens, or of another number of them: choose" in capsys.readouterr().err
    assert len(list(out.glob("*.png"))) == 5
    assert len(detokenized(tokens, out, "--max-images", "2", "--overwrite")) == len(list(out.glob("*.png"))) == 2
    (out / "mine.png").write_bytes(b"")
    for folder, name in ((tokens, "README.md"), (out, "mine.png")):
        with pytest.raises(SystemExit):
            detokenized(tokens, folder, "--overwrite")
        assert f"holds {name}, which `optvq detokenize` has not written" in capsys.readouterr().err
    assert len(load_tokens(tokens)) == 5 and len(list(out.glob("*.png"))) == 3


def test_columns_that_are_no_metadata_are_skipped(tokenize, pictures, tmp_path, capsys):
    """Of no type of JSON, or with a name that `load_dataset` takes for that of a picture."""
    rows = datasets.load_dataset(str(pictures), split="train").select(range(3))
    rows = rows.map(lambda row: {"mask": row["image"]}).rename_column("name", "file_name")
    rows = rows.add_column("when", [datetime(2020, 1, day) for day in (1, 2, 3)])
    rows = rows.add_column("boxes", [[[1.0, 2.0]], [], [[3.0, 4.0]]]).add_column("raw", [b"a", b"b", b"c"])
    rows = rows.add_column("parts", [{"mask_file_name": "x", "number": 1}] * 3)
    rows.save_to_disk(tmp_path / "source")
    columns = "label,mask,file_name,when,boxes,raw,parts"
    tokens = tokenize(tmp_path / "tokens", dataset=tmp_path / "source", columns=columns, image_column="image")
    entries = detokenized(tokens, tmp_path / "out")
    assert "metadata.jsonl cannot hold: mask, file_name, raw, parts\n" in capsys.readouterr().out
    when, boxes = "2020-01-02 00:00:00", []
    assert entries[1] == {"file_name": "00000001.png", "index": 1, "label": 1, "when": when, "boxes": boxes}
    folder = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "out"), split="train")
    assert folder["label"] == [0, 1, 2] and folder[2]["boxes"] == [[3.0, 4.0]] and folder[0]["image"].size == (16, 16)


def test_the_model_of_a_folder_that_is_not_here(tokenize, model_folder, tmp_path, monkeypatch, capsys):
    """A relative path is not taken for a Hub id."""
    shutil.copytree(model_folder, tmp_path / "runs" / "mnist")
    monkeypatch.chdir(tmp_path)
    tokens = tokenize(tmp_path / "tokens", model="runs/mnist", max_images=2)
    assert len(detokenized(tokens, tmp_path / "here")) == 2
    monkeypatch.chdir(tokens)
    with pytest.raises(SystemExit):
        detokenized(tokens, tmp_path / "there")
    assert "made by the model of a folder, runs/mnist, which is not here: pass --model" in capsys.readouterr().err
    assert len(detokenized(tokens, tmp_path / "there", "--model", str(model_folder))) == 2
