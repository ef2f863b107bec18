"""Pictures of an evaluation: originals over reconstructions, and how often each code is used."""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torchvision.utils import make_grid

from ..image_processing_optvq import OptVQImageProcessor


def save_reconstructions(
    originals: torch.Tensor,
    reconstructions: torch.Tensor,
    image_processor: OptVQImageProcessor,
    path: Path,
    in_a_row: int = 8,
) -> None:
    """Saves rows of originals, each over its row of reconstructions; small images are enlarged.

    Args:
        originals, reconstructions: (B, C, H, W) float in [-1, 1].
    """
    rows = [part for pair in zip(originals.split(in_a_row), reconstructions.split(in_a_row)) for part in pair]
    columns = len(rows[0])
    rows = [torch.cat([row, row.new_ones(columns - len(row), *row.shape[1:])]) for row in rows]
    grid = make_grid(torch.cat(rows), nrow=columns, padding=2, pad_value=1.0)
    [picture] = image_processor.postprocess(grid[None])
    factor = max(1, 128 // originals.shape[-1])
    picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST).save(path)


def save_codebook_usage(code_counts: torch.Tensor, path: Path) -> None:
    """Plots the share of every code, most frequent first, over all heads and per head, or per level if there are several.

    Args:
        code_counts: (num_quantizers, heads, codebook_size) int64.
    """
    size = code_counts.shape[2]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if len(code_counts) > 1:
        curves = [(f"level {level}", counts) for level, counts in enumerate(code_counts.sum(1), start=1)]
    else:
        [of_heads] = code_counts
        curves = [("all heads", of_heads.sum(0))] if len(of_heads) > 1 else []
        curves += [(f"head {head}", counts) for head, counts in enumerate(of_heads)]
    for index, (label, counts) in enumerate(curves):
        shares = counts.sort(descending=True).values / counts.sum()
        used = int((counts > 0).sum())
        label = f"{label}: {100 * used / size:.1f} % used"
        width, color = (2, "black") if index == 0 else (1, None)  # None: the next of the cycle
        axes.plot(range(1, used + 1), shares[:used] * size, label=label, linewidth=width, color=color)
    axes.axhline(1, color="grey", linestyle=":", linewidth=1, label="perfectly even use")
    axes.set(xlim=(1, size), yscale="log", xlabel="code, most frequent first", ylabel="use / even use")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def save_strip(images: torch.Tensor, path: Path) -> None:
    """Saves images side by side, without any change of their pixels.

    Args:
        images: (B, C, H, W) uint8.
    """
    strip = torch.cat(list(images.cpu()), dim=2)
    Image.fromarray((strip.squeeze(0) if len(strip) == 1 else strip.movedim(0, -1)).numpy()).save(path)


def save_labelled_strips(strips: list[tuple[str, Image.Image]], path: Path, row_height: int = 128) -> None:
    """Saves strips of equal size below each other, each with a label at its left; a strip becomes `row_height` pixels high."""
    factor = row_height / strips[0][1].height
    figure = Figure(figsize=(3.2 + factor * strips[0][1].width / 100, len(strips) * row_height / 100))
    left = 3.2 / figure.get_figwidth()
    for row, (label, strip) in enumerate(strips):
        axes = figure.add_axes((left, 1 - (row + 1) / len(strips), 1 - left, 1 / len(strips)))
        interpolation = "nearest" if factor > 1 else "antialiased"
        axes.imshow(strip, cmap="gray", vmin=0, vmax=255, interpolation=interpolation, aspect="auto")
        axes.axis("off")
        figure.text(0.98 * left, 1 - (row + 0.5) / len(strips), label, ha="right", va="center", fontsize=10)
    figure.savefig(path, dpi=100)
