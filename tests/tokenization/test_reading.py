"""Tokens are read with the model that made them alone, and decode to its reconstructions."""

import json
import shutil

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
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"metadata.jsonl"}


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
