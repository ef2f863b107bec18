"""The output folder of item ids, which is also a folder for `ResidualOptVQQuantizer.from_pretrained`.

    OUT/ids.parquet             `key` and `codes` of the items, sorted by key
    OUT/earlier_ids.parquet     those of other items that an earlier run gave, if its quantizer was used
    OUT/config.json, model.safetensors, README.md     the quantizer
    OUT/report.json, report.png

A run writes to a hidden folder, and moves all of it to its place at the end, report.json last.
"""

import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError

from ..data.fetching import find_folder
from ..parsing import parse_json
from ..residual_optvq import ResidualOptVQQuantizer
from ..training.checkpoints import flush
from ..training.digests import DIGEST, folder_digest
from .embeddings import key_array
from .unique import Ids


IDS_FILE, EARLIER_FILE, REPORT_FILE, PICTURE_FILE = "ids.parquet", "earlier_ids.parquet", "report.json", "report.png"
QUANTIZER_FILES = ["config.json", "model.safetensors"]
FILES = [IDS_FILE, EARLIER_FILE, *QUANTIZER_FILES, "README.md", PICTURE_FILE, REPORT_FILE]
WORK_FOLDER = ".ids.unfinished"


def begin(folder: Path, overwrite: bool) -> Path:
    """Makes the hidden folder for the files of a run, and returns it.

    Raises:
        ValueError: If the folder holds such files and may not be overwritten.
    """
    found = [name for name in FILES if (folder / name).exists()]
    if found and not overwrite:
        raise ValueError(f"{folder} holds {found[0]} of an earlier run: pass --overwrite, or another --output-dir")
    work = folder / WORK_FOLDER
    shutil.rmtree(work, ignore_errors=True)  # of a killed run
    (work / "result").mkdir(parents=True)
    return work


def finish(folder: Path, write: Callable[[Path], None]) -> None:
    """Writes the files of a result, by `write` into the folder that it is given, and moves them to their place.

    Raises:
        OSError: If they cannot be written; what was there before stays.
    """
    result = folder / WORK_FOLDER / "result"
    try:
        write(result)
        for path in [*result.iterdir(), result]:
            flush(path)
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error.strerror or error}") from error
    (folder / REPORT_FILE).unlink(missing_ok=True)  # its run is not whole any more
    for name in FILES:
        if (result / name).exists():
            (result / name).replace(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    flush(folder)


def load_quantizer(name: str) -> tuple[ResidualOptVQQuantizer, Path]:
    """The quantizer of a folder or a repository of the Hub, and the folder with its files.

    Raises:
        OSError: If it does not exist or cannot be reached.
        ValueError: If it has no quantizer, or a broken one.
    """
    folder = find_folder(name, [*QUANTIZER_FILES, IDS_FILE, EARLIER_FILE, REPORT_FILE])
    for file in QUANTIZER_FILES:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{name} has no quantizer of `optvq ids`: it lacks {file}")
    try:
        with redirect_stdout(io.StringIO()):  # huggingface_hub prints that it loads
            quantizer = ResidualOptVQQuantizer.from_pretrained(folder)
        if not all(bool(level.get_codebook().isfinite().all()) for level in quantizer.levels):
            raise ValueError("its codes have NaN or infinite numbers")
        if (folder / REPORT_FILE).is_file():
            report = parse_json((folder / REPORT_FILE).read_text())
            if report.get(DIGEST) != folder_digest(folder):
                raise ValueError(f"its weights are not those of {REPORT_FILE}, with which its ids were given")
            if not (folder / IDS_FILE).is_file():
                raise ValueError(f"{IDS_FILE} is missing; to give ids anew by it, remove {REPORT_FILE}, too")
        return quantizer, folder
    except (TypeError, RuntimeError, ValueError, AttributeError, SafetensorError) as error:
        raise ValueError(f"the quantizer in {name} is broken: {' '.join(str(error).split())}") from error


def write_ids(path: Path, keys: pa.Array, ids: Ids, largest: int) -> None:
    """Writes keys and ids as Parquet, of which the same ids always give the same bytes.

    Args:
        largest: Codes are unsigned integers that hold it: the largest code that there can be.
    """
    whole = ids.whole()
    exists = whole >= 0
    kind = np.min_scalar_type(largest)
    offsets = np.concatenate([[0], np.cumsum(exists.sum(axis=1))])
    values = pa.array(whole[exists].astype(kind))
    lists = pa.LargeListArray if offsets[-1] >= 2**31 else pa.ListArray
    codes = lists.from_arrays(pa.array(offsets, pa.int64() if lists is pa.LargeListArray else pa.int32()), values)
    pq.write_table(pa.table({"key": keys, "codes": codes}), path, compression="zstd")


def read_ids(folder: Path, sizes: list[int]) -> tuple[pa.Array, Ids] | None:
    """Keys and ids that were given by the run that wrote a folder, and by those before it; None if it has none.

    Args:
        sizes: Codebook size of every level.

    Raises:
        ValueError: If a file is broken, or has ids of other levels.
    """
    if not (folder / IDS_FILE).is_file():
        return None
    keys, wholes = [], []
    for path in filter(Path.is_file, (folder / IDS_FILE, folder / EARLIER_FILE)):
        try:
            table = pq.read_table(path, columns=["key", "codes"])
            codes = table.column("codes").combine_chunks()
            lengths = np.asarray(codes.value_lengths().fill_null(0))
            if (lengths > len(sizes) + 1).any():
                raise ValueError(f"its ids are not of levels with {sizes} codes")
            whole = np.full((len(codes), len(sizes) + 1), -1)
            exists = np.arange(len(sizes) + 1) < lengths[:, None]
            whole[exists] = codes.flatten().to_numpy(zero_copy_only=False)
            limits = np.array([*sizes, np.iinfo(np.int64).max])
            if not (exists[:, :-1].all() and (whole[exists] >= 0).all() and (whole < limits).all()):
                raise ValueError(f"its ids are not of levels with {sizes} codes")
            keys.append(key_array(table.column("key").combine_chunks(), "column 'key'"))
            wholes.append(whole)
        except (ValueError, TypeError, AttributeError, OSError, KeyError) as error:  # pyarrow's are of these
            raise ValueError(f"{path} is broken: {' '.join(str(error).split())}") from error
    whole, together = np.concatenate(wholes), pa.chunked_array(keys).combine_chunks()
    if len(together.unique()) < len(together):
        raise ValueError(f"the ids in {folder} are broken: a key comes twice")
    return together, Ids(whole[:, :-1], whole[:, -1])


def to_json(entries: dict[str, Any]) -> str:
    return json.dumps(entries, indent=1) + "\n"
