"""Pictures of tokens: a folder that `load_dataset` reads as an image folder."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL.Image import Image
from tqdm.auto import tqdm

from ..image_processing_optvq import OptVQImageProcessor
from ..modeling_optvq import OptVQModel
from ..training.checkpoints import write_whole


# What an image folder of `datasets` reads the columns of its pictures from.
METADATA_FILE = "metadata.jsonl"
# Least images of a batch. PyTorch 2.14 rounds convolutions of smaller ones differently on a single thread.
LEAST_BATCH = 16


def write_pictures(
    tokens: Dataset, model: OptVQModel, image_processor: OptVQImageProcessor, folder: Path, batch_size: int
) -> int:
    """Decodes every row to a PNG picture whose name ends in its index; returns the number of pictures.

    A picture does not depend on the others: every batch has the same size.

    Args:
        tokens: Result of [`~reading.load_tokens`], with that model.
        model: In evaluation mode.

    Raises:
        OSError: If a picture cannot be written; nothing half-written has a picture's name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METADATA_FILE).unlink(missing_ok=True)  # it is written when all pictures are there
    entries = []
    with ThreadPoolExecutor() as pool, tqdm(total=len(tokens), desc="detokenizing", unit="img", disable=None) as bar:
        for columns, pictures in _decoded(tokens, model, image_processor, max(batch_size, LEAST_BATCH)):
            rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
            names = [_name(row) for row in rows]
            list(pool.map(_save, pictures, [folder / name for name in names]))
            entries += [{"file_name": name, **row} for name, row in zip(names, rows)]
            bar.update(len(rows))
    write_whole(folder / METADATA_FILE, "".join(json.dumps(entry, default=str) + "\n" for entry in entries))
    return len(entries)


@torch.inference_mode()
def _decoded(
    tokens: Dataset, model: OptVQModel, image_processor: OptVQImageProcessor, batch_size: int
) -> Iterator[tuple[dict[str, list], list[Image]]]:
    """The columns, without the codes, and the pictures of each batch."""
    others = tokens.remove_columns("codes")
    codes_alone = tokens.select_columns("codes").with_format("torch")
    decode: Any = model.decode
    for start in range(0, len(tokens), batch_size):
        rows = range(start, min(start + batch_size, len(tokens)))
        codes = codes_alone[list(rows)]["codes"]
        filled = torch.cat([codes, codes[:1].expand(batch_size - len(rows), *codes.shape[1:])])
        reconstruction = decode(codes=filled.to(model.device), return_dict=True).reconstruction
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
