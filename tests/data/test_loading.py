import base64
import io
import tarfile
import zipfile

import datasets
import numpy as np
import pytest
from PIL import Image

from optvq_hf import OptVQImageProcessor
from optvq_hf.data import loading
from optvq_hf.data.arguments import DataArguments
from optvq_hf.data.batches import evaluation_batches
from optvq_hf.data.fetching import records_of
from optvq_hf.data.fingerprint import drawn
from optvq_hf.data.loading import EMBEDDED, UnreadableImageError, decode_image, load_images, load_split
from optvq_hf.data.probe import look_at


def picture(seed, mode="RGB", size=(20, 16)):
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def png(image):
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, DataArguments]:
    """The same six images in every form that `--dataset` takes."""
    root = tmp_path_factory.mktemp("sources")
    images = [picture(seed) for seed in range(6)]
    for split in ("train", "test"):
        (root / "pictures" / split).mkdir(parents=True)
        for number, image in enumerate(images):
            image.save(root / "pictures" / split / f"{number}.png")
        (root / "parquet").mkdir(exist_ok=True)
        rows = {"img": images, "label": [0] * 6}
        features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
        datasets.Dataset.from_dict(rows, features).to_parquet(root / "parquet" / f"{split}-00000-of-00001.parquet")
    with_png = [{"bytes": png(image), "path": f"{number}.png"} for number, image in enumerate(images)]
    rows = datasets.Dataset.from_dict({"img": with_png}, datasets.Features({"img": datasets.Image()}))
    rows.save_to_disk(root / "saved")
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(root / "saved_splits")
    for shard in range(2):
        with tarfile.open(root / f"{shard}.tar", "w") as archive:
            for number in range(3 * shard, 3 * shard + 3):
                archive.add(root / "pictures" / "train" / f"{number}.png", f"{number}.png")
    text = [base64.b64encode(png(image)).decode() for image in images]
    datasets.Dataset.from_dict({"text": text}).to_parquet(root / "base64.parquet")
    return {
        "tar files": DataArguments(dataset=str(root / "*.tar")),
        "glob of images": DataArguments(dataset=str(root / "pictures" / "train" / "*.png")),
        "saved to disk": DataArguments(dataset=str(root / "saved")),
        "splits saved to disk": DataArguments(dataset=str(root / "saved_splits")),
        "base64": DataArguments(dataset=str(root / "base64.parquet"), image_column="text"),
        "folder of images": DataArguments(dataset=str(root / "pictures")),
        "imagefolder": DataArguments(dataset="imagefolder", data_dir=str(root / "pictures")),
        "folder of Parquet": DataArguments(dataset=str(root / "parquet")),
        "Parquet glob": DataArguments(dataset=str(root / "parquet" / "train-*.parquet")),
        "column by name": DataArguments(dataset=str(root / "parquet"), image_column="img"),
    }


