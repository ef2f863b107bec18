"""`optvq tokenize`: the rows, the bytes of the shards, and what it keeps when it is run again."""

import io
import shutil
import tarfile

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from builders import make, noise, plain_config
from folders import manifest_of, shards_of
from optvq_hf import OptVQImageProcessor, OptVQModel, modeling_optvq
from optvq_hf.commands import detokenize
from optvq_hf.tiling_optvq import run_in_tiles
from optvq_hf.tokenization import load_tokens, shards
from optvq_hf.training.models import make_image_processor


def one_by_one(model_folder, pictures, indices):
    """Codes of single images, by the model alone."""
    model = OptVQModel.from_pretrained(model_folder).eval()
    processor = OptVQImageProcessor.from_pretrained(model_folder)
    rows = datasets.load_dataset(str(pictures), split="train")
    with torch.no_grad():
        return np.concatenate(
            [model.encode(processor(rows[i]["image"], return_tensors="pt").pixel_values).codes for i in indices]
        )


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, model_folder, pictures):
    """Tokens of one process without workers, image by image."""
    from optvq_hf.commands.tokenize import main

    folder = tmp_path_factory.mktemp("tokens") / "out"
    flags = [
        "--model",
        model_folder,
        "--dataset",
        pictures,
        "--columns",
        "label",
        "--shard-size",
        20,
        "--batch-size",
        1,
    ]
    main([*map(str, flags), "--output-dir", str(folder)])
    return folder


def test_columns_types_and_codes_are_as_promised(tokens, model_folder, pictures):
    readable = [number for number in range(50) if number != 17]
    expected = one_by_one(model_folder, pictures, readable)
    loaded = datasets.load_dataset(str(tokens))
    assert list(loaded) == ["train"]
    assert loaded["train"].features == {
        "index": datasets.Value("int64"),
        "codes": datasets.Array3D((2, 4, 4), "uint16"),
        "label": datasets.ClassLabel(names=["a", "b", "c"]),
    }
    stream = datasets.load_dataset(str(tokens), split="train", streaming=True)
    assert stream.features == loaded["train"].features
    for rows in (loaded["train"], stream, load_tokens(tokens, model_folder)):
        rows = list(rows)
        assert [row["index"] for row in rows] == readable
        assert [row["label"] for row in rows] == [number % 3 for number in readable]
        assert np.array_equal([row["codes"] for row in rows], expected)
    assert len(np.unique(expected)) > 50


def test_the_manifest_says_what_was_made_of_what(tokens, model_folder):
    manifest = manifest_of(tokens)
    model, train = manifest["model"], manifest["splits"]["train"]
    assert model["id"] == str(model_folder) and model["revision"] is None and len(model["weights_sha256"]) == 64
    assert model["assignment"] == "nearest" and model["config"]["codebook_size"] == 300
    assert model["preprocessing"]["crop_size"] == {"height": 16, "width": 16}
    assert train["codes"] == {"dtype": "uint16", "shape": [2, 4, 4]}
    assert (train["images"], train["rows"], train["num_unreadable"]) == (50, 49, 1)
    assert [shard["rows"] for shard in train["shards"]] == [19, 20, 10]
    [unreadable] = train["shards"][0]["unreadable"]
    assert unreadable["index"] == 17 and "17.png" in unreadable["reason"]
    assert sorted(path.name for path in tokens.iterdir()) == ["README.md", "data", "manifest.json"]


@pytest.mark.parametrize(
    "flags",
    [
        {"batch_size": 50},
        {"batch_size": 7, "num_workers": 2},
        {"batch_size": None, "num_workers": 1},
        {"streaming": "true", "num_workers": 1},
    ],
    ids=str,
)
def test_the_bytes_do_not_depend_on_how_they_are_made(tokenize, tokens, tmp_path, flags):
    made = shards_of(tokenize(tmp_path, **flags))
    if "streaming" in flags:
        made = {name.replace("unknown", "00003"): content for name, content in made.items()}
    assert made == shards_of(tokens)


