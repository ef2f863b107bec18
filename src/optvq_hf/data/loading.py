"""Loads image datasets as `datasets` datasets with one column of undecoded images."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, IterableDataset, load_dataset, load_from_disk
from datasets.features.features import _visit
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.utils.file_utils import is_local_path, xopen
from huggingface_hub.errors import HTTPError
from PIL import Image as PILImage

from ..image_opening_optvq import open_image
from ..image_processing_optvq import image_columns
from .arguments import DataArguments, DatasetArguments, SourceArguments
from .fetching import dataset_errors
from .fingerprint import drawn


# Datasets that ship inside the package.
EMBEDDED = {"fashion_mnist_sample": Path(__file__).parent / "fashion_mnist_sample"}
# The builder of the `datasets` library for files of each kind; they are split `train`.
BUILDERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "webdataset",
    ".zip": "imagefolder",
    **dict.fromkeys(ImageFolder.EXTENSIONS, "imagefolder"),
}
KINDS_OF_FILES = ("*.parquet", "*.arrow", "*.tar", "*.zip")
# Files in a folder that `save_to_disk` of the `datasets` library wrote.
SAVED_TO_DISK = ("dataset_dict.json", "state.json")
# Bytes of zeros at the end of every whole tar file.
TAR_END = 1024
# Longest side of a picture, as a multiple of the other.
MOST_UNEQUAL = 100
# Characters of a path in a message.
LONGEST_PATH = 300


class UnreadableImageError(ValueError):
    """An image file that cannot be decoded."""


def load_split(arguments: DataArguments, held_out: bool) -> Dataset | IterableDataset:
    """The images to train on, or those to evaluate on.

    With `eval_fraction`, both come from `train_split`: see [`hold_out`].

    Args:
        held_out: Those to evaluate on.
    """
    if arguments.eval_fraction == 0:
        return load_images(arguments, arguments.eval_split if held_out else arguments.train_split)
    images = load_images(arguments, arguments.train_split)
    return hold_out(images, arguments.eval_fraction, arguments.eval_fraction_seed, held_out)


def count_images(arguments: DataArguments) -> int | None:
    """Number of the images to train on; None of a stream, whose length is not known."""
    images = load_split(arguments, held_out=False)
    return len(images) if isinstance(images, Dataset) else None


def hold_out(
    images: Dataset | IterableDataset, fraction: float, seed: int, held_out: bool
) -> Dataset | IterableDataset:
    """One of two disjoint parts of the images: a random share that is held out, or the rest. Both keep their order.

    Every image is drawn by the hash of its encoded bytes. So the share is the same of a dataset and of a stream of it, depends
    neither on order nor on shards, and equal images fall on the same side. Its size is about the fraction. The numbers of a
    map-style dataset, for which all its bytes are read once, lie in the cache of the `datasets` library.

    Raises:
        ValueError: If one of both would be empty. A stream shows that only when it is read.
    """
    if isinstance(images, IterableDataset):
        limit = _limit(fraction)
        return images.filter(lambda row: (drawn(row["image"], seed) < limit) == held_out)
    return images.select(np.flatnonzero(held_out_rows(images, fraction, seed) == held_out))


def held_out_rows(images: Dataset, fraction: float, seed: int) -> np.ndarray:
    """Whether each row is held out by [`hold_out`], (rows,) bool. Errors as there."""
    with dataset_errors("cannot read the images for --eval-fraction", "the dataset"):
        numbers = images.map(
            _draw,
            batched=True,
            batch_size=64,
            remove_columns=["image"],
            fn_kwargs={"seed": seed},
            keep_in_memory=not _may_cache(images),
            desc="reading all images for --eval-fraction",
        )
    is_held_out = np.array(numbers["number"]) < _limit(fraction)
    number = int(is_held_out.sum())
    if not 0 < number < len(images):
        raise ValueError(
            f"--eval-fraction {fraction:g} of {len(images)} images holds out {number} images: change it, or "
            "--eval-fraction-seed"
        )
    return is_held_out


def _limit(fraction: float) -> int:
    """Numbers of [`drawn`] below it are a fraction of all."""
    return round(fraction * 2**48)


def _draw(batch: dict[str, list], seed: int) -> dict[str, list[int]]:
    return {"number": [drawn(record, seed) for record in batch["image"]]}


def _may_cache(images: Dataset) -> bool:
    """Whether the `datasets` library can write beside the files of a dataset, where it keeps what is computed of it."""
    return all(os.access(os.path.dirname(file["filename"]), os.W_OK) for file in images.cache_files)


def load_images(arguments: SourceArguments, split: str, columns: Sequence[str] = ()) -> Dataset | IterableDataset:
    """Loads one split; images stay encoded, as {"bytes", "path"} in the column "image".

    Args:
        columns: Names of the other columns to keep, also undecoded; by default none.

    Raises:
        FileNotFoundError: For a dataset that does not exist or cannot be reached.
        ValueError: For an unknown split, a missing column, or a column without images.
    """
    dataset = _load_rows(arguments, split)
    column = find_image_column(dataset, arguments)
    if columns:
        dataset = _with_features(dataset, arguments)
        for wanted in columns:
            check_column(wanted, dataset.features or {}, arguments)
            feature = (dataset.features or {})[wanted]
            undecoded = with_media(feature, lambda media: replace(media, decode=False))
            if undecoded != feature:
                dataset = dataset.cast_column(wanted, undecoded)
    dataset = dataset.select_columns([column, *columns])
    if column != "image":
        dataset = dataset.rename_column(column, "image")
    return dataset.cast_column("image", Image(decode=False))


def load_columns(arguments: DatasetArguments, split: str, columns: Sequence[str]) -> Dataset | IterableDataset:
    """Loads some columns of one split; a dataset of anything.

    Raises:
        FileNotFoundError, ValueError: As [`load_images`].
    """
    dataset = _with_features(_load_rows(arguments, split), arguments)
    for column in columns:
        check_column(column, dataset.features or {}, arguments)
    return dataset.select_columns(list(columns))


def _load_rows(arguments: DatasetArguments, split: str) -> Dataset | IterableDataset:
    """All columns of one split."""
    name = arguments.dataset
    if not name:
        raise ValueError("no dataset given: pass --dataset, for example --dataset fashion_mnist_sample")
    path = str(EMBEDDED.get(name, name))
    if any((Path(path) / marker).is_file() for marker in SAVED_TO_DISK):
        return _load_from_disk(path, split, arguments.streaming)
    return _load_dataset(arguments, path, split)


def with_media(feature: Any, change: Callable[[Any], Any]) -> Any:
    """The type of a column, in which `change` replaces the types of pictures, sounds and videos, also of nested ones."""
    return _visit(feature, lambda part: change(part) if hasattr(part, "decode") else part)


def check_column(column: str, features: Mapping, arguments: DatasetArguments) -> None:
    """Raises ValueError if a dataset has no such column."""
    if column not in features:
        raise ValueError(f"dataset {arguments.dataset!r} has no column {column!r}; its columns are {list(features)}")


def _load_dataset(arguments: DatasetArguments, path: str, split: str) -> Dataset | IterableDataset:
    name = arguments.dataset
    options: dict[str, Any] = {"split": split, "streaming": arguments.streaming, "data_dir": arguments.data_dir}
    builder = BUILDERS.get(Path(path).suffix.lower())
    if builder is not None and not Path(path).is_dir():
        if "://" not in path and not glob(path, recursive=True):
            raise FileNotFoundError(f"cannot load dataset {name!r}: no file matches")
        _warn_of_cut_archives(path)
        path, options["data_files"], options["data_dir"] = builder, {"train": path}, None
    elif "*" in path:
        raise ValueError(f"cannot load dataset {name!r}: globs are {', '.join(KINDS_OF_FILES)}, or of images, as *.png")
    elif Path(path).is_file():
        raise ValueError(f"cannot load dataset {name!r}: files are {', '.join(KINDS_OF_FILES)}, or images")
    with dataset_errors(f"cannot load dataset {name!r}, split {split!r}", name or ""):
        return load_dataset(path, arguments.dataset_config, **options)


def _warn_of_cut_archives(pattern: str) -> None:
    """Prints a line for every local tar file that lacks the zeros at its end: its images after the cut would be missed."""
    for path in sorted(glob(pattern, recursive=True)) if pattern.lower().endswith(".tar") else ():
        with open(path, "rb") as file:
            file.seek(max(os.path.getsize(path) - TAR_END, 0))
            if file.read().strip(b"\0") or os.path.getsize(path) < TAR_END:
                print(f"warning: {path} has no end of a tar file: it may be cut, and images of it missing")


def _load_from_disk(path: str, split: str, streaming: bool) -> Dataset | IterableDataset:
    """A split of a folder that `save_to_disk` wrote; a folder of a single dataset is split `train`."""
    with dataset_errors(f"cannot load dataset {path!r}: its files of save_to_disk (state.json, ...) are broken", path):
        loaded = load_from_disk(path)
    splits = {str(name): part for name, part in loaded.items()} if isinstance(loaded, dict) else {"train": loaded}
    if split not in splits:
        raise ValueError(
            f"cannot load dataset {path!r}, split {split!r}: it was written by save_to_disk with the splits "
            f"{', '.join(splits)}, and has no slices"
        )
    dataset = splits[split]
    return dataset.to_iterable_dataset() if streaming else dataset


def hub_id(name: str) -> str | None:
    """The name, if it is a Hub id and not a local path; None otherwise."""
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not name.endswith(".parquet")
    return name if is_id and not Path(name).exists() else None


def find_image_column(dataset: Dataset | IterableDataset, arguments: SourceArguments) -> str:
    """The image column: the one asked for, or the only one.

    Raises:
        ValueError: If there is no such column, or none or several without `arguments.image_column`.
    """
    features = _with_features(dataset, arguments).features or Features()
    images = image_columns(features)
    column = arguments.image_column
    if column is None:
        if len(images) != 1:
            raise ValueError(
                f"dataset {arguments.dataset!r} has {len(images)} image columns; "
                f"choose one with --image-column from {list(features)}"
            )
        return images[0]
    check_column(column, features, arguments)
    encoded = getattr(features[column], "dtype", None) in ("binary", "string") or isinstance(features[column], dict)
    if column not in images and not encoded:
        raise ValueError(
            f"column {column!r} of dataset {arguments.dataset!r} does not hold images; image columns: {images}"
        )
    return column


def _with_features(dataset: Dataset | IterableDataset, arguments: DatasetArguments) -> Dataset | IterableDataset:
    """The dataset with the types of its columns: a stream may not know them before its first record is read."""
    if dataset.features is not None or isinstance(dataset, Dataset):
        return dataset
    with dataset_errors(f"cannot load dataset {arguments.dataset!r}", arguments.dataset or ""):
        return dataset._resolve_features()


def decode_image(record: dict | None) -> PILImage.Image:
    """Opens one entry of the "image" column as [`open_image`] does, in mode "RGB" or "L".

    Raises:
        UnreadableImageError: If it cannot be decoded.
    """
    if record is None:
        raise UnreadableImageError("cannot read an image: a row of the dataset has none")
    path = record.get("path")
    try:
        if record.get("bytes") is None and path and not is_local_path(path):  # inside an archive, or on a server
            with xopen(path, "rb") as file:
                record = {"bytes": file.read(), "path": path}
        image = open_image(record)
        if max(image.size) > MOST_UNEQUAL * min(image.size):  # resized by its shorter side, it would take gigabytes
            raise ValueError(f"a picture of {image.width} x {image.height} pixels is too long for a crop of it")
        return image
    except (OSError, ValueError, HTTPError) as error:
        reason = " ".join(str(error).split())
        is_said = path is None or path in reason or len(path) > LONGEST_PATH  # base64 text is no path
        raise UnreadableImageError(reason if is_said else f"{reason} ({path})") from error
