"""What an output folder of tokens says about itself: settings that are compared, records, and files that are none of it."""

import json
import shutil

import pytest

from folders import contents
from optvq_hf.tokenization import load_tokens, manifest
from optvq_hf.tokenization.manifest import TokenFolder, difference, read_manifest


def names(folder):
    return sorted(path.name for path in (folder / "data").iterdir())


def refusal(capsys):
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("optvq tokenize: error: ")]
    return line


@pytest.fixture
def tokens(tokenize, tmp_path):
    return tokenize(tmp_path / "out", max_images=40)


@pytest.mark.parametrize(
    ("before", "now", "wrong"),
    [
        (
            {"model": {"a": None}, "flips": False},
            {"model": {}, "flips": True},
            "model.a null, not that was not recorded",
        ),
        ({"model": {"c": {"x": 1}}}, {"model": {"c": {"x": 2}}}, "model.c.x 1, not 2"),
        ({"flips": True}, {"flips": True, "crops": None}, "crops that was not recorded, not null"),
        ({"model": {"id": "./m", "d": 1}}, {"model": {"id": "m", "d": 1}}, None),
        ({"c": [1, 2]}, {"c": (1, 2)}, None),
    ],
)
def test_the_first_difference_has_its_full_name(before, now, wrong):
    assert difference(before, now) == wrong


def test_files_of_nobody_are_not_mixed_in(tokenize, tokens, capsys):
    (tokens / "manifest.json").unlink()
    with pytest.raises(SystemExit):
        tokenize(tokens, max_images=40, streaming="true")
    assert "made with settings that are not recorded: choose another --output-dir, or pass --over" in refusal(capsys)
    tokenize(tokens, max_images=40, streaming="true", overwrite="true")
    assert names(tokens) == [f"train-0000{number}-of-unknown.parquet" for number in range(2)]


def test_files_that_are_none_of_the_shards_are_removed(tokenize, tokens):
    """A stream that is shorter when it is read again leaves such."""
    data = tokens / "data"
    for number in (2, 123456):
        shutil.copy(data / "train-00000-of-00002.parquet", data / f"train-{number:05}-of-00003.parquet")
    shutil.copy(data / "train-00000-of-00002.parquet", data / "test-00000-of-00001.parquet")
    tokenize(tokens, max_images=40)
    assert names(tokens) == ["test-00000-of-00001.parquet", *(f"train-0000{n}-of-00002.parquet" for n in range(2))]


def test_a_removal_that_is_killed_leaves_no_files_without_settings(tokenize, tokens, monkeypatch, capsys):
    def fail(path, text):
        raise KeyboardInterrupt

    monkeypatch.setattr(manifest, "write_whole", fail)
    with pytest.raises(KeyboardInterrupt):
        TokenFolder(tokens, "train").begin({}, overwrite=True)
    assert not names(tokens) and "train" in read_manifest(tokens)["splits"]


@pytest.mark.parametrize("content", ["{}", "[", '{"file": 1, "images": 2, "rows": 2, "bytes": "x", "sha256": ""}'])
def test_a_broken_record_counts_as_unfinished(tokenize, tokens, content):
    progress = tokens / ".progress"
    progress.mkdir()
    for name in ("train-00001",) if "file" in content else ("train", "train-00001"):
        (progress / f"{name}.json").write_text(content)
    tokenize(tokens, max_images=40)
    assert len(load_tokens(tokens)) == 39 and not progress.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entries: entries["model"].pop("weights_sha256"), r"is broken: .*model\.weights_sha256"),
        (lambda entries: entries["splits"]["train"]["shards"][0].update(bytes="x"), "is broken: .*bytes"),
    ],
)
def test_a_manifest_with_wrong_types(tokens, change, message):
    entries = read_manifest(tokens)
    change(entries)
    (tokens / "manifest.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=message):
        load_tokens(tokens)


def test_the_manifest_is_read_once_and_a_shard_hashed_once(tokenize, tokens, monkeypatch):
    counts = {"parse_json": 0, "digest_of": 0}

    def counting(name):
        function = getattr(manifest, name)

        def count(*arguments):
            counts[name] += 1
            return function(*arguments)

        monkeypatch.setattr(manifest, name, count)

    for name in counts:
        counting(name)
    tokenize(tokens, max_images=40, shard_size=20)
    few = dict(counts)
    assert few["digest_of"] == 2
    tokenize(tokens, max_images=40, shard_size=4, overwrite="true")
    counts.update(dict.fromkeys(counts, 0))
    tokenize(tokens, max_images=40, shard_size=4)
    assert counts == {"parse_json": few["parse_json"], "digest_of": 10}


def test_splits_that_load_dataset_cannot_read_together_are_not_mixed(tokenize, tokens, pictures, tmp_path, capsys):
    sources = shutil.copytree(pictures, tmp_path / "pictures")
    (sources / "train-00001-of-00002.parquet").rename(sources / "test-00000-of-00001.parquet")
    before = contents(tokens)
    for flags, message in (
        ({"latents": "true"}, "latents false, not true"),
        ({"flips": "true"}, "flips or crops false, not true"),
        ({"columns": "name"}, 'columns ["label"], not ["name"]'),
    ):
        with pytest.raises(SystemExit):
            tokenize(tokens, dataset=sources, split="test", **flags)
        assert f"holds tokens of split 'train', made with {message}: choose another --output-dir" in refusal(capsys)
        assert contents(tokens) == before
