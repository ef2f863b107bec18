"""From embeddings to item ids: reads, trains or loads a quantizer, gives ids, resolves collisions, reports and writes."""

import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from tqdm.auto import tqdm

from .. import __version__
from ..residual_optvq import ResidualOptVQQuantizer
from ..training.digests import DIGEST, folder_digest
from ..training.lock import locked
from ..training.processes import gather_objects, is_first, on_first, world_size
from .arguments import EmbeddingArguments, IdArguments
from .embeddings import Embeddings, pc, read_embeddings
from .folder import (
    EARLIER_FILE,
    IDS_FILE,
    PICTURE_FILE,
    REPORT_FILE,
    begin,
    finish,
    load_quantizer,
    read_ids,
    to_json,
    write_ids,
)
from .report import collisions_of, of_levels, of_prefixes, save_picture
from .training import train_quantizer
from .unique import Ids, make_unique


class Earlier(NamedTuple):
    """Ids that earlier runs gave.

    Attributes:
        rows: (N,) for every item its row among them, -1 for a new one.
        keys, ids: Of those items that are not among the N.
        kept: All of them.
    """

    rows: np.ndarray
    keys: pa.Array
    ids: Ids
    kept: Ids


class Assigned(NamedTuple):
    """Nearest codes of embeddings.

    Attributes:
        codes: (N, levels) int64.
        errors: (levels,) float64, sum of the squared differences to the codes of the first 1, 2, ... levels.
        variance: Sum of the squared differences to the mean embedding.
    """

    codes: np.ndarray
    errors: np.ndarray
    variance: float


def make_ids(arguments: IdArguments, source: EmbeddingArguments, device: torch.device) -> dict[str, Any] | None:
    """Writes ids, quantizer and report into the output folder, in every process of the command.

    Rank 0 reads and trains; the processes share the search for codes, block by block. So the result does not depend on their
    number, nor on the order of the source: everything is in the order of the keys.

    Returns:
        The report; None in the other processes.

    Raises:
        OSError: If something does not exist, cannot be reached or cannot be written.
        ValueError: If embeddings, keys, quantizer or output folder are wrong, or `unique` asks for more ids than there are.
    """
    folder = Path(arguments.output_dir or "")
    with locked(folder):
        work = on_first(lambda: begin(folder, arguments.overwrite))
        try:
            keys: list[pa.Array] = []  # only rank 0 needs them

            def read() -> Embeddings:
                of_items, embeddings = read_embeddings(source, work / "embeddings")
                keys.append(of_items)
                return embeddings

            embeddings = on_first(read)
            quantizer, earlier = on_first(lambda: _quantizer(arguments, embeddings, keys[0], device))
            assigned = assign(quantizer, embeddings, device)
            return _finish(arguments, keys[0], embeddings, quantizer, assigned, earlier) if is_first() else None
        finally:
            if is_first():
                shutil.rmtree(work, ignore_errors=True)


def _quantizer(
    arguments: IdArguments, embeddings: Embeddings, keys: pa.Array, device: torch.device
) -> tuple[ResidualOptVQQuantizer, Earlier | None]:
    """The quantizer, trained or loaded, and the ids that were given by it."""
    if arguments.quantizer is None:
        settings: dict[str, Any] = arguments.of_training()
        _check_room(arguments, len(embeddings), [settings["codebook_size"]] * settings["num_quantizers"])
        return train_quantizer(embeddings, **settings, device=device), None
    quantizer, folder = load_quantizer(arguments.quantizer)
    if quantizer.num_heads != 1 or quantizer.dim != embeddings.dim:
        raise ValueError(
            f"the quantizer in {arguments.quantizer} is of {quantizer.dim} numbers in {quantizer.num_heads} heads, the "
            f"embeddings have {embeddings.dim}, for one head"
        )
    found = read_ids(folder, _sizes(quantizer))
    if found is None:
        _check_room(arguments, len(embeddings), _sizes(quantizer))
        return quantizer, None
    earlier_keys, kept = found
    if earlier_keys.type != keys.type:
        raise ValueError(
            f"keys are {keys.type}, those in {arguments.quantizer} are {earlier_keys.type}: make them of the same type"
        )
    _check_uniqueness(arguments, kept)
    rows = pc.fill_null(pc.index_in(keys, value_set=earlier_keys), -1).to_numpy(zero_copy_only=False).astype(np.int64)
    others = np.setdiff1d(np.arange(len(earlier_keys)), rows)
    others = others[np.asarray(pc.sort_indices(earlier_keys.take(pa.array(others))))]
    _check_room(arguments, int((rows < 0).sum()) + len(earlier_keys), _sizes(quantizer))
    ids_of_others = Ids(kept.codes[others], kept.numbers[others])
    return quantizer, Earlier(rows, earlier_keys.take(pa.array(others)), ids_of_others, kept)


