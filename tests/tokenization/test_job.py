"""All that decides the shards of a split: what is judged of them together, and what is compared when they are made again."""

import json
import os
import shutil

import datasets
import numpy as np
import pytest

from optvq_hf.data.arguments import SourceArguments
from optvq_hf.tokenization import job, load_tokens
from optvq_hf.tokenization.arguments import TokenizationArguments
from optvq_hf.tokenization.ray_engine import ShardActor
from optvq_hf.training import processes


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


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_another_version_of_the_data_is_refused(tokenize, rows, tmp_path, capsys, streaming):
    """A label beyond those that are looked at; of a stream, the size of its file tells."""
    path, flags = tmp_path / "rows.parquet", {"dataset": tmp_path / "rows.parquet", "streaming": streaming}
    rows.to_parquet(path)
    out = tokenize(tmp_path / "out", **flags)
    rows.map(lambda row, number: {"label": 2 if number == 1 else row["label"]}, with_indices=True).to_parquet(path)
    if streaming == "true":
        rows.select([0, 1, *range(49)]).to_parquet(path)
    with pytest.raises(SystemExit):
        tokenize(out, **flags)
    assert "made with dataset.fingerprint " in refusal(capsys)


def test_pictures_of_a_folder_are_known_by_their_sizes(tokenize, rows, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02}.png").write_bytes(rows[number if number != 17 else 0]["image"]["bytes"])
    out = tokenize(tmp_path / "out", dataset=folder, columns=None)
    kept = tokenize(out, dataset=folder, columns=None)
    assert "2 finished shards" in capsys.readouterr().out and len(load_tokens(kept)) == 40
    looked_at = np.linspace(0, 39, 32).astype(int)
    beside = next(number for number in range(40) if number not in looked_at)
    (folder / f"{beside:02}.png").write_bytes(rows[0]["image"]["bytes"] + b"\0")
    with pytest.raises(SystemExit):
        tokenize(out, dataset=folder, columns=None)
    assert "made with dataset.fingerprint " in refusal(capsys)


def test_versions_do_not_mix(tokenize, tmp_path, capsys, monkeypatch):
    out = tokenize(tmp_path / "out", max_images=20)
    versions = json.loads((out / "manifest.json").read_text())["splits"]["train"]["settings"]["versions"]
    assert sorted(versions) == ["optvq_hf", "pillow", "torch", "torchvision", "transformers"]
    monkeypatch.setattr(job, "version", lambda name: "0.1" if name == "pillow" else versions[name])
    with pytest.raises(SystemExit):
        tokenize(out, max_images=20)
    assert f'made with versions.pillow "{versions["pillow"]}", not "0.1"' in refusal(capsys)


def test_processes_with_other_settings_are_refused(tokenize, tmp_path, capsys, monkeypatch):
    """As if process 1 had other weights under the same name."""

    def gather(value):
        return [value, {**value, "model": {**value["model"], "weights_sha256": "x"}} if isinstance(value, dict) else 5]

    monkeypatch.setattr(processes, "gather_objects", gather)
    with pytest.raises(SystemExit):
        tokenize(tmp_path / "out")
    assert 'not "x" of process 1: all machines need the same files and versions' in refusal(capsys)
    assert not list(tmp_path.rglob("*.parquet"))


def test_actors_with_other_settings_are_refused(model_folder, pictures, tmp_path):
    arguments = TokenizationArguments(model=str(model_folder), output_dir=str(tmp_path), batch_size=4)
    of_actor = job.TokenizationJob(arguments, SourceArguments(dataset=str(pictures)))
    settings = of_actor.settings(of_actor.writer())
    with pytest.raises(ValueError, match="the driver tokenizes with flips true, not false of an actor"):
        ShardActor(of_actor, {**settings, "flips": True})({"shard": [0]})


def test_a_row_is_counted_in_its_slice(tokenize, tmp_path):
    out = tokenize(tmp_path / "out", split="train[30:]")
    assert load_tokens(out)["index"] == list(range(20))
    card = (out / "README.md").read_text()
    assert "| train | `train[30:]` | 20 | 20 | 0 |" in card and "in that part of the source, counted from 0" in card


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ({"split": "train+test"}, 2, "split 'train+test' is of several splits: tokenize one after the other"),
        ({"model_revision": "main"}, 1, "is a folder on this machine, which has no revision 'main'"),
        ({"shard_size": 2**27}, 1, "a shard would have 4,294,967,296 codes, more than the 2,147,483,647 of a file"),
    ],
)
def test_what_is_refused_before_any_work(tokenize, tmp_path, capsys, flags, code, message):
    with pytest.raises(SystemExit) as stop:
        tokenize(tmp_path / "out", **flags)
    assert stop.value.code == code and message in refusal(capsys) and not (tmp_path / "out").exists()


def test_a_folder_has_no_commit(tokenize, model_folder, tmp_path):
    """Even if it is named as the cache of the Hub names its folders."""
    folder = tmp_path / "snapshots" / "step100"
    shutil.copytree(model_folder, folder)
    out = tokenize(tmp_path / "out", model=folder, max_images=4)
    assert json.loads((out / "manifest.json").read_text())["model"]["revision"] is None
