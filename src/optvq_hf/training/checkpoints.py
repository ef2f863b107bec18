"""Checkpoints: folders that are either complete or not there, from which a run resumes exactly.

    OUTPUT_DIR/checkpoint-STEP/
        config.json, model.safetensors, preprocessor_config.json    the model, for `from_pretrained`
        ema/                                                        the same of the EMA of the weights
        discriminator/                                              for `PatchDiscriminator.from_pretrained`
        training_state.safetensors                                  moments of the optimizers, counters, ...
        training_state.json                                         a RunState

Random generators have no state here: every step seeds them with its number (see `trainer.py`). Only this module reads
and writes these files.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..image_processing_optvq import OptVQImageProcessor
from .networks import Networks


STATE_TENSORS, STATE_NUMBERS = "training_state.safetensors", "training_state.json"
COUNTERS = ("skipped", "skipped_in_a_row")  # of a Learner
BEST_FILE = "best_checkpoint.json"
FOLDER_NAME = re.compile(r"checkpoint-(\d+)")
# Folder of the newest checkpoint in a repository on the Hub.
LAST_CHECKPOINT = "last-checkpoint"
# Raise it whenever a checkpoint of this code would mean something else to the code before.
STATE_VERSION = 2


class BrokenCheckpointError(ValueError):
    """A checkpoint of which a file is missing, cut off or unreadable."""


@dataclass
class RunState:
    """What a run needs to resume, besides tensors; plain JSON.

    Args:
        step, total_steps: Steps done, and of the whole run.
        positions: In the data, one per process; None where the batches have no position.
        recorder: Of [`~watching.recorder.Recorder`].
        alarms: Names of those that ring.
        settings: Flags of the run.
        optimizers: Settings and schedule of each learner, by name; filled in by [`save_checkpoint`].
        files: Size of every other file of the checkpoint in bytes, by name; filled in by [`save_checkpoint`].
        version: Of this format.
    """

    step: int
    total_steps: int
    positions: list[dict | None]
    recorder: dict
    alarms: list[str]
    settings: dict
    optimizers: dict = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    version: int = STATE_VERSION


def read_state(folder: Path) -> RunState:
    """Reads what a checkpoint says besides tensors.

    Raises:
        BrokenCheckpointError: If it cannot be read.
        ValueError: If another version of this library wrote it.
    """
    try:
        entries = json.loads((folder / STATE_NUMBERS).read_text())
        version = entries.get("version", 1)
    except (OSError, ValueError, AttributeError) as error:
        raise BrokenCheckpointError(f"checkpoint {folder} is broken: {error}") from error
    if version != STATE_VERSION:
        raise ValueError(
            f"checkpoint {folder} has format {version}, this version of optvq_hf reads format {STATE_VERSION}: resume it with "
            f"the version that wrote it, or start a new run with --model {folder}"
        )
    expected = {entry.name for entry in fields(RunState)}
    if entries.keys() != expected:
        wrong = ", ".join(sorted(entries.keys() ^ expected))
        raise BrokenCheckpointError(
            f"checkpoint {folder} is broken: {STATE_NUMBERS} has too many or too few entries: {wrong}"
        )
    return RunState(**entries)


def write_state(folder: Path, state: RunState) -> None:
    """Writes what a checkpoint says besides tensors, in place of what it said."""
    path = folder / STATE_NUMBERS
    path.unlink(missing_ok=True)  # it may be a second name of another folder's file
    path.write_text(json.dumps(asdict(state), indent=1))


def save_checkpoint(folder: Path, networks: Networks, image_processor: OptVQImageProcessor, state: RunState) -> None:
    """Writes a checkpoint; before it is complete it has another name.

    Raises:
        OSError: If the disk is full or cannot be written to. Nothing is left then, and other checkpoints are as they were.
    """
    try:
        with complete_or_absent(folder) as unfinished:
            save_models(unfinished, networks, image_processor)
            if networks.discriminator is not None:
                networks.discriminator.save_pretrained(unfinished / "discriminator")
            tensors, state.optimizers = networks_state(networks)
            save_file(tensors, unfinished / STATE_TENSORS)
            state.files = {str(path.relative_to(unfinished)): path.stat().st_size for path in _files(unfinished)}
            write_state(unfinished, state)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write checkpoint {folder}: {error}; earlier checkpoints are as they were") from error


def save_models(folder: Path, networks: Networks, image_processor: OptVQImageProcessor) -> None:
    """Saves the trained model and, in a folder of its own, the averaged one, for `from_pretrained`."""
    for name, model in networks.models().items():
        model.save_pretrained(folder / name)
        image_processor.save_pretrained(folder / name)


def load_checkpoint(folder: Path, networks: Networks) -> RunState:
    """Loads everything but the trained weights, which the model was made with; returns what is not the networks'.

    Raises:
        ValueError: If it is broken, or another version of this library wrote it.
    """
    state = read_state(folder)
    if networks.averaged is not None:
        averaged = type(networks.model).from_pretrained(folder / "ema")
        networks.averaged.module.load_state_dict(averaged.state_dict())
    if networks.discriminator is not None:
        networks.discriminator.load_state_dict(load_file(folder / "discriminator" / "model.safetensors"))
    restore_networks_state(networks, load_file(folder / STATE_TENSORS), state.optimizers)
    return state


def networks_state(networks: Networks) -> tuple[dict[str, torch.Tensor], dict]:
    """Collects optimizers, schedules and the rest of the networks' state: tensors, and JSON by learner."""
    tensors, numbers = {}, {}
    for name, learner in networks.learners.items():
        optimizer = learner.optimizer.state_dict()
        for index, moments in optimizer["state"].items():
            tensors |= {f"{name}.{index}.{key}": moment for key, moment in moments.items()}
        tensors |= {f"{name}.{counter}": getattr(learner, counter) for counter in COUNTERS}
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer["param_groups"]]
        numbers[name] = {"groups": groups, "schedule": learner.schedule.state_dict()}
    if networks.averaged is not None:
        tensors["num_averaged"] = networks.averaged.n_averaged
    if networks.objective.lecam is not None:
        tensors |= {f"lecam.{name}": value for name, value in networks.objective.lecam.state_dict().items()}
    return {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, numbers


def restore_networks_state(networks: Networks, tensors: dict[str, torch.Tensor], numbers: dict) -> None:
    """Puts optimizers, schedules and the rest where [`networks_state`] found them."""
    for name, learner in networks.learners.items():
        optimizer = learner.optimizer.state_dict()
        moments = {}
        for key, tensor in tensors.items():
            of, _, rest = key.partition(".")
            index, _, moment = rest.partition(".")
            if of == name and index.isdigit():
                moments.setdefault(int(index), {})[moment] = tensor
        groups = [
            {**group, "betas": tuple(group["betas"]), "params": current["params"]}
            for group, current in zip(numbers[name]["groups"], optimizer["param_groups"], strict=True)
        ]
        learner.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        # In memory as the weights are, which fused AdamW relies on.
        for parameter, state in learner.optimizer.state.items():
            for key, moment in state.items():
                if moment.shape == parameter.shape:
                    state[key] = torch.empty_like(parameter).copy_(moment)
        learner.schedule.load_state_dict(numbers[name]["schedule"])
        for counter in COUNTERS:
            getattr(learner, counter).copy_(tensors[f"{name}.{counter}"])
    if networks.averaged is not None:
        networks.averaged.n_averaged.copy_(tensors["num_averaged"])
    if networks.objective.lecam is not None:
        networks.objective.lecam.load_state_dict(
            {name: tensors[f"lecam.{name}"] for name in networks.objective.lecam.state_dict()}
        )


# ---- folders ---------------------------------------------------------------------------------------------------------


@contextmanager
def complete_or_absent(folder: Path) -> Iterator[Path]:
    """Makes a temporary folder to write into, which takes its name when everything in it is on the disk."""
    unfinished, replaced = (folder.with_name(f".{folder.name}.{what}") for what in ("unfinished", "replaced"))
    for leftover in (unfinished, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for path in [*unfinished.rglob("*"), unfinished]:
            _flush(path)
        if folder.exists():
            folder.rename(replaced)
        unfinished.rename(folder)
        _flush(folder.parent)
    finally:
        if replaced.exists() and not folder.exists():  # the new one could not take the name
            replaced.rename(folder)
        for leftover in (unfinished, replaced):
            shutil.rmtree(leftover, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Replaces a file; a reader finds the old or the new text, never half of it."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text)
    _flush(unfinished)
    unfinished.replace(path)


def save_result(output_dir: Path, networks: Networks, image_processor: OptVQImageProcessor) -> None:
    """Saves the models of a finished run to its output folder; a file there is the old or the new one, never half of it."""
    unfinished = output_dir / ".result.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    save_models(unfinished, networks, image_processor)
    for path in _files(unfinished):
        _flush(path)
        target = output_dir / path.relative_to(unfinished)
        target.parent.mkdir(exist_ok=True)
        path.replace(target)
    shutil.rmtree(unfinished)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _flush(path: Path) -> None:
    """Writes a file or folder to the disk, not only to the system's memory."""
    if path.is_dir() and os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Lists checkpoints, the newest first."""
    return [folder for _, folder in _numbered(output_dir)]


def _numbered(output_dir: Path) -> list[tuple[int, Path]]:
    """Lists checkpoints with their steps, the newest first."""
    found = ((FOLDER_NAME.fullmatch(path.name), path) for path in output_dir.glob("checkpoint-*"))
    return sorted(((int(match[1]), path) for match, path in found if match is not None), reverse=True)


def find_checkpoint(resume: str | None, output_dir: Path) -> Path | None:
    """Finds the checkpoint that `--resume` means.

    Raises:
        FileNotFoundError: If the folder that it names is no checkpoint.
        ValueError: If it is broken or of another version of this library, or, without `--resume`, if the output folder holds
            checkpoints of another run.
    """
    if resume is None:
        if list_checkpoints(output_dir):
            raise ValueError(
                f"{output_dir} holds checkpoints of an earlier run; pass --resume auto to resume it, or another --output-dir"
            )
        return None
    if resume != "auto":
        if not (Path(resume) / STATE_NUMBERS).is_file():
            raise FileNotFoundError(f"{resume} is not a checkpoint: it has no {STATE_NUMBERS}")
        check_complete(Path(resume))
        return Path(resume)
    for folder in list_checkpoints(output_dir):
        try:
            check_complete(folder)
        except BrokenCheckpointError as error:
            print(f"{error}; trying the one before")
        else:
            return folder
    return None


def check_complete(folder: Path) -> None:
    """Checks that every file of a checkpoint has the size it was written with.

    Raises:
        BrokenCheckpointError: If a file is missing or has another size.
        ValueError: If another version of this library wrote it.
    """
    for name, size in read_state(folder).files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            raise BrokenCheckpointError(f"checkpoint {folder} is broken: {name} is missing")
        if found != size:
            raise BrokenCheckpointError(f"checkpoint {folder} is broken: {name} has {found} bytes instead of {size}")


def begin_after(output_dir: Path, step: int) -> None:
    """Prepares the output folder for a run that is at `step`.

    Later checkpoints, which are broken or of a run that was resumed from an earlier step, are renamed to `abandoned-...`; what
    killed processes left behind is removed, or put back if it is complete.
    """
    for leftover in output_dir.glob(".checkpoint-*.*"):
        name, _, state = leftover.name[1:].rpartition(".")
        if state == "replaced" and not (output_dir / name).exists():
            leftover.rename(output_dir / name)
        else:
            shutil.rmtree(leftover)
    for step_of_folder, folder in _numbered(output_dir):
        if step_of_folder > step:
            abandoned = folder.with_name(f"abandoned-{folder.name}")
            shutil.rmtree(abandoned, ignore_errors=True)
            folder.rename(abandoned)
            if read_best(output_dir).get("folder") == folder.name:
                (output_dir / BEST_FILE).unlink()


def keep_newest_and_best(output_dir: Path, number: int) -> None:
    """Removes all checkpoints but the newest and the best."""
    best = read_best(output_dir).get("folder")
    for folder in list_checkpoints(output_dir)[number:]:
        if folder.name != best:
            removed = folder.rename(folder.with_name(f".{folder.name}.removed"))  # never half a checkpoint of that name
            shutil.rmtree(removed)


def note_score(output_dir: Path, folder: Path, mse: float) -> None:
    """Remembers the checkpoint with the lowest error."""
    if mse < read_best(output_dir).get("mse", float("inf")):
        write_whole(output_dir / BEST_FILE, json.dumps({"folder": folder.name, "mse": mse}))


def read_best(output_dir: Path) -> dict:
    """Reads which checkpoint is the best, `folder` and `mse`; empty before the first score."""
    path = output_dir / BEST_FILE
    return json.loads(path.read_text()) if path.is_file() else {}