def _sizes(quantizer: ResidualOptVQQuantizer) -> list[int]:
    return [level.codebook_size for level in quantizer.levels]


def _check_uniqueness(arguments: IdArguments, kept: Ids) -> None:
    """Raises ValueError if ids that were given before do not allow what is asked for."""
    colliding = collisions_of(kept)["colliding_items"]
    if arguments.unique and colliding:
        raise ValueError(
            f"{colliding:,} items in {arguments.quantizer} share an id with another, and ids stay: leave --unique out, or give "
            "all ids anew, without --quantizer"
        )
    if not arguments.unique and (kept.numbers >= 0).any():
        raise ValueError(
            f"ids in {arguments.quantizer} have further codes, and those of new items could be their beginnings: pass --unique"
        )


def _check_room(arguments: IdArguments, number: int, sizes: list[int]) -> None:
    """Raises ValueError if unique ids are asked for, and there are not enough of them."""
    if arguments.unique and number > math.prod(sizes):
        raise ValueError(
            f"--unique asks for {number:,} ids, but levels of {', '.join(map(str, sizes))} codes have only "
            f"{math.prod(sizes):,}: raise --num-quantizers or --codebook-size"
        )


@torch.inference_mode()
def assign(quantizer: ResidualOptVQQuantizer, embeddings: Embeddings, device: torch.device) -> Assigned:
    """The nearest codes of all embeddings, level by level; every process does its share of the blocks."""
    quantizer.to(device)
    rank, blocks = torch.distributed.get_rank() if world_size() > 1 else 0, {}
    near_mean = embeddings.block(0).numpy().mean(axis=0, dtype=np.float64)  # so that sums of squares do not cancel
    mine = range(rank, embeddings.num_blocks, world_size())
    for number in tqdm(mine, desc="assigning", unit="block", disable=rank > 0 or None):
        rest = embeddings.block(number).to(device)
        differences = rest.cpu().numpy() - near_mean
        codes, errors, total = [], [float(np.square(differences).sum())], differences.sum(axis=0)
        for level in quantizer.levels:
            output = level(rest, assignment="nearest", return_loss=False)
            rest = rest - output.quantized
            codes.append(output.codes)
            errors.append(_sum_of_squares(rest))
        blocks[number] = torch.cat(codes, dim=1).cpu().numpy(), errors, total
    quantizer.cpu()
    together = {number: block for part in gather_objects(blocks) for number, block in part.items()}
    codes, errors, totals = zip(*(together[number] for number in range(embeddings.num_blocks)))
    errors = np.sum(errors, axis=0)
    variance = float(errors[0] - np.square(np.sum(totals, axis=0)).sum() / len(embeddings))
    return Assigned(np.concatenate(codes), errors[1:], variance)


def _sum_of_squares(rows: torch.Tensor) -> float:
    """Summed by one thread, so that the last digit does not depend on their number."""
    return float(np.square(rows.cpu().numpy(), dtype=np.float64).sum())


