"""The record of a run: one JSON line per logged step, and a picture of it."""

import json
from pathlib import Path


LOG_FILE, CURVES_FILE = "training_log.jsonl", "training_curves.png"

# Key in the log, title of the panel.
CURVES = {
    "loss": "Loss",
    "psnr": "PSNR of the batch (dB)",
    "codebook_usage": "Codebook usage since the last point (%)",
    "perplexity": "Perplexity of the batch",
    "quantizer": "Quantizer loss",
    "learning_rate": "Learning rate",
}


class History:
    """Appends entries to `training_log.jsonl` as they come.

    Args:
        folder: Where to write; None keeps the entries in memory alone.
    """

    def __init__(self, folder: Path | None):
        self.folder, self.entries = folder, []
        if folder is not None:
            (folder / LOG_FILE).write_text("")

    def add(self, entry: dict[str, float]):
        self.entries.append(entry)
        if self.folder is not None:
            with open(self.folder / LOG_FILE, "a") as file:
                file.write(json.dumps(entry) + "\n")

    def draw(self) -> Path:
        """Writes `training_curves.png` and returns its path."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 6), layout="constrained")
        steps = [entry["step"] for entry in self.entries]
        for axes, (key, title) in zip(figure.subplots(2, 3).flat, CURVES.items()):
            axes.plot(steps, [entry[key] for entry in self.entries], linewidth=1.2)
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("step", fontsize=9)
            axes.grid(alpha=0.3)
            if key == "loss":
                axes.set_yscale("log")
            if key == "codebook_usage":
                axes.set_ylim(0, 105)
        path = self.folder / CURVES_FILE
        figure.savefig(path, dpi=110)
        return path
