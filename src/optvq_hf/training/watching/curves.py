"""The curves of a training log as a picture."""

import math
from pathlib import Path

from .log import first_steps_of_alarms


CURVES_FILE = "training_curves.png"

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


def draw_curves(entries: list[dict], folder: Path) -> Path:
    """Draws the curves of a log, with a red line where an alarm was first raised; returns the path of the picture.

    Args:
        entries: Of [`~watching.log.TrainingLog`], at least one.
        folder: Where to write `training_curves.png`.
    """
    from matplotlib.figure import Figure

    recorded = {key for entry in entries for key in entry}
    panels = {title: keys for title, keys in CURVES.items() if recorded & keys.keys()}
    rows = -(-len(panels) // 3)
    figure = Figure(figsize=(12, 2.9 * rows), layout="constrained")
    alarms = first_steps_of_alarms(entries)
    for axes, (title, keys) in zip(figure.subplots(rows, 3, squeeze=False).flat, panels.items()):
        values = []
        for key, label in keys.items():
            points = [(entry["step"], entry[key]) for entry in entries if math.isfinite(entry.get(key, math.nan))]
            if points:
                axes.plot(*zip(*points), linewidth=1.2, label=label)
                values += [value for _, value in points]
        for step in alarms.values():
            axes.axvline(step, color="tab:red", linewidth=0.8)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.set_xlim(0, entries[-1]["step"])
        axes.grid(alpha=0.3)
        if any(keys.values()):
            axes.legend(fontsize=8)
        if title in LOGARITHMIC and values and min(values) > 0:
            axes.set_yscale("log")
        if title.startswith("Codebook usage"):
            axes.set_ylim(0, 105)
    for axes in figure.axes[len(panels) :]:
        axes.set_axis_off()
    if alarms:
        names = ", ".join(f"{name} ({step})" for name, step in alarms.items())
        figure.suptitle(f"alarms: {names}", color="tab:red")
    path = folder / CURVES_FILE
    figure.savefig(path, dpi=110)
    return path