def _finish(
    arguments: IdArguments,
    keys: pa.Array,
    embeddings: Embeddings,
    quantizer: ResidualOptVQQuantizer,
    assigned: Assigned,
    earlier: Earlier | None,
) -> dict[str, Any]:
    """Resolves collisions, and writes everything; by rank 0."""
    codebooks = [level.get_codebook().detach().numpy() for level in quantizer.levels]
    ids = _ids(arguments, assigned.codes, embeddings, codebooks, earlier)
    before, sizes = Ids.of_levels(assigned.codes), _sizes(quantizer)
    moved = np.flatnonzero((ids.codes != before.codes).any(axis=1))
    error = assigned.errors[-1]
    for part in np.array_split(moved, -(-len(moved) // 1024) or 1):
        error += _error(embeddings, codebooks, part, ids.codes) - _error(embeddings, codebooks, part, before.codes)
    new = np.ones(len(keys), dtype=bool) if earlier is None else earlier.rows < 0
    every = ids if earlier is None else Ids(*(np.concatenate(parts) for parts in zip(ids, earlier.ids)))
    report = {
        "optvq_hf": __version__,
        "items": len(keys),
        "dim": embeddings.dim,
        "training": arguments.of_training() if arguments.quantizer is None else None,
        "unique": arguments.unique,
        "new_items": int(new.sum()),
        "earlier_items": 0 if earlier is None else len(earlier.kept.codes),
        "items_with_other_codes_than_the_nearest": len(moved),
        "items_with_a_further_code": int((ids.numbers >= 0).sum()),
        "further_codes": int(ids.numbers.max(initial=-1)) + 1,
        "reconstruction_error": {
            "mean_squared": [float(of_level) / len(keys) / embeddings.dim for of_level in assigned.errors],
            "share_of_variance": [_share(of_level, assigned.variance) for of_level in assigned.errors],
            "share_of_variance_of_ids": _share(error, assigned.variance),
        },
        "collisions": {"nearest codes": collisions_of(before), "ids": collisions_of(every)},
        "levels": of_levels(before.codes, sizes),
        "prefixes": of_prefixes(before.codes, sizes),
    }

    def write(result: Path) -> None:
        quantizer.save_pretrained(result)
        largest = max(*sizes, int(every.numbers.max(initial=0)) + 1) - 1
        write_ids(result / IDS_FILE, keys, ids, largest)
        if earlier is not None:
            write_ids(result / EARLIER_FILE, earlier.keys, earlier.ids, largest)
        save_picture(before.codes, report, result / PICTURE_FILE)
        report[DIGEST] = folder_digest(result)
        (result / REPORT_FILE).write_text(to_json(report))

    finish(Path(arguments.output_dir or ""), write)
    return report


def _ids(
    arguments: IdArguments,
    codes: np.ndarray,
    embeddings: Embeddings,
    codebooks: list[np.ndarray],
    earlier: Earlier | None,
) -> Ids:
    """The ids of all items: what they were given before, otherwise their nearest codes, or unique ones."""
    ids = Ids.of_levels(codes.copy())
    new = np.arange(len(codes)) if earlier is None else np.flatnonzero(earlier.rows < 0)
    if arguments.unique:

        def rest(positions: np.ndarray) -> np.ndarray:
            return _rest(embeddings, codebooks[:-1], new[positions], codes)

        of_new = make_unique(codes[new], rest, codebooks[-1], None if earlier is None else earlier.kept)
        ids.codes[new], ids.numbers[new] = of_new
    if earlier is not None:
        known = np.flatnonzero(earlier.rows >= 0)
        ids.codes[known], ids.numbers[known] = (of_all[earlier.rows[known]] for of_all in earlier.kept)
    return ids


def _rest(embeddings: Embeddings, codebooks: list[np.ndarray], items: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """(n, dim): what codes of these levels leave of embeddings."""
    rest = embeddings.take(items).numpy()
    for codebook, level in zip(codebooks, codes.T):
        rest = rest - codebook[level[items]]
    return rest


def _error(embeddings: Embeddings, codebooks: list[np.ndarray], items: np.ndarray, codes: np.ndarray) -> float:
    """Sum of the squared differences of these items to their codes."""
    return float(np.square(_rest(embeddings, codebooks, items, codes)).sum(dtype=np.float64))


def _share(error: float, variance: float) -> float:
    """An error as a share of the variance; 0 if there is none of both."""
    return float(error) / variance if variance > 0 else 0.0
