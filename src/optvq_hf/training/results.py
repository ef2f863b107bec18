"""The result of a finished run in its output folder: saved as a whole, found again, and removed for a new run."""

import shutil
from pathlib import Path

from ..image_processing_optvq import OptVQImageProcessor
from ..parsing import parse_json
from .checkpoints import BEST_FILE, flush, list_checkpoints, save_models
from .networks import Networks
from .watching.log import LOG_FILE, RECIPE_FILE, SUMMARY_FILE


WEIGHTS_FILE = "model.safetensors"
UNFINISHED, WHOLE = ".result.unfinished", ".result.whole"
# The model's code, which is saved beside it.
CODE = [path.name for path in Path(__file__).parents[1].glob("[a-z]*.py")]
# Patterns of the files that a run and its evaluation write to the output folder and to its folder `ema`.
FILES_OF_RUN = (
    *CODE,
    *("config.json", "preprocessor_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *(LOG_FILE, RECIPE_FILE, SUMMARY_FILE, BEST_FILE, "training_curves.png", "images/step-*.png"),
    *("metrics.json", "reconstructions.png", "codebook_usage.png"),
)
FOLDERS_OF_RUN = ("checkpoint-*", "abandoned-checkpoint-*", ".checkpoint-*", ".result.*", "tensorboard")


def save_result(
    output_dir: Path, networks: Networks, image_processor: OptVQImageProcessor, records: dict[str, dict[str, str]]
) -> None:
    """Saves the models of a finished run, each with its records, to the output folder: after a kill, all or nothing is there.

    Args:
        records: Of each model by its folder, text by file name. The summary among them marks a finished run.
    """
    unfinished = output_dir / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    save_models(unfinished, networks, image_processor)
    for folder, texts in records.items():
        for name, text in texts.items():
            (unfinished / folder / name).write_text(text)
    for path in [*unfinished.rglob("*"), unfinished]:
        flush(path)
    unfinished.rename(output_dir / WHOLE)
    place_result(output_dir)


def place_result(output_dir: Path) -> None:
    """Moves a saved result to its place, if there is one: also what a killed process left to move. The summary is the last."""
    whole = output_dir / WHOLE
    if not whole.is_dir():
        return
    files = [path for path in whole.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: path == whole / SUMMARY_FILE):
        target = output_dir / path.relative_to(whole)
        target.parent.mkdir(exist_ok=True)
        path.replace(target)
    flush(output_dir)
    shutil.rmtree(whole)


def finished_steps(output_dir: Path) -> int | None:
    """Steps of the finished run whose model is in the output folder; None if there is none."""
    try:
        steps = parse_json((output_dir / SUMMARY_FILE).read_text()).get("steps")
    except (OSError, ValueError):
        return None
    return steps if (output_dir / WEIGHTS_FILE).is_file() and isinstance(steps, int) else None


def check_free(output_dir: Path, but_for_checkpoints: bool = False) -> None:
    """Raises ValueError if the output folder holds the model or the checkpoints of an earlier run."""
    if (output_dir / WEIGHTS_FILE).is_file():
        raise ValueError(
            f"{output_dir} holds the model of an earlier run; pass --overwrite to remove that run, or another --output-dir"
        )
    if list_checkpoints(output_dir) and not but_for_checkpoints:
        raise ValueError(
            f"{output_dir} holds checkpoints of an earlier run; pass --resume auto to resume it, --overwrite to remove it, or "
            "another --output-dir"
        )


def remove_run(output_dir: Path, overwrite: bool) -> None:
    """Removes what an earlier run wrote to the output folder, and nothing else: it must not be mixed with the next.

    Args:
        overwrite: With its checkpoints; otherwise only what a run left that was killed before its first checkpoint.
    """
    if not (overwrite or (output_dir / LOG_FILE).is_file()):
        return
    for pattern in FILES_OF_RUN:
        for path in [*output_dir.glob(pattern), *output_dir.glob(f"ema/{pattern}")]:
            path.unlink()
    for pattern in FOLDERS_OF_RUN if overwrite else ("tensorboard",):
        for path in output_dir.glob(pattern):
            shutil.rmtree(path)
    for folder in (output_dir / "images", output_dir / "ema"):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
