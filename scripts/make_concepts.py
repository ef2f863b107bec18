"""Draws the pictures of docs/concepts.md from calls of the solver, and writes the figures that the page quotes.

    python scripts/make_concepts.py

Every experiment is a function of seeds alone; a test runs them again and compares with docs/concepts.json.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from optvq_hf.sinkhorn import nearest_assign, sinkhorn_assign, sinkhorn_plan


DOCS = Path(__file__).resolve().parents[1] / "docs"
INK, MUTED, ACCENT, SECOND = "#1b1f24", "#9aa7b8", "#c8102e", "#1f5fa8"
EPSILONS, ROUNDS, BALANCES = (1.0, 10.0, 100.0), (2, 3, 5, 10, 20, 50), (0.0, 0.1, 0.5, 1.0)


def features_and_codes(num_features: int = 60, num_codes: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 2) features in two clusters, and (K, 2) codes of which most lie to one side, as random codes do."""
    generator = torch.Generator().manual_seed(0)
    side = torch.where(torch.arange(num_features) % 3 > 0, -1.0, 1.0)[:, None] * torch.tensor([[1.0, 0.3]])
    features = side + 0.35 * torch.randn(num_features, 2, generator=generator)
    codes = torch.tensor([1.6, 1.0]) + 0.7 * torch.randn(num_codes, 2, generator=generator)
    return features, codes


def many_features_and_codes() -> tuple[torch.Tensor, torch.Tensor]:
    """(2048, 8) features and (256, 8) codes, both normal, the codes of half the width and beside the features."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2048, 8, generator=generator), 0.5 + 0.5 * torch.randn(256, 8, generator=generator)


def transport(features: torch.Tensor, codes: torch.Tensor, **changes: Any) -> Any:
    """The solver's answer with the settings of the paper, but for the changes."""
    settings = {"epsilon": 10.0, "iterations": 5, "normalization": "zscore", **changes}
    return sinkhorn_assign(features, codes, **settings)


def usage(codes: torch.Tensor, number: int) -> float:
    """Share of the codes that occur, in percent."""
    return 100 * codes.unique().numel() / number


def measure() -> dict[str, Any]:
    """All figures of the page."""
    features, codes = features_and_codes()
    many, book = many_features_and_codes()
    figures: dict[str, Any] = {
        "codes used of 12": {
            "nearest": nearest_assign(features, codes).unique().numel(),
            "transport": transport(features, codes).codes.unique().numel(),
        },
        "usage by epsilon": {
            f"{epsilon:g}": usage(transport(many, book, epsilon=epsilon).codes, len(book)) for epsilon in EPSILONS
        },
        "marginal error by rounds": {
            f"{epsilon:g}": [
                transport(many, book, epsilon=epsilon, iterations=rounds).marginal_error.item() for rounds in ROUNDS
            ]
            for epsilon in EPSILONS
        },
        "usage by balance": {
            f"{balance:g}": usage(transport(many, book, balance=balance).codes, len(book)) for balance in BALANCES
        },
        "codes that change with the batch, in percent": changed_by_the_batch(many, book),
    }
    return figures


def changed_by_the_batch(features: torch.Tensor, codes: torch.Tensor) -> dict[str, float]:
    """Share of the codes of the same 256 features that differ between two batches, in percent."""
    same, others, different = features[:256], features[256:1024], features[1024:1792] + 1.0
    batches = [torch.cat([same, rest]) for rest in (others, different)]
    assigned = {
        "transport over the batch": [transport(batch, codes).codes for batch in batches],
        "nearest": [nearest_assign(batch, codes) for batch in batches],
    }
    return {
        name: 100 * (first[:256] != second[:256]).double().mean().item() for name, (first, second) in assigned.items()
    }


# ---- pictures --------------------------------------------------------------------------------------------------------


def new_figure(columns: int, height: float = 3.2) -> tuple[Figure, Sequence[Axes]]:
    """A figure of a row of axes."""
    figure = Figure(figsize=(9, height), layout="constrained", facecolor="white")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=8, colors=INK)
    return figure, axes