KINDS = [
    "tar files",
    "glob of images",
    "saved to disk",
    "splits saved to disk",
    "base64",
    "folder of images",
    "imagefolder",
    "folder of Parquet",
    "Parquet glob",
    "column by name",
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_the_same_images(sources, kind, streaming):
    arguments = DataArguments(**{**vars(sources[kind]), "streaming": streaming})
    decoded = [decode_image(row["image"]) for row in load_images(arguments, "train")]
    assert [image.tobytes() for image in decoded] == [picture(seed).tobytes() for seed in range(6)]


def test_kinds_of_files_that_are_not_taken(sources, tmp_path):
    saved = sources["splits saved to disk"]
    with pytest.raises(ValueError, match=r"written by save_to_disk with the splits train, test, and has no slices"):
        load_images(saved, "train[:2]")
    with pytest.raises(ValueError, match=r"globs are \*.parquet, \*.arrow, \*.tar, \*.zip, or of images, as \*.png"):
        load_images(DataArguments(dataset=str(tmp_path / "*.gz")), "train")
    with pytest.raises(FileNotFoundError, match="no file matches"):
        load_images(DataArguments(dataset=str(tmp_path / "*.jpg")), "train")


def small_png(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(0).save(path)


def damaged_parquet(folder):
    images = [{"bytes": png(picture(n)), "path": None} for n in range(50)]
    rows = datasets.Dataset.from_dict({"image": images}, datasets.Features({"image": datasets.Image()}))
    rows.to_parquet(folder / "train.parquet")
    content = bytearray((folder / "train.parquet").read_bytes())
    content[4:40] = bytes([255] * 36)  # the header of a page
    (folder / "train.parquet").write_bytes(content)
    return folder


def written(folder, name, content):
    (folder / name).write_bytes(content)
    return folder / name


def mixed_folder(folder):
    small_png(folder / "0.png")
    written(folder, "rows.parquet", b"no parquet")
    written(folder, "x.csv", b"a,b")
    return folder


def of_save_to_disk(folder, state):
    rows = datasets.Dataset.from_dict({"image": [picture(0)]}, datasets.Features({"image": datasets.Image()}))
    rows.save_to_disk(folder / "saved")
    (folder / "saved" / "state.json").write_text(state)
    return folder / "saved"


BROKEN = {
    "damaged Parquet": (damaged_parquet, "cannot (load|read)"),
    "garbage tar": (lambda folder: written(folder, "x.tar", b"nothing" * 100), r"cannot load dataset '.*x\.tar'"),
    "empty tar": (lambda folder: written(folder, "x.tar", b""), r"cannot load dataset '.*x\.tar'"),
    "garbage zip": (lambda folder: written(folder, "x.zip", b"nothing"), r"cannot load dataset '.*x\.zip'.*"),
    "empty state": (lambda folder: of_save_to_disk(folder, "{}"), r"save_to_disk \(state.json, ...\) are broken: KeyError"),
    "cut state": (lambda folder: of_save_to_disk(folder, '{"_data_files": ['), r"saved.: its files of save_to_disk"),
    "mixed folder": (mixed_folder, "."),
    "root": (lambda folder: "/", "cannot load dataset '/'"),
    **{
        f"x.{kind}": (lambda folder, kind=kind: written(folder, f"x.{kind}", b"a,b"), r"files are \*.parquet, \*.arrow, \*.tar")
        for kind in ("csv", "jsonl", "tar.gz")
    },
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_one_line(tmp_path, kind, streaming):
    make, message = BROKEN[kind]
    arguments = DataArguments(dataset=str(make(tmp_path)), streaming=streaming)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        images = load_images(arguments, "train")
        look_at(images)
        list(records_of(images))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


def test_a_tar_file_that_was_cut(tmp_path, capsys):
    with tarfile.open(tmp_path / "whole.tar", "w") as archive:
        for number in range(8):
            small_png(tmp_path / f"{number}.png")
            archive.add(tmp_path / f"{number}.png", f"{number}.png")
    load_images(DataArguments(dataset=str(tmp_path / "whole.tar")), "train")
    assert "warning" not in capsys.readouterr().out
    written(tmp_path, "cut.tar", (tmp_path / "whole.tar").read_bytes()[: 3 * 2048 + 100])
    load_images(DataArguments(dataset=str(tmp_path / "*.tar"), streaming=True), "train")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert lines == [
        f"warning: {tmp_path / 'cut.tar'} has no end of a tar file: it may be cut, and images of it missing"
    ]


def test_broken_base64_is_named_in_short(tmp_path):
    text = base64.b64encode(b"not a picture " * 1000).decode()
    datasets.Dataset.from_dict({"text": [text]}).to_parquet(tmp_path / "broken.parquet")
    arguments = DataArguments(dataset=str(tmp_path / "broken.parquet"), image_column="text")
    with pytest.raises(UnreadableImageError, match="not an image file") as raised:
        decode_image(load_images(arguments, "train")[0]["image"])
    assert len(str(raised.value)) < 250


# ---- a random part that is held out ----------------------------------------------------------------------------------


def held_out_and_rest(arguments):
    parts = (load_split(arguments, held_out=which) for which in (True, False))
    return tuple([decode_image(row["image"]).getpixel((0, 0)) for row in part] for part in parts)


@pytest.fixture(scope="module")
def sorted_shades(tmp_path_factory):
    """250 images, image n of grey value n, in 5 shards, as a dataset that is sorted by class."""
    folder = tmp_path_factory.mktemp("sorted")
    for shard in range(5):
        images = [{"bytes": png(Image.new("L", (8, 8), 50 * shard + n)), "path": None} for n in range(50)]
        rows = datasets.Dataset.from_dict({"image": images}, datasets.Features({"image": datasets.Image()}))
        rows.to_parquet(folder / f"train-0000{shard}-of-00005.parquet")
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hold_out_is_random_disjoint_and_repeatable(sorted_shades, streaming):
    arguments = DataArguments(dataset=sorted_shades, eval_fraction=0.2, streaming=streaming)
    held_out, rest = held_out_and_rest(arguments)
    assert sorted(held_out + rest) == list(range(250)) and not set(held_out) & set(rest)
    assert held_out == sorted(held_out) and rest == sorted(rest)  # both keep their order
    assert 25 < len(held_out) < 75
    assert min(np.bincount(np.array(held_out) // 50, minlength=5)) >= 3  # of every fifth, not the first ones
    assert held_out_and_rest(arguments) == (held_out, rest)
    other = DataArguments(dataset=sorted_shades, eval_fraction=0.2, eval_fraction_seed=1, streaming=streaming)
    assert held_out_and_rest(other)[0] != held_out


def test_a_hold_out_of_a_stream_does_not_depend_on_shards(sorted_shades):
    arguments = DataArguments(dataset=sorted_shades, eval_fraction=0.2, streaming=True)
    whole = load_split(arguments, held_out=True)
    parts = [row["image"]["bytes"] for number in range(5) for row in whole.shard(5, number)]
    assert sorted(parts) == sorted(row["image"]["bytes"] for row in whole)


def test_a_hold_out_of_files_goes_by_content(tmp_path):
    """Every class has files of the same names, and two images come twice; every seed draws about a quarter of each name."""
    shades = np.random.default_rng(0).permutation(160)
    for label in range(40):
        (tmp_path / f"{label:02}").mkdir()
        for number in range(4):
            shade = int(shades[4 * label + number])
            Image.new("L", (8, 8), 0 if shade == 1 else shade).save(tmp_path / f"{label:02}" / f"{number}.png")
    sizes = []
    for seed in range(6):
        parts = []
        for streaming in (False, True):
            options = {"eval_fraction": 0.25, "eval_fraction_seed": seed, "streaming": streaming}
            parts.append(held_out_and_rest(DataArguments(dataset=str(tmp_path), **options)))
        (held_out, rest), of_stream = parts
        assert of_stream == (held_out, rest) and not set(held_out) & set(rest) and len(held_out + rest) == 160
        sizes.append(len(held_out))
    assert len(set(sizes)) > 2 and 20 < min(sizes) <= max(sizes) < 60


def test_a_hold_out_decodes_nothing_and_reads_once(sorted_shades, monkeypatch):
    arguments = DataArguments(dataset=sorted_shades, eval_fraction=0.2, eval_fraction_seed=7)
    first = load_split(arguments, held_out=True)["image"]
    monkeypatch.setattr(loading, "drawn", None)  # what was drawn lies in the cache
    monkeypatch.setattr(Image, "open", None)
    assert list(load_split(arguments, held_out=True)["image"]) == list(first)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hold_out_with_rows_that_have_no_image(tmp_path, streaming):
    images = [{"bytes": png(Image.new("L", (8, 8), n)), "path": None} for n in range(40)]
    rows = datasets.Dataset.from_dict({"image": [*images, None, None]}, datasets.Features({"image": datasets.Image()}))
    rows.to_parquet(tmp_path / "train.parquet")
    arguments = DataArguments(dataset=str(tmp_path), eval_fraction=0.3, streaming=streaming)
    parts = [[row["image"] for row in load_split(arguments, held_out=which)] for which in (True, False)]
    assert sorted([part.count(None) for part in parts]) == [0, 2] and sum(map(len, parts)) == 42


def test_a_hold_out_of_a_tar_with_pictures_of_two_kinds(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for number in range(40):
            data = png(picture(number))
            member = tarfile.TarInfo(f"{number:02}.{'png' if number < 30 else 'jpg'}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    arguments = DataArguments(dataset=str(tmp_path / "x.tar"), image_column="png", eval_fraction=0.3, streaming=True)
    assert sum(len(list(load_split(arguments, held_out=which))) for which in (True, False)) == 40


def test_hold_outs_of_two_seeds_are_independent():
    """Of a checksum, another seed would only flip bits of every number."""
    records = [{"bytes": bytes([n]), "path": None} for n in range(256)]
    numbers = np.array([[drawn(record, seed) for record in records] for seed in (0, 1)]) / 2**48
    assert abs(np.corrcoef(numbers)[0, 1]) < 0.2 and len(set(np.bitwise_xor(*(numbers * 2**48).astype(int)))) == 256


def test_hold_outs_that_are_none(sorted_shades):
    with pytest.raises(ValueError, match=r"eval_fraction must lie in \[0, 1\), got 1.5"):
        DataArguments(dataset=sorted_shades, eval_fraction=1.5)
    with pytest.raises(ValueError, match="--eval-fraction 0.0001 of 250 images holds out 0 images"):
        load_split(DataArguments(dataset=sorted_shades, eval_fraction=0.0001), held_out=True)
    stream = DataArguments(dataset=sorted_shades, eval_fraction=0.0001, streaming=True)
    message = r"'train \(a random 0.01 %, seed 0\)' has no images to evaluate on"
    with pytest.raises(ValueError, match=message):
        list(evaluation_batches(stream, OptVQImageProcessor(num_channels=1, size={"shortest_edge": 8}), 4))


def test_slices_of_a_split(sources):
    assert len(load_images(sources["folder of images"], "train[:50%]")) == 3
    assert len(load_images(sources["Parquet glob"], "train[4:]")) == 2


def test_the_embedded_dataset():
    arguments = DataArguments(dataset="fashion_mnist_sample")
    train, test = load_images(arguments, "train"), load_images(arguments, "test")
    assert (len(train), len(test)) == (4000, 1000)
    assert decode_image(train[0]["image"]).size == (28, 28) and decode_image(train[0]["image"]).mode == "L"
    files = list(EMBEDDED["fashion_mnist_sample"].iterdir())
    assert {file.name for file in files} == {"train.parquet", "test.parquet", "LICENSE", "README.md"}
    assert sum(file.stat().st_size for file in files) < 3_000_000


def test_the_embedded_images_are_those_of_the_original(image_data):
    original = datasets.load_dataset(str(image_data / "fashion_mnist"), split="test").cast_column(
        "image", datasets.Image(decode=False)
    )
    known = {row["bytes"] for row in original["image"]}
    assert all(
        row["image"]["bytes"] in known for row in load_images(DataArguments(dataset="fashion_mnist_sample"), "test")
    )


@pytest.mark.parametrize(
    ("change", "split", "error", "message"),
    [
        ({"dataset": None}, "train", ValueError, "no dataset given"),
        (
            {"dataset": "no-one/no-such-dataset"},
            "train",
            FileNotFoundError,
            "cannot load dataset 'no-one/no-such-dataset'",
        ),
        ({"dataset": "/no/such/*.parquet"}, "train", FileNotFoundError, "cannot load dataset '/no/such"),
        ({"dataset": "GLOB"}, "test", ValueError, "split 'test'.*train"),
        ({}, "validation", ValueError, "split 'validation'.*train"),
        ({"image_column": "picture"}, "train", ValueError, r"no column 'picture'; its columns are \['img', 'label'\]"),
        (
            {"image_column": "label"},
            "train",
            ValueError,
            r"column 'label' .* does not hold images; image columns: \['img'\]",
        ),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_wrong_sources(hub, sources, change, split, error, message, streaming):
    if change.get("dataset") == "GLOB":  # its files are never taken for another split than train
        change = {"dataset": sources["Parquet glob"].dataset}
    arguments = DataArguments(**{**vars(sources["folder of Parquet"]), "streaming": streaming, **change})
    with pytest.raises(error, match=message) as caught:
        load_images(arguments, split)
    assert "\n" not in str(caught.value)


def test_a_choice_of_columns_is_asked_for(tmp_path):
    rows = {"before": [picture(0)], "after": [picture(1)]}
    features = datasets.Features({"before": datasets.Image(), "after": datasets.Image()})
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"2 image columns; choose one with --image-column from \['before', 'after'\]"):
        load_images(DataArguments(dataset=str(tmp_path)), "train")
    [row] = load_images(DataArguments(dataset=str(tmp_path), image_column="after"), "train")
    assert decode_image(row["image"]).tobytes() == picture(1).tobytes()


def test_unreadable_images(tmp_path):
    good = tmp_path / "good.png"
    picture(0, size=(200, 200)).save(good)
    truncated, nonsense = tmp_path / "truncated.png", tmp_path / "nonsense.png"
    truncated.write_bytes(good.read_bytes()[:500])
    nonsense.write_text("not a picture")
    for file in (truncated, nonsense):
        with pytest.raises(UnreadableImageError, match=f"cannot read image .*{file.name}: "):
            decode_image({"path": str(file), "bytes": None})
    with pytest.raises(
        UnreadableImageError, match="cannot read image of 3 bytes without a file name: not an image file"
    ):
        decode_image({"path": None, "bytes": b"abc"})
    with pytest.raises(UnreadableImageError, match="a row of the dataset has none"):
        decode_image(None)
    with pytest.raises(UnreadableImageError, match="missing.png"):
        decode_image({"path": str(tmp_path / "missing.png"), "bytes": None})


def test_a_very_long_picture(tmp_path):
    """Resized until its shorter side is 256 pixels, it would take gigabytes."""
    Image.new("L", (30000, 2)).save(tmp_path / "long.png")
    with pytest.raises(UnreadableImageError, match="30000 x 2 pixels is too long for a crop of it .*long.png"):
        decode_image({"path": str(tmp_path / "long.png"), "bytes": None})
    Image.new("L", (200, 2)).save(tmp_path / "long.png")
    assert decode_image({"path": str(tmp_path / "long.png"), "bytes": None}).size == (200, 2)


def test_images_inside_an_archive(tmp_path):
    """Such paths are what a stream of archived pictures has."""
    picture(0).save(tmp_path / "0.png")
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        archive.write(tmp_path / "0.png", "inside/0.png")
        archive.writestr("text.png", b"no picture")
    inside = {"path": f"zip://inside/0.png::{tmp_path}/pictures.zip", "bytes": None}
    assert decode_image(inside).tobytes() == picture(0).tobytes()
    for name in ("text.png", "missing.png"):
        with pytest.raises(UnreadableImageError, match=f"{name}") as caught:
            decode_image({"path": f"zip://{name}::{tmp_path}/pictures.zip", "bytes": None})
        assert "\n" not in str(caught.value)
