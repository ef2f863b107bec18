"""Draws the paper's toy: codes that follow points of the plane, by nearest codes and by transport, as an animation.

python scripts/make_toy.py --output docs/images/toy.gif
"""

import argparse

import numpy
import torch
from matplotlib.figure import Figure
from PIL import Image

from optvq_hf.sinkhorn import nearest_assign, sinkhorn_assign


NUM_POINTS, NUM_CODES, NUM_FRAMES, RATE = 600, 24, 40, 0.25
INK, POINTS, USED, DEAD = "#222222", "#b8c4d6", "#c8102e", "#222222"


def make_points() -> torch.Tensor:
    """(600, 2) points of three clusters of unequal weight and width, of variance about 1."""
    generator = torch.Generator().manual_seed(3)
    centres, widths = torch.tensor([[-1.2, -0.6], [1.0, -0.9], [0.3, 1.1]]), torch.tensor([0.25, 0.35, 0.3])
    cluster = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), NUM_POINTS, replacement=True, generator=generator)
    return centres[cluster] + widths[cluster, None] * torch.randn(NUM_POINTS, 2, generator=generator)


def assign(method: str, points: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """(600,) codes of the points."""
    if method == "nearest":
        return nearest_assign(points, codes)
    return sinkhorn_assign(points, codes, epsilon=10.0, iterations=5, normalization="zscore").codes


def follow(method: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Codes (24, 2) of every frame, and the code of every point; codes move towards the mean of the points that chose them."""
    points = make_points()
    codes = 2.3 + 0.35 * torch.randn(NUM_CODES, 2, generator=torch.Generator().manual_seed(1))  # far from the points
    frames = []
    for _ in range(NUM_FRAMES):
        chosen = assign(method, points, codes)
        frames.append((codes.clone(), chosen))
        counts = torch.bincount(chosen, minlength=NUM_CODES)
        sums = torch.zeros_like(codes).index_add_(0, chosen, points)
        means = sums / counts.clamp(min=1)[:, None]
        codes = torch.where(counts[:, None] > 0, codes + RATE * (means - codes), codes)
    return frames


def draw(step: int, runs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]]) -> Image.Image:
    """One frame: both methods side by side, codes in use red, dead codes hollow."""
    points, figure = make_points(), Figure(figsize=(8, 4.2), layout="constrained", facecolor="white")
    for axes, (title, frames) in zip(figure.subplots(1, 2), runs.items(), strict=True):
        codes, chosen = frames[step]
        used = torch.bincount(chosen, minlength=NUM_CODES) > 0
        error = (points - codes[chosen]).square().sum(dim=1).mean()
        for point, code in zip(points[::6], codes[chosen[::6]], strict=True):
            axes.plot(*torch.stack([point, code]).T, color=POINTS, linewidth=0.4, zorder=1)
        axes.scatter(*points.T, s=4, color=POINTS, zorder=2)
        axes.scatter(*codes[used].T, s=36, color=USED, zorder=4)
        axes.scatter(*codes[~used].T, s=36, facecolors="white", edgecolors=DEAD, zorder=3)
        axes.set(xlim=(-2.4, 3.4), ylim=(-2.2, 3.2), xticks=[], yticks=[])
        axes.set_title(
            f"{title}: {int(used.sum())} of {NUM_CODES} codes in use, error {error:.2f}", fontsize=10, color=INK
        )
    figure.supxlabel(f"step {step}", fontsize=9, color=INK)
    figure.draw_without_rendering()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(numpy.asarray(canvas.buffer_rgba())[..., :3].copy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="docs/images/toy.gif")
    arguments = parser.parse_args()
    runs = {"nearest codes": follow("nearest"), "transport": follow("transport")}
    frames = [draw(step, runs).quantize(32, dither=Image.Dither.NONE) for step in range(NUM_FRAMES)]
    durations = [700, *(110 for _ in frames[2:]), 2500]
    frames[0].save(arguments.output, save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True)
    print(arguments.output)


if __name__ == "__main__":
    main()
