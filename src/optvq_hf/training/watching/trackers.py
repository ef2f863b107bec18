"""The accelerator and its trackers."""

import importlib
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from torchvision.utils import make_grid, save_image

from ..arguments import Recipe
from ..processes import check_together


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Makes the accelerator: processes, device and tracker, as `accelerate launch` or torchrun set them up.

    Raises:
        ImportError: If the tracker is not installed.
        ValueError: If several processes were started but each works alone.
    """
    tracker = None if recipe.record.report_to == "none" else recipe.record.report_to
    if tracker is not None:
        try:
            importlib.import_module(tracker)
        except ImportError as error:  # accelerate 1.15 would train without it
            raise ImportError(
                f"{tracker} is not installed: run pip install {tracker}, or pass --report-to none"
            ) from error
    accelerator = Accelerator(
        mixed_precision=recipe.training.mixed_precision,
        log_with=tracker,
        project_dir=recipe.training.output_dir,
    )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            f"mixed precision {accelerator.mixed_precision!r} of `accelerate config` is not supported, pass --mixed-precision "
            "no or bf16"
        )
    check_together(accelerator.num_processes)
    return accelerator


def start_tracker(accelerator: Accelerator, recipe: Recipe, step: int) -> None:
    """Starts the tracker's run, or resumes it after `step`: its figures of later steps are dropped or overwritten."""
    record, name = recipe.record, Path(recipe.training.output_dir).resolve().name
    options = {
        "tensorboard": {"purge_step": step + 1 if step else None},
        "trackio": {"name": name, "resume": "allow"},
        "wandb": {"name": name, "id": name, "resume": "allow"},
    }
    project = "tensorboard" if record.report_to == "tensorboard" else record.tracker_project
    flags = {key: value if isinstance(value, int | float) else str(value) for key, value in recipe.as_flags().items()}
    accelerator.init_trackers(
        project,
        config=None if record.report_to == "tensorboard" else flags,
        init_kwargs={record.report_to: options.get(record.report_to, {})},
    )


def log_images(
    accelerator: Accelerator, output_dir: Path, step: int, images: torch.Tensor, reconstructions: torch.Tensor | None
) -> None:
    """Writes eight originals over their reconstructions to OUTPUT_DIR/images and the tracker."""
    if reconstructions is None or not accelerator.is_main_process:
        return
    pair = torch.cat([images[:8], reconstructions[:8].detach().float()])
    grid = make_grid((pair / 2 + 0.5).clamp(0, 1), nrow=min(8, len(images)))
    path = output_dir / "images" / f"step-{step:07d}.png"
    path.parent.mkdir(exist_ok=True)
    save_image(grid, path)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"reconstructions": grid[None]}, step=step)
        elif tracker.name == "wandb":
            tracker.log_images({"reconstructions": [Image.open(path)]}, step=step)
        elif tracker.name == "trackio":
            trackio = importlib.import_module("trackio")
            tracker.log({"reconstructions": trackio.Image(str(path))}, step=step)