def test_flips_and_crops_are_rows_marked_so(tokenize, tokens, tmp_path, model_folder, pictures):
    """The first row of every image is what it is without them, and flips are those of the crops beside them."""
    processor = OptVQImageProcessor.from_pretrained(model_folder)
    processor.size = {"shortest_edge": 24}  # room for crops
    other = tmp_path / "model"
    OptVQModel.from_pretrained(model_folder).save_pretrained(other)
    processor.save_pretrained(other)
    made = [
        tokenize(tmp_path / f"{n}", model=other, flips="true", crops=2, batch_size=n, max_images=30) for n in (3, 20)
    ]
    assert shards_of(made[0]) == shards_of(made[1])
    rows = load_tokens(made[0]).with_format("numpy")[:]
    views = [(0, False), (0, True), (1, False), (1, True), (2, False), (2, True)]
    assert [*zip(rows["crop"], rows["flipped"])] == views * (len(rows["index"]) // 6)
    codes = rows["codes"].reshape(-1, 6, 2, 4, 4)
    assert all((codes[:, 0] != codes[:, n]).any(axis=(1, 2, 3)).all() for n in range(1, 6))
    plain = load_tokens(tokenize(tmp_path / "plain", model=other, max_images=30)).with_format("numpy")[:]
    assert np.array_equal(codes[:, 0], plain["codes"]) and np.array_equal(rows["index"][::6], plain["index"])
    centre = processor(
        datasets.load_dataset(str(pictures), split="train")[plain["index"][0]]["image"], return_tensors="pt"
    )
    mirrored = OptVQModel.from_pretrained(other).encode(centre.pixel_values.flip(-1)).codes
    assert np.array_equal(codes[0, 1], mirrored[0])


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_kept_pictures_keep_their_bytes(tokenize, tmp_path, monkeypatch, streaming):
    """They are not decoded and encoded again, and a file of the same name beside the command is not read instead."""
    content = io.BytesIO()
    PIL.Image.fromarray(noise(1, 20)[:, :, 0]).save(content, "jpeg", quality=30)
    mask = {"bytes": content.getvalue(), "path": "mask.jpg"}
    (tmp_path / "on_disk.jpg").write_bytes(b"of a file, not even a picture")
    on_disk = {"bytes": None, "path": str(tmp_path / "on_disk.jpg")}
    features = datasets.Features(
        {"image": datasets.Image(), "mask": datasets.Image(), "masks": datasets.List(datasets.Image())}
    )
    columns = {"image": [mask] * 3, "mask": [mask, None, on_disk], "masks": [[mask, mask], [], [mask]]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "source")
    (tmp_path / "mask.jpg").write_bytes(b"another")
    monkeypatch.chdir(tmp_path)
    flags = {"dataset": "source", "image_column": "image", "columns": "mask,masks", "streaming": streaming}
    made = load_tokens(tokenize(tmp_path / "out", **flags))
    assert all(made.features[name] == features[name] for name in ("mask", "masks"))
    rows = made.with_format("arrow")[:].to_pylist()
    file = {"bytes": b"of a file, not even a picture", "path": "on_disk.jpg"}
    assert [row["mask"] for row in rows] == [mask, None, file]
    assert [row["masks"] for row in rows] == columns["masks"]


def test_levels(tokenize, tmp_path, pictures):
    """Codes of all levels, and ids of a model with levels."""
    other = tmp_path / "model"
    model = make(plain_config(image_size=16, num_channels=1, codebook_size=40, num_quantizers=3))
    model.save_pretrained(other)
    make_image_processor(model.config).save_pretrained(other)
    tokens = load_tokens(tokenize(tmp_path / "out", model=other, max_images=9), other)
    assert tokens.features["codes"] == datasets.Array3D((6, 4, 4), "uint8")
    rows = tokens.with_format("numpy")[:]
    assert np.array_equal(rows["codes"], one_by_one(other, pictures, rows["index"].tolist()))
    codes = torch.from_numpy(rows["codes"])
    ids = model.to_token_ids(codes)
    assert torch.equal(model.from_token_ids(ids), codes.long())
    assert model.decode_image_tokens(ids, 4, 4).shape == (len(codes), 1, 16, 16)


@pytest.fixture
def made(monkeypatch):
    """Names of the shards that were written."""
    names = []
    write = shards.write_parquet
    monkeypatch.setattr(shards, "write_parquet", lambda path, *rest: (names.append(path.name), write(path, *rest)))
    return names


TAMPERING = {
    "is missing": lambda path: path.unlink(),
    "bytes instead of": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "has changed since it was written": lambda path: path.write_bytes(b"x" + path.read_bytes()[1:]),
}


@pytest.mark.parametrize("message", TAMPERING)
def test_a_shard_that_is_not_what_was_written(tokenize, tokens, tmp_path, made, message):
    """Reading refuses it, and the command makes it again, and no other."""
    shutil.copytree(tokens, tmp_path / "out")
    broken = tmp_path / "out" / "data" / "train-00001-of-00003.parquet"
    TAMPERING[message](broken)
    with pytest.raises(ValueError, match=rf"are broken: data/{broken.name} (.* )?{message}"):
        load_tokens(tmp_path / "out")
    tokenize(tmp_path / "out")
    assert len(made) == 1 and broken.name in made[0]
    assert shards_of(tmp_path / "out") == shards_of(tokens) and manifest_of(tmp_path / "out") == manifest_of(tokens)


def test_what_is_finished_is_kept(tokenize, tokens, tmp_path, made, capsys):
    shutil.copytree(tokens, tmp_path / "out")
    tokenize(tmp_path / "out")
    assert not made and "3 finished shards are as they were written" in capsys.readouterr().out


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_an_interrupted_command_makes_only_what_is_missing(tokenize, tokens, tmp_path, monkeypatch, streaming):
    made = []
    write = shards.write_parquet

    def fail_at_the_second(path, *rest):
        made.append(path.name)
        write(path, *rest)
        if len(made) == 2:
            path.write_bytes(path.read_bytes()[:100])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "write_parquet", fail_at_the_second)
    with pytest.raises(SystemExit):
        tokenize(tmp_path, streaming=streaming)
    assert [len(shards_of(tmp_path)), (tmp_path / "manifest.json").exists()] == [1, False]
    with pytest.raises(FileNotFoundError, match="tokenizing has not finished"):
        load_tokens(tmp_path)
    tokenize(tmp_path, streaming=streaming)
    assert len(made) == 4 and len(set(made)) == 3
    assert [*shards_of(tmp_path).values()] == [*shards_of(tokens).values()]


