"""The result of a finished run: saved to its output folder as a whole or not at all."""

import shutil
from pathlib import Path

from ..image_processing_optvq import OptVQImageProcessor
from .checkpoints import flush, save_models
from .networks import Networks
from .watching.log import SUMMARY_FILE


UNFINISHED, WHOLE = ".result.unfinished", ".result.whole"


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
