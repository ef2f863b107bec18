"""The record of a run: one JSON line per logged step, a picture of it, and its sum."""

import json
import math
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator


LOG_FILE, CURVES_FILE = "training_log.jsonl", "training_curves.png"
RECIPE_FILE, SUMMARY_FILE = "recipe.yaml", "training_summary.json"

# Title of the panel, then keys in the log with their labels.
CURVES = {
    "Loss": {"loss": None},
    "PSNR of the batch (dB)": {"psnr": None},
    "Codebook usage since the last point (%)": {"codebook_usage": None},
    "Perplexity": {"perplexity": None},
    "Transport and nearest code differ (%)": {"nearest_disagreement": None},
    "Marginal error of the transport": {"marginal_error": None},
    "Norms": {"latent_norm": "latents", "codebook_norm": "codes"},
    "Gradient norms": {"gradient_norm": "autoencoder", "discriminator_gradient_norm": "discriminator"},
    "Logits of the discriminator": {"logits_real": "real", "logits_fake": "reconstructed"},
    "Quantizer loss": {"quantizer": None},
    "Waiting for data (% of time)": {"data_wait": None},
    "Learning rate": {"learning_rate": None},
}
LOGARITHMIC = ("Loss", "Gradient norms", "Norms")


class History:
    """Appends entries to `training_log.jsonl` as they come.

    Args:
        folder: Where to write.
        step: Go on after this step: keep the file's entries up to it. 0 begins anew.
        writes: False keeps new entries in memory alone, for all processes but the first.
    """

    def __init__(self, folder: Path, step: int = 0, writes: bool = True):
        self.folder, self.writes, self.entries = folder, writes, []
        path = folder / LOG_FILE
        if step > 0 and path.is_file():
            self.entries = [
                entry for entry in map(_parse, path.read_text().splitlines()) if entry.get("step", step + 1) <= step
            ]
        if not writes:
            return
        unfinished = path.with_name(f".{LOG_FILE}")
        unfinished.write_text("".join(map(_line, self.entries)))
        unfinished.replace(path)

    def add(self, entry: dict):
        self.entries.append(entry)
        if self.writes:
            with open(self.folder / LOG_FILE, "a") as file:
                file.write(_line(entry))

    def draw(self) -> Path:
        """Writes `training_curves.png` and returns its path. Where an alarm began there is a red line."""
        from matplotlib.figure import Figure

        recorded = {key for entry in self.entries for key in entry}
        panels = {title: keys for title, keys in CURVES.items() if recorded & keys.keys()}
        rows = -(-len(panels) // 3)
        figure = Figure(figsize=(12, 2.9 * rows), layout="constrained")
        alarms = first_steps_of_alarms(self.entries)
        for axes, (title, keys) in zip(figure.subplots(rows, 3, squeeze=False).flat, panels.items()):
            for key, label in keys.items():
                points = [(entry["step"], entry[key]) for entry in self.entries if entry.get(key) is not None]
                if points:
                    axes.plot(*zip(*points), linewidth=1.2, label=label)
            for step in alarms.values():
                axes.axvline(step, color="tab:red", linewidth=0.8)
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("step", fontsize=9)
            axes.set_xlim(0, self.entries[-1]["step"])
            axes.grid(alpha=0.3)
            if any(keys.values()):
                axes.legend(fontsize=8)
            if title in LOGARITHMIC and all(
                value > 0 for line in axes.lines[: len(keys)] for value in line.get_ydata()
            ):
                axes.set_yscale("log")
            if title.startswith("Codebook usage"):
                axes.set_ylim(0, 105)
        for axes in figure.axes[len(panels) :]:
            axes.set_axis_off()
        if alarms:
            figure.suptitle(
                "alarms: " + ", ".join(f"{name} ({step})" for name, step in alarms.items()), color="tab:red"
            )
        path = self.folder / CURVES_FILE
        figure.savefig(path, dpi=110)
        return path


def summarize(entries: list[dict], images_per_step: int, accelerator: Accelerator, dataset: dict) -> dict:
    """What a finished run cost and met, as JSON: the whole run, also if it was interrupted.

    Args:
        dataset: What it was trained on, entries for the summary.
    """
    seconds, before = 0.0, 0
    for entry in entries:
        seconds += (entry["step"] - before) * images_per_step / entry["images_per_second"]
        before = entry["step"]
    device = accelerator.device
    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    return {
        **dataset,
        "steps": before,
        "images_per_step": images_per_step,
        "seconds": round(seconds, 1),
        "device": f"{name}, {threads}" if device.type == "cpu" else name,
        "processes": accelerator.num_processes,
        "alarms": first_steps_of_alarms(entries),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def first_steps_of_alarms(entries: list[dict]) -> dict[str, int]:
    """When each alarm rang first, by name."""
    first = {}
    for entry in entries:
        for name in entry.get("alarms", ()):
            first.setdefault(name, entry["step"])
    return first


def _line(entry: dict) -> str:
    """JSON has no NaN and no infinity: null."""
    bad = {name: None for name, value in entry.items() if isinstance(value, float) and not math.isfinite(value)}
    return json.dumps(entry | bad) + "\n"


def _parse(line: str) -> dict:
    """An entry; of a line that was cut off when a run was killed, nothing."""
    try:
        return {name: math.nan if value is None else value for name, value in json.loads(line).items()}
    except ValueError:
        return {}