def test_splits_share_a_folder_and_a_card(tokenize, tmp_path, pictures):
    tokenize(tmp_path, split="train[:20]")
    with pytest.raises(SystemExit):
        tokenize(tmp_path, split="train[20:]")  # of the same name
    both = datasets.DatasetDict(
        {name: datasets.load_dataset(str(pictures), split="train") for name in ("train", "test")}
    )
    both.save_to_disk(tmp_path / "saved")
    out = tmp_path / "two"
    for split in ("train", "test"):
        tokenize(out, dataset=tmp_path / "saved", split=split, max_images=21)  # a sample with the unreadable one
    assert {name: len(rows) for name, rows in datasets.load_dataset(str(out)).items()} == {"test": 20, "train": 20}
    with pytest.raises(ValueError, match=r"no split is named; its splits are test, train"):
        load_tokens(out)
    assert len(load_tokens(out, split="test")) == 20


def test_tiles_give_the_same_tokens(tokenize, tmp_path, monkeypatch):
    sides = []
    monkeypatch.setattr(
        modeling_optvq, "run_in_tiles", lambda *of_tile: (sides.append(of_tile[3]), run_in_tiles(*of_tile))[1]
    )
    whole, tiled = (
        tokenize(tmp_path / name, max_images=20, **flags) for name, flags in (("a", {}), ("b", {"tile_size": 8}))
    )
    assert sides and set(sides) == {8}
    assert load_tokens(tiled)["codes"] == load_tokens(whole)["codes"]
    sides.clear()
    for out, flags in ((whole, []), (tiled, ["--tile-size", "8"])):
        detokenize.main(["--tokens", str(out), "--output-dir", str(out / "pictures"), *flags])
    assert sides and set(sides) == {8}
    names = sorted(path.name for path in (whole / "pictures").glob("*.png"))
    assert len(names) == len(load_tokens(whole)) >= 19
    for name in names:
        one, other = (np.asarray(PIL.Image.open(out / "pictures" / name), int) for out in (whole, tiled))
        assert np.abs(one - other).max() <= 1
    with pytest.raises(SystemExit):
        detokenize.main(["--tokens", str(whole), "--output-dir", str(tmp_path / "none"), "--tile-size", "2"])
    assert not list((tmp_path / "none").glob("*.png"))


def test_a_stream_that_fails_midway_keeps_what_is_finished(tokenize, tokens, tmp_path, fails, pictures):
    source = tmp_path / "source.parquet"
    datasets.load_dataset(str(pictures), split="train").to_parquet(source, batch_size=5)
    whole = source.read_bytes()
    content = bytearray(whole)
    middle = slice(len(content) * 5 // 10, len(content) * 6 // 10)
    content[middle] = bytes(len(content[middle]))
    source.write_bytes(content)
    with pytest.raises(SystemExit):
        tokenize(tmp_path / "out", dataset=source, streaming="true")
    assert "cannot read the stream of images: " in fails()
    kept = [*shards_of(tmp_path / "out").values()]  # how many depends on how far pyarrow reads ahead
    assert len(kept) < 3 and kept == [*shards_of(tokens).values()][: len(kept)]
    assert not (tmp_path / "out" / "manifest.json").exists()
    source.write_bytes(whole)
    tokenize(tmp_path / "out", dataset=source, streaming="true")
    assert [*shards_of(tmp_path / "out").values()] == [*shards_of(tokens).values()]


def test_a_folder_of_images_and_a_stream_of_a_tar(tokenize, tmp_path, pictures):
    """No types of columns are written in them."""
    folder = tmp_path / "folder"
    folder.mkdir()
    rows = datasets.load_dataset(str(pictures), split="train").cast_column("image", datasets.Image(decode=False))
    for number in range(10):
        (folder / f"{number}.png").write_bytes(rows[number]["image"]["bytes"])
    with tarfile.open(tmp_path / "pictures.tar", "w") as archive:
        for number in range(10):
            archive.add(folder / f"{number}.png", f"{number}.png")
    of_folder = load_tokens(tokenize(tmp_path / "one", dataset=folder, columns=None))
    of_tar = load_tokens(tokenize(tmp_path / "two", dataset=tmp_path / "pictures.tar", columns=None, streaming="true"))
    assert of_folder["index"] == of_tar["index"] == list(range(10)) and of_folder["codes"] == of_tar["codes"]
