"""Loads image datasets as `datasets` datasets with one column of undecoded images."""

import re
from glob import glob
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, IterableDataset, load_dataset
from datasets.utils.file_utils import is_local_path, xopen
from huggingface_hub.errors import HTTPError
from PIL import Image as PILImage

from ..image_opening_optvq import open_image
from ..image_processing_optvq import image_columns
from .arguments import DataArguments
from .fetching import explain


# Datasets that ship inside the package.
EMBEDDED = {"fashion_mnist_sample": Path(__file__).parent / "fashion_mnist_sample"}


class UnreadableImageError(ValueError):
    """An image file that cannot be decoded."""


def load_images(arguments: DataArguments, split: str) -> Dataset | IterableDataset:
    """Loads one split; images stay encoded, as {"bytes", "path"} in the only column, "image".

    Raises:
        FileNotFoundError: For a dataset that does not exist or cannot be reached.
        ValueError: For an unknown split, a missing image column, or a column without images.
    """
    name = arguments.dataset
    if not name:
        raise ValueError("no dataset given: pass --dataset, for example --dataset fashion_mnist_sample")
    path = str(EMBEDDED.get(name, name))
    options: dict[str, Any] = {"split": split, "streaming": arguments.streaming}
    if path.endswith(".parquet") or "*" in path:
        if "://" not in path and not glob(path, recursive=True):
            raise FileNotFoundError(f"cannot load dataset {name!r}: no file matches")
        path, options["data_files"] = "parquet", {"train": path}
    else:
        options["data_dir"] = arguments.data_dir
    try:
        dataset: Dataset | IterableDataset = load_dataset(path, arguments.dataset_config, **options)
    except (HTTPError, FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"cannot load dataset {name!r}: {explain(error, name, 'dataset')}") from error
    except (RuntimeError, ValueError) as error:  # an unknown split or configuration, a loading script, ...
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot load split {split!r} of dataset {name!r}: {reason}") from error
    column = find_image_column(dataset, arguments)
    dataset = dataset.select_columns([column])
    if column != "image":
        dataset = dataset.rename_column(column, "image")
    return dataset.cast_column("image", Image(decode=False))


def hub_id(name: str) -> str | None:
    """The name, if it is a Hub id and not a local path; None otherwise."""
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not name.endswith(".parquet")
    return name if is_id and not Path(name).exists() else None


def find_image_column(dataset: Dataset | IterableDataset, arguments: DataArguments) -> str:
    """The image column: the one asked for, or the only one.

    Raises:
        ValueError: If there is no such column, or none or several without `arguments.image_column`.
    """
    features = dataset.features
    if features is None and isinstance(dataset, IterableDataset):  # a stream may not know its columns yet
        features = dataset._resolve_features().features
    features = features or Features()
    images = image_columns(features)
    column = arguments.image_column
    if column is None:
        if len(images) != 1:
            raise ValueError(
                f"dataset {arguments.dataset!r} has {len(images)} image columns; "
                f"choose one with --image-column from {list(features)}"
            )
        return images[0]
    if column not in features:
        raise ValueError(f"dataset {arguments.dataset!r} has no column {column!r}; its columns are {list(features)}")
    encoded = getattr(features[column], "dtype", None) in ("binary", "string") or isinstance(features[column], dict)
    if column not in images and not encoded:
        raise ValueError(
            f"column {column!r} of dataset {arguments.dataset!r} does not hold images; image columns: {images}"
        )
    return column


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
        return open_image(record)
    except (OSError, ValueError, HTTPError) as error:
        reason = " ".join(str(error).split())
        raise UnreadableImageError(reason if path is None or path in reason else f"{reason} ({path})") from error
