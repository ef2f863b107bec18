"""What a report of item ids says: how evenly codes are used, and how many items share an id."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..codes_optvq import perplexity
from .unique import Ids, number_rows


# How many of the largest groups of items with one id are reported.
LARGEST_GROUPS = 10


def usage_of(counts: np.ndarray) -> dict[str, float]:
    """Usage in percent, perplexity, and Gini coefficient in [0, 1) of counts (K,): 0 is even use."""
    ranks = np.arange(1, len(counts) + 1)
    gini = (2 * ranks - len(counts) - 1) @ np.sort(counts) / (len(counts) * counts.sum())
    evenness = perplexity(torch.from_numpy(counts).double()).item()
    return {"usage": 100 * np.count_nonzero(counts) / len(counts), "perplexity": evenness, "gini": float(gini)}


def of_levels(codes: np.ndarray, sizes: list[int]) -> list[dict[str, Any]]:
    """For every level, the use of its codes; codes (N, levels)."""
    counts = [np.bincount(level, minlength=size) for level, size in zip(codes.T, sizes)]
    return [{"codebook_size": len(row), "dead_codes": int((row == 0).sum()), **usage_of(row)} for row in counts]


def of_prefixes(codes: np.ndarray, sizes: list[int]) -> list[dict[str, Any]]:
    """For the first 1, 2, ... codes together, how many there are, and how evenly those are used."""
    prefixes, possible = [], 1
    for levels, size in enumerate(sizes, start=1):
        possible *= size
        counts = np.bincount(number_rows(codes[:, :levels]))
        entries = usage_of(counts) | {"usage": 100 * len(counts) / possible}
        prefixes.append({"levels": levels, "distinct": len(counts), **entries})
    return prefixes


def collisions_of(ids: Ids) -> dict[str, Any]:
    """How many items have the same id as another, and how the largest groups are."""
    sizes = np.bincount(number_rows(ids.whole()))
    shared = np.sort(sizes[sizes > 1])[::-1]
    numbers, of_size = np.unique(shared, return_counts=True)
    return {
        "distinct_ids": len(sizes),
        "colliding_items": int(shared.sum()),
        "collision_rate": 100 * (1 - len(sizes) / len(ids.codes)),
        "largest_groups": shared[:LARGEST_GROUPS].tolist(),
        "groups_by_size": {str(size): int(number) for size, number in zip(numbers, of_size)},
    }


def save_picture(codes: np.ndarray, report: dict[str, Any], path: Path) -> None:
    """Plots the use of every level's codes, and the groups of items with one id by their size.

    Args:
        codes: (N, levels) by the nearest codes.
        report: With `levels` and `collisions`, of which there may be none.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    use, groups = figure.subplots(1, 2)
    for number, (level, entries) in enumerate(zip(codes.T, report["levels"]), start=1):
        size = entries["codebook_size"]
        shares = np.sort(np.bincount(level, minlength=size))[::-1] / len(level) * size
        use.plot(range(1, size + 1), shares, label=f"level {number}: {entries['usage']:.1f} % used")
    use.axhline(1, color="grey", linestyle=":", linewidth=1, label="perfectly even use")
    use.set(xlabel="code, most frequent first", ylabel="use / even use", yscale="log")
    use.legend(fontsize=8)
    for name, entries in report["collisions"].items():
        by_size = {int(size): number for size, number in entries["groups_by_size"].items()}
        label = f"{name}: {entries['colliding_items']:,} items"
        groups.plot(by_size.keys(), by_size.values(), "o", markersize=4, label=label)
    groups.set(xlabel="items with the same id", ylabel="ids")
    if any(entries["groups_by_size"] for entries in report["collisions"].values()):
        groups.set(xscale="log", yscale="log")
    groups.legend(fontsize=8)
    for axes in (use, groups):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
