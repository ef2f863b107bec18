"""Images of the Hub, tokenized with a model of the Hub, pushed there, and used elsewhere."""

import json
from secrets import token_hex

import datasets
import numpy as np
import pytest

from builders import make, plain_config
from hub.checks import sent
from optvq_hf import OptVQModel
from optvq_hf.commands import detokenize, tokenize
from optvq_hf.data.loading import EMBEDDED
from optvq_hf.tokenization import load_tokens
from optvq_hf.training.models import make_image_processor


pytestmark = pytest.mark.hub


@pytest.fixture
def model_id(hub, alice):
    """A model of alice with two revisions: `main`, and `later` with other weights."""
    model = make(plain_config(image_size=16, num_channels=1, codebook_size=300))
    name = f"alice/{token_hex(4)}"
    make_image_processor(model.config).push_to_hub(name)
    model.push_to_hub(name)
    hub.repository(name).create_branch("later", "main")
    model.quantizer.embedding.weight.data.add_(0.01)
    model.push_to_hub(name, revision="later")
    return name


@pytest.fixture
def images(hub, alice):
    """A dataset of alice with 60 labelled images in two shards."""
    sample = datasets.load_dataset("parquet", data_files=str(EMBEDDED["fashion_mnist_sample"] / "test.parquet"))
    sample["train"].select(range(60)).push_to_hub("alice/images", split="train", num_shards=2)
    return "alice/images"


def flags(model_id, images, out, **others):
    settings = {"model": model_id, "dataset": images, "columns": "label", "shard_size": "25", "output_dir": str(out)}
    return [word for name, value in {**settings, **others}.items() for word in (f"--{name.replace('_', '-')}", value)]


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_tokens_go_to_the_hub_and_are_used_elsewhere(hub, model_id, images, tmp_path, capsys, streaming, monkeypatch):
    repo_id = f"alice/{token_hex(4)}"
    tokenize.main(flags(model_id, images, tmp_path / "out", push_to_hub=repo_id, streaming=streaming))
    assert "published  " in capsys.readouterr().out
    files = hub.repository(repo_id, "dataset").files()
    total = "unknown" if streaming == "true" else "00003"
    shards = [f"data/train-0000{number}-of-{total}.parquet" for number in range(3)]
    assert sorted(files) == ["README.md", *shards, "manifest.json"]
    monkeypatch.delenv("HF_TOKEN")
    loaded = datasets.load_dataset(repo_id, split="train")
    checked = load_tokens(repo_id, model=model_id)
    expected = load_tokens(tmp_path / "out", OptVQModel.from_pretrained(model_id))
    for rows in (loaded, checked, list(datasets.load_dataset(repo_id, split="train", streaming=True))):
        assert np.array_equal([row["codes"] for row in rows], expected["codes"]) and len(rows) == 60
    assert loaded.features == expected.features
    manifest = json.loads(files["manifest.json"])
    source, made_by = manifest["splits"]["train"]["settings"]["dataset"], manifest["model"]
    assert source["commit"] == hub.repository(images, "dataset").branches["main"]
    assert made_by["id"] == model_id and made_by["revision"] == hub.repository(model_id).branches["main"]
    with pytest.raises(ValueError, match="were made by .* at revision .* load that model and revision"):
        load_tokens(repo_id, model=model_id, model_revision="later")
    detokenize.main(["--tokens", repo_id, "--output-dir", str(tmp_path / "pictures")])
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 60


def test_a_push_that_was_interrupted_sends_only_what_is_missing(hub, model_id, images, tmp_path, backoff_waits, capsys):
    """And nothing is visible before everything is there."""
    tokenize.main(flags(model_id, images, tmp_path / "out"))
    [*_, last] = json.loads((tmp_path / "out" / "manifest.json").read_text())["splits"]["train"]["shards"]
    hub.fail("drop", times=6, on=last["sha256"])
    command = flags(model_id, images, tmp_path / "out", push_to_hub="alice/interrupted", private="true")
    with pytest.raises(SystemExit):
        tokenize.main(command)
    assert "cannot push to alice/interrupted" in capsys.readouterr().err
    repository = hub.repository("alice/interrupted", "dataset")
    assert repository.private and not repository.files() and len(repository.lfs_objects) == 2
    hub.clear()
    tokenize.main(command)
    assert sent(hub, "PUT", ".git/lfs/") == [200] and len(repository.commits) == 2
    tokenize.main([*command, "--overwrite", "--shard-size", "30"])  # the last flag counts
    assert sorted(name for name in repository.files() if name.startswith("data/")) == [
        f"data/train-0000{number}-of-00002.parquet" for number in range(2)
    ]


def test_no_path_of_this_machine_is_pushed(hub, model_id, images, tmp_path, monkeypatch):
    folder = tmp_path / "private" / "tokenizer"
    OptVQModel.from_pretrained(model_id).save_pretrained(folder)
    make_image_processor(OptVQModel.from_pretrained(model_id).config).save_pretrained(folder)
    monkeypatch.chdir(tmp_path)  # a relative path is none of the Hub either
    tokenize.main(flags("private/tokenizer", images, tmp_path / "out", push_to_hub="alice/of-a-folder"))
    files = hub.repository("alice/of-a-folder", "dataset").files()
    assert not [name for name, content in files.items() if b"private" in content or str(tmp_path).encode() in content]
    assert len(load_tokens("alice/of-a-folder", model=folder)) == 60
    assert json.loads(files["manifest.json"])["model"]["id"] == "tokenizer"
    card = files["README.md"].decode()
    assert "the visual tokenizer `tokenizer` of a folder, made by" in card and "--model FOLDER_OF_THE_MODEL`" in card


def test_splits_of_several_folders_go_to_one_dataset(hub, model_id, tmp_path, capsys):
    """And those of another model do not."""

    def push(split, **others):
        command = flags(model_id, "fashion_mnist_sample", tmp_path / split, max_images="20", split=split, **others)
        tokenize.main([*command, "--push-to-hub", "alice/both"])

    push("train")
    push("test")
    files = hub.repository("alice/both", "dataset").files()
    assert list(json.loads(files["manifest.json"])["splits"]) == ["test", "train"]
    assert {name: len(rows) for name, rows in datasets.load_dataset("alice/both").items()} == {"test": 20, "train": 20}
    assert [len(load_tokens("alice/both", split=split)) for split in ("train", "test")] == [20, 20]
    with pytest.raises(SystemExit):
        push("test", model_revision="later", overwrite="true")
    message = f"alice/both holds tokens of split 'train' by {model_id}, another model: weights_sha256 differ; push to"
    assert message in capsys.readouterr().err and hub.repository("alice/both", "dataset").files() == files


def test_a_dataset_that_may_not_be_written_is_refused_before_any_work(hub, model_id, images, tmp_path, capsys):
    with pytest.raises(SystemExit):
        tokenize.main(flags(model_id, images, tmp_path / "out", push_to_hub="bob/tokens"))
    assert "cannot push to bob/tokens" in capsys.readouterr().err and not (tmp_path / "out").exists()
