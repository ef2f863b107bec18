"""Pictures of tokens: a folder that `load_dataset` reads as an image folder."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from datasets import Array2D, Array3D, Array4D, Array5D, ClassLabel, Dataset, Features, LargeList, List, Value
from PIL.Image import Image
from tqdm.auto import tqdm

from ..image_processing_optvq import OptVQImageProcessor
from ..modeling_optvq import OptVQModel
from ..parsing import parse_json
from ..training.checkpoints import write_whole
from ..training.lock import LOCK_FILE


# What an image folder of `datasets` reads the columns of its pictures from.
METADATA_FILE = "metadata.jsonl"
# Which tokens the pictures of a folder are of.
RECORD_FILE = "tokens.json"
# Least images of a batch. PyTorch 2.14 rounds convolutions of smaller ones differently on a single thread.
LEAST_BATCH = 16
# Names of pictures, and of all files here.
PICTURE = r"(crop\d+_)?(flipped_)?\d{8,}\.png"
OURS = re.compile(
    rf"{PICTURE}|\.{PICTURE}\.unfinished|\.?({re.escape(METADATA_FILE)}|{re.escape(RECORD_FILE)})(\.unfinished)?"
)
# Types of values that JSON holds; those of times as text.
IN_JSON = re.compile(r"null|bool|u?int\d+|float\d+|(large_)?string(_view)?|(timestamp|date|time)\d*(\[.*)?")
# Keys that `load_dataset` takes for the names of pictures.
NAME_OF_PICTURE = re.compile(r"(.*_)?file_names?")


def begin(folder: Path, record: dict[str, Any], overwrite: bool) -> None:
    """Prepares a folder for the pictures of some tokens; pictures of the same tokens may be there.

    Args:
        record: What tells these tokens, and the rows of them that are decoded, from others; JSON.
        overwrite: Remove pictures of other tokens.

    Raises:
        ValueError: If the folder holds pictures of other tokens and may not be overwritten, or files of somebody else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith(LOCK_FILE))
    foreign = [name for name in names if not OURS.fullmatch(name)]
    if foreign:
        raise ValueError(
            f"{folder} holds {foreign[0]}, which `optvq detokenize` has not written: choose another --output-dir"
        )
    if names and _record(folder) != record:
        if not overwrite:
            raise ValueError(
                f"{folder} holds pictures of other tokens, or of another number of them: choose another --output-dir, or "
                "pass --overwrite"
            )
        for name in sorted(names, key=RECORD_FILE.__eq__):  # the record last
            (folder / name).unlink()
    write_whole(folder / RECORD_FILE, json.dumps(record, indent=1) + "\n")


def _record(folder: Path) -> Any:
    """The record of a folder; None if it has none that can be read."""
    try:
        return parse_json((folder / RECORD_FILE).read_bytes())
    except (OSError, ValueError):
        return None


def columns_to_skip(features: Features) -> list[str]:
    """Names of the columns that cannot go to the metadata: of no type of JSON, or taken for the names of pictures."""
    return [name for name, feature in features.items() if not _is_metadata({name: feature})]


def _is_metadata(feature: Any) -> bool:
    if isinstance(feature, dict):
        return all(not NAME_OF_PICTURE.fullmatch(name) and _is_metadata(part) for name, part in feature.items())
    if isinstance(feature, List | LargeList):
        return _is_metadata(feature.feature)
    if isinstance(feature, Value):
        return bool(IN_JSON.fullmatch(feature.dtype))
    return isinstance(feature, ClassLabel | Array2D | Array3D | Array4D | Array5D)


def write_pictures(
    tokens: Dataset,
    model: OptVQModel,
    image_processor: OptVQImageProcessor,
    folder: Path,
    batch_size: int,
    tile_size: int | None = None,
) -> int:
    """Decodes every row to a PNG picture whose name ends in its index; returns the number of pictures.

    A picture does not depend on the others: every batch has the same size.

    Args:
        tokens: Result of [`~reading.load_tokens`], with that model; without [`columns_to_skip`].
        model: In evaluation mode.
        folder: After [`begin`].
        tile_size: Side in pixels of the tiles that large pictures are decoded in.

    Raises:
        OSError: If a picture cannot be written; nothing half-written has a picture's name.
    """
    (folder / METADATA_FILE).unlink(missing_ok=True)  # it is written when all pictures are there
    entries = []
    with ThreadPoolExecutor() as pool, tqdm(total=len(tokens), desc="detokenizing", unit="img", disable=None) as bar:
        for columns, pictures in _decoded(tokens, model, image_processor, max(batch_size, LEAST_BATCH), tile_size):
            rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
            names = [_name(row) for row in rows]
            list(pool.map(_save, pictures, [folder / name for name in names]))
            entries += [{"file_name": name, **row} for name, row in zip(names, rows)]
            bar.update(len(rows))
    write_whole(folder / METADATA_FILE, "".join(json.dumps(entry, default=str) + "\n" for entry in entries))
    return len(entries)


@torch.inference_mode()
def _decoded(
    tokens: Dataset,
    model: OptVQModel,
    image_processor: OptVQImageProcessor,
    batch_size: int,
    tile_size: int | None,
) -> Iterator[tuple[dict[str, list], list[Image]]]:
    """The columns, without the codes, and the pictures of each batch."""
    others = tokens.remove_columns("codes")
    codes_alone = tokens.select_columns("codes").with_format("torch")
    decode: Any = model.decode
    for start in range(0, len(tokens), batch_size):
        rows = range(start, min(start + batch_size, len(tokens)))
        codes = codes_alone[list(rows)]["codes"]
        filled = torch.cat([codes, codes[:1].expand(batch_size - len(rows), *codes.shape[1:])])
        reconstruction = decode(codes=filled.to(model.device), tile_size=tile_size, return_dict=True).reconstruction
        yield others[list(rows)], image_processor.postprocess(reconstruction[: len(rows)])


def _name(row: dict[str, Any]) -> str:
    """Name of a row's picture."""
    crop = f"crop{row['crop']}_" if row.get("crop") else ""
    flipped = "flipped_" if row.get("flipped") else ""
    return f"{crop}{flipped}{row['index']:08}.png"


def _save(picture: Image, path: Path) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        picture.save(unfinished, format="png")
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