def draw_assignments() -> Figure:
    """Features joined to their codes, by nearest codes and by transport."""
    features, codes = features_and_codes()
    figure, axes = new_figure(2, 2.9)
    chosen = {"nearest codes": nearest_assign(features, codes), "transport": transport(features, codes).codes}
    for one, (title, of_feature) in zip(axes, chosen.items(), strict=True):
        for feature, code in zip(features, codes[of_feature], strict=True):
            one.plot(*torch.stack([feature, code]).T, color=MUTED, linewidth=0.7, zorder=1)
        used = torch.bincount(of_feature, minlength=len(codes)) > 0
        one.scatter(*features.T, s=12, color=SECOND, zorder=2, label="features")
        one.scatter(*codes[used].T, s=60, color=ACCENT, zorder=3, label="codes in use")
        one.scatter(*codes[~used].T, s=60, facecolor="white", edgecolor=INK, zorder=3, label="codes without a feature")
        one.set_title(f"{title}: {int(used.sum())} of {len(codes)} codes in use", fontsize=11, color=INK)
        one.set_aspect("equal")
        one.set_xticks([])
        one.set_yticks([])
        one.spines[:].set_visible(False)
    axes[0].legend(fontsize=8, frameon=False, loc="upper left")
    return figure


def draw_epsilon() -> Figure:
    """Transport plans of the same features and codes at three epsilons."""
    features, codes = features_and_codes(30, 8)
    features = features[features[:, 0].argsort()]
    codes = codes[codes[:, 0].argsort()]
    figure, axes = new_figure(len(EPSILONS), 3.6)
    for one, epsilon in zip(axes, EPSILONS, strict=True):
        plan = sinkhorn_plan(torch.cdist(features, codes), epsilon=epsilon, iterations=50, normalization="zscore")
        one.imshow(plan, cmap="magma_r", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        one.set_title(f"epsilon {epsilon:g}", fontsize=11, color=INK)
        one.set_xlabel("code", fontsize=9, color=INK)
    axes[0].set_ylabel("feature", fontsize=9, color=INK)
    return figure


def draw_rounds(figures: dict[str, Any]) -> Figure:
    """The marginal error over the number of rounds."""
    figure, [one] = new_figure(1)
    styles = zip(figures["marginal error by rounds"].items(), (SECOND, ACCENT, INK), ("o", "s", "^"), strict=True)
    for (epsilon, errors), colour, marker in styles:
        one.plot(ROUNDS, errors, color=colour, marker=marker, label=f"epsilon {epsilon}")
    one.set_xscale("log")
    one.set_xticks(ROUNDS, [str(rounds) for rounds in ROUNDS])
    one.minorticks_off()
    one.set_yscale("log")
    one.set_xlabel("rounds", fontsize=9, color=INK)
    one.set_ylabel("marginal error", fontsize=9, color=INK)
    one.legend(fontsize=9, frameon=False)
    return figure


def draw_balance() -> Figure:
    """How many features each code gets, sorted, at several balances."""
    many, book = many_features_and_codes()
    figure, axes = new_figure(len(BALANCES), 2.6)
    for one, balance in zip(axes, BALANCES, strict=True):
        counts = torch.bincount(transport(many, book, balance=balance).codes, minlength=len(book)).sort(descending=True)
        one.fill_between(range(len(book)), counts.values, step="mid", color=SECOND, linewidth=0)
        one.axhline(len(many) / len(book), color=ACCENT, linewidth=1)
        one.set_title(f"balance {balance:g}", fontsize=11, color=INK)
        one.set_ylim(0, 60)
        one.set_xlabel("codes, most used first", fontsize=9, color=INK)
    axes[0].set_ylabel("features", fontsize=9, color=INK)
    return figure


def main() -> None:
    """Writes docs/concepts.json and the pictures."""
    figures = measure()
    (DOCS / "concepts.json").write_text(json.dumps(figures, indent=1) + "\n")
    pictures = {
        "assignments": draw_assignments(),
        "epsilon": draw_epsilon(),
        "rounds": draw_rounds(figures),
        "balance": draw_balance(),
    }
    for name, figure in pictures.items():
        path = DOCS / "images" / f"concepts_{name}.png"
        figure.savefig(path, dpi=110, metadata={"Software": None})
        print(path)


if __name__ == "__main__":
    main()
