"""What speech_codes.py, semantic_ids.py and next_sentence.py share: quantizers of equal bits, their start, flags, results.

All have the same levels, codes and width; at inference all take the nearest code. They differ in how training assigns features
to codes, and in how codes learn.
"""

import argparse
import json
import statistics
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optvq_hf import QuantizerOutput, ResidualOptVQQuantizer
from optvq_hf.training.checkpoints import write_whole
from optvq_hf.training.codebook import cluster_centres, set_codebook, what_levels_get


TITLES = {
    "transport": "transport, gradients",
    "transport_ema": "transport, EMA",
    "nearest": "nearest, gradients",
    "nearest_ema": "nearest, EMA",
    "restarts": "nearest, EMA, restarts (vector-quantize-pytorch)",
    "drawn": "none: codes drawn at random",
}
WHICH_RUNS = ("rivals", "starts", "seeds", "output_dir")  # flags that change no run
EMA = {"codebook_update": "ema", "ema_decay": 0.9, "use_projection": False}
SETTINGS = {
    "transport": {},
    "transport_ema": EMA,
    "nearest": {"training_assignment": "nearest"},
    "nearest_ema": {"training_assignment": "nearest", **EMA},
}
STARTS = {"random": "random", "kmeans": "k-means", "own": "k-means, its own", "none": ""}
STARTS_OF = {"restarts": "own", "drawn": "none"}  # of those that have no choice


class Restarts(nn.Module):
    """ResidualVQ of vector-quantize-pytorch, with what its documentation advises against dead codes."""

    def __init__(self, num_quantizers: int, codebook_size: int, dim: int):
        super().__init__()
        try:
            from vector_quantize_pytorch import ResidualVQ
        except ImportError as error:
            raise ImportError('run pip install "optvq_hf[compare]", or leave "restarts" out of --rivals') from error
        advised = {"decay": 0.8, "kmeans_init": True, "kmeans_iters": 10, "threshold_ema_dead_code": 2}
        self.module = ResidualVQ(dim=dim, num_quantizers=num_quantizers, codebook_size=codebook_size, **advised)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        batch = features[None] if features.ndim == 2 else features
        quantized, codes, losses = self.module(batch, mask=mask)
        if features.ndim == 2:
            quantized, codes = quantized[0], codes[0]
        if mask is not None:
            quantized = quantized * mask[..., None]
        return QuantizerOutput(quantized, codes, losses.sum(), None, {})


def make_quantizer(rival: str, num_quantizers: int, codebook_size: int, dim: int) -> nn.Module:
    """The quantizer of a rival, for features (..., dim) and codes (..., num_quantizers)."""
    if rival == "restarts":
        return Restarts(num_quantizers, codebook_size, dim)
    return ResidualOptVQQuantizer(num_quantizers, codebook_size, dim, **SETTINGS[rival])


@torch.no_grad()
def start_codes(quantizer: nn.Module, start: str, features: Tensor, per_step: int, seed: int) -> None:
    """Sets the first codes to those of a start: "random" leaves those drawn from a normal distribution, as everywhere in torch.

    Args:
        features: (N, dim), of which k-means takes the clusters, level by level.
        per_step: Features of a training step.
    """
    if start != "kmeans":
        return
    for level, rest in what_levels_get(quantizer, features):
        centres = cluster_centres(rest, level.codebook_size, seed)
        set_codebook(level, centres, per_step / level.codebook_size)


def add_flags(
    parser: argparse.ArgumentParser,
    output_dir: str,
    levels: int,
    max_steps: int,
    learning_rate: float,
    more_rivals: tuple[str, ...] = (),
) -> None:
    """Flags of all examples of quantizers, with the defaults of one."""
    rivals = (*SETTINGS, "restarts", *more_rivals)
    parser.add_argument("--output-dir", default=Path(output_dir), type=Path, help="Folder for all results")
    parser.add_argument("--levels", default=levels, type=int, help="Levels of residual quantization")
    parser.add_argument("--codebook-size", default=256, type=int, help="Codes of every level")
    parser.add_argument(
        "--rivals", nargs="+", default=list(SETTINGS), choices=rivals, help="How quantizers are trained"
    )
    parser.add_argument("--starts", nargs="+", default=["random"], choices=("random", "kmeans"), help="First codes")
    parser.add_argument("--seeds", nargs="+", default=[0], type=int, help="Each is one run of everything")
    parser.add_argument("--max-steps", default=max_steps, type=int, help="Steps of training a quantizer")
    parser.add_argument("--learning-rate", default=learning_rate, type=float, help="Highest learning rate")


def earlier_runs(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The runs in results.json, which an interrupted command has made; of the same flags, or there is an error."""
    path = arguments.output_dir / "results.json"
    if not path.exists():
        return []
    results, settings = json.loads(path.read_text()), _settings(arguments)
    for run in results["runs"]:
        earlier = run.setdefault("settings", _that_change_runs(results.get("settings", {})))  # older: told once
        if changed := [name for name in settings if settings[name] != earlier.get(name)]:
            raise SystemExit(f"{path} was made with other {', '.join(changed)}; take another --output-dir")
    return results["runs"]


def list_runs(arguments: argparse.Namespace, made: list[dict[str, Any]]) -> list[tuple[int, str, str]]:
    """Seed, rival and start of every run that is not made yet."""
    earlier = {(run["seed"], run["rival"], run["start"]) for run in made}
    runs = {
        (seed, rival, STARTS_OF.get(rival, start)): None
        for seed, start, rival in product(arguments.seeds, arguments.starts, arguments.rivals)
    }
    return [run for run in runs if run not in earlier]


def usage(codes: Tensor, codebook_size: int) -> list[float]:
    """Share of the codes that occur in codes (N, levels), in percent, level by level."""
    return [100 * len(level.unique()) / codebook_size for level in codes.unbind(-1)]


def save_run(arguments: argparse.Namespace, runs: list[dict[str, Any]], run: dict[str, Any], **facts: Any) -> None:
    """Adds a run, with its settings, to runs and prints it; writes results.json: facts of the data, runs so far.

    Settings are told of every run, as several commands may add to one file.
    """
    print(json.dumps(run))
    runs.append(run | {"settings": _settings(arguments)})
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    write_whole(arguments.output_dir / "results.json", json.dumps({**facts, "runs": runs}, indent=1) + "\n")


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    return _that_change_runs(
        {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    )


def _that_change_runs(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in WHICH_RUNS}


def table(runs: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Markdown: a row for every rival and start, with the mean over seeds and, in brackets, the lowest and the highest.

    Args:
        runs: Each with `rival`, `start`, `seed` and the keys of `columns`.
        columns: From key to title.
    """
    lines = [["training", "start", "seeds", *columns.values()], ["-"] * (3 + len(columns))]
    for rival, start in product(TITLES, STARTS):
        if of_row := [run for run in runs if (run["rival"], run["start"]) == (rival, start)]:
            cells = [_cell([run[key] for run in of_row]) for key in columns]
            lines.append([TITLES[rival], STARTS[start], str(len(of_row)), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(values: list[Any]) -> str:
    if isinstance(values[0], list):
        return ", ".join(map(_cell, zip(*values)))
    low, high, mean = min(values), max(values), statistics.mean(values)
    text = f"{mean:.4g}" if mean >= 100 else f"{mean:.3g}"
    return text if low == high else f"{text} ({low:.3g} to {high:.3g})"
