"""The same images have the same fingerprint wherever they lie; others have another."""

import base64
import io
import shutil
import tarfile

import datasets
import numpy as np
import pytest
from PIL import Image

from optvq_hf.data.arguments import DataArguments
from optvq_hf.data.fingerprint import fingerprint
from optvq_hf.data.loading import load_images


def png(seed):
    """Of more than the 10,240 bytes to which the size of a tar file is rounded."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (110, 110), dtype=np.uint8)).save(file, "png")
    return file.getvalue()


def write_files(folder, seeds):
    for number, seed in enumerate(seeds):
        (folder / f"{number:02}.png").write_bytes(png(seed))
    return {"dataset": str(folder / "*.png")}


def table(seeds, encode=lambda image: {"bytes": image, "path": None}, feature=None):
    feature = feature or datasets.Image()
    return datasets.Dataset.from_dict(
        {"image": [encode(png(seed)) for seed in seeds]}, datasets.Features({"image": feature})
    )


def write_parquet(folder, seeds):
    for shard in range(3):
        table(seeds[shard::3]).to_parquet(folder / f"{shard}.parquet")
    return {"dataset": str(folder / "*.parquet")}


def write_base64(folder, seeds):
    table(seeds, lambda image: base64.b64encode(image).decode(), datasets.Value("string")).to_parquet(
        folder / "a.parquet"
    )
    return {"dataset": str(folder / "*.parquet"), "image_column": "image"}


def write_tar(folder, seeds):
    for shard in range(3):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for number, seed in enumerate(seeds[shard::3]):
                info = tarfile.TarInfo(f"{number}.png")
                info.size = len(png(seed))
                archive.addfile(info, io.BytesIO(png(seed)))
    return {"dataset": str(folder / "*.tar")}


def write_saved(folder, seeds):
    table(seeds).save_to_disk(folder / "saved", num_shards=3)
    return {"dataset": str(folder / "saved")}


FORMS = (write_files, write_parquet, write_base64, write_tar, write_saved)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("write", FORMS, ids=lambda write: write.__name__.removeprefix("write_"))
def test_other_content_has_another_fingerprint(tmp_path, write, streaming):
    def of(name, seeds):
        (tmp_path / name).mkdir()
        return fingerprint(load_images(DataArguments(**write(tmp_path / name, seeds), streaming=streaming), "train"))

    seeds = list(range(12))
    first = of("first", seeds)
    assert of("moved", seeds) == first
    others = {
        "other pictures": [seed + 100 for seed in seeds],
        "another first picture": [100, *seeds[1:]],
        "another order": seeds[::-1],
        "fewer": seeds[:-3],
        "more": [*seeds, 12],
    }
    prints = {name: of(name, changed) for name, changed in others.items()}
    assert len({first, *prints.values()}) == 1 + len(others), prints


def test_a_shard_that_is_cut_or_missing(tmp_path):
    def of(folder):
        return fingerprint(load_images(DataArguments(dataset=str(folder / "*.parquet"), streaming=True), "train"))

    for name in ("whole", "cut", "missing"):
        (tmp_path / name).mkdir()
        write_parquet(tmp_path / name, list(range(12)))
    table([1, 4, 7]).to_parquet(tmp_path / "cut" / "1.parquet")  # without its last row
    (tmp_path / "missing" / "2.parquet").unlink()
    assert len({of(tmp_path / name) for name in ("whole", "cut", "missing")}) == 3


def test_images_that_cannot_be_read_do_not_end_it(tmp_path):
    write_files(tmp_path, range(3))
    images = load_images(DataArguments(dataset=str(tmp_path / "*.png")), "train")
    whole = fingerprint(images)
    (tmp_path / "01.png").unlink()
    assert fingerprint(images) != whole
    empty = datasets.Dataset.from_dict(
        {"image": [None, None]}, datasets.Features({"image": datasets.Image(decode=False)})
    )
    assert fingerprint(empty)
    shutil.rmtree(tmp_path)
    assert fingerprint(images)
