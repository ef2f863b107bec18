"""Checkpoints: folders that are complete or absent, from which a run resumes exactly.

    OUTPUT_DIR/checkpoint-STEP/
        config.json, model.safetensors, preprocessor_config.json    the model, for `from_pretrained`
        ema/                                                        the same for the EMA of the weights
        discriminator/                                              for `PatchDiscriminator.from_pretrained`
        training_state.safetensors                                  moments of the optimizers, counters, ...
        training_state.json                                         a RunState

The state of random generators is not saved: every step seeds them with its number (see `trainer.py`). Only this module
reads and writes these files.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import get_type_hints

import torch
from huggingface_hub.dataclasses import type_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..image_processing_optvq import OptVQImageProcessor
from ..parsing import parse_json
from .integrity import BrokenCheckpointError, check_files, checksums, sealed, unseal
from .networks import Networks
from .watching.log import LOG_FILE, SUMMARY_FILE


STATE_TENSORS, STATE_NUMBERS = "training_state.safetensors", "training_state.json"
COUNTERS = ("skipped", "skipped_in_a_row", "longest_skip")  # of a Learner
BEST_FILE = "best_checkpoint.json"
FOLDER_NAME = re.compile(r"checkpoint-(\d+)")
# Folder of the newest checkpoint in a repository on the Hub.
LAST_CHECKPOINT = "last-checkpoint"
# Raise it whenever earlier code would misread a checkpoint of this code.
STATE_VERSION = 3


@dataclass
class RunState:
    """All that a run needs to resume but tensors; plain JSON.

    Args:
        step, total_steps: Steps done, and of the whole run.
        positions: Position in the data of each process; None where the batches have no position.
        recorder: State of the [`~watching.recorder.Recorder`].
        alarms: Names of the current alarms.
        settings: Flags of the run.
        optimizers: Settings and schedule of each learner, by name; filled in by [`save_checkpoint`].
        files: Size and SHA-256 of every other file of the checkpoint, by name; filled in by [`save_checkpoint`].
        version: Format version.
    """

    step: int
    total_steps: int
    positions: list[dict | None]
    recorder: dict
    alarms: list[str]
    settings: dict
    optimizers: dict = field(default_factory=dict)
    files: dict[str, dict] = field(default_factory=dict)
    version: int = STATE_VERSION


def read_state(folder: Path) -> RunState:
    """Reads the state of a checkpoint, without tensors.

    Raises:
        BrokenCheckpointError: If it cannot be read.
        ValueError: If it has a different format version.
    """
    try:
        entries, is_sealed = unseal((folder / STATE_NUMBERS).read_bytes())
        version = entries.get("version", 1)
        if version == STATE_VERSION and not is_sealed:
            raise ValueError("it has lost its checksum")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise BrokenCheckpointError(f"checkpoint {folder} is broken: {STATE_NUMBERS}: {error}") from error
    if version != STATE_VERSION:
        raise ValueError(
            f"checkpoint {folder} has format {version}, but this version of optvq_hf reads format {STATE_VERSION}: resume it "
            f"with the version that wrote it, or start a new run with --model {folder}"
        )
    expected = {entry.name for entry in fields(RunState)}
    if entries.keys() != expected:
        wrong = ", ".join(sorted(entries.keys() ^ expected))
        raise BrokenCheckpointError(
            f"checkpoint {folder} is broken: {STATE_NUMBERS} has too many or too few entries: {wrong}"
        )
    try:
        for name, kind in get_type_hints(RunState).items():
            type_validator(name, entries[name], kind)
    except TypeError as error:
        raise BrokenCheckpointError(f"checkpoint {folder} is broken: {' '.join(str(error).split())}") from error
    return RunState(**entries)


def write_state(folder: Path, state: RunState) -> None:
    """Replaces the state of a checkpoint, without tensors."""
    path = folder / STATE_NUMBERS
    path.unlink(missing_ok=True)  # it may be a hard link to a file of a different folder
    path.write_text(sealed(asdict(state)))


def save_checkpoint(folder: Path, networks: Networks, image_processor: OptVQImageProcessor, state: RunState) -> None:
    """Writes a checkpoint; until it is complete it has a temporary name.

    Raises:
        OSError: If the disk is full or cannot be written to. Nothing remains of it then, and other checkpoints are intact.
    """
    try:
        with complete_or_absent(folder) as unfinished:
            save_models(unfinished, networks, image_processor)
            if networks.discriminator is not None:
                networks.discriminator.save_pretrained(unfinished / "discriminator")
            tensors, state.optimizers = networks_state(networks)
            save_file(tensors, unfinished / STATE_TENSORS)
            state.files = checksums(unfinished)  # read from the system's memory, before they are flushed
            write_state(unfinished, state)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write checkpoint {folder}: {error}; earlier checkpoints are intact") from error


def save_models(folder: Path, networks: Networks, image_processor: OptVQImageProcessor) -> None:
    """Saves the model and, in the folder `ema`, the EMA of its weights, for `from_pretrained`."""
    for name, model in networks.models().items():
        model.save_pretrained(folder / name)
        image_processor.save_pretrained(folder / name)


def load_checkpoint(folder: Path, networks: Networks) -> RunState:
    """Loads everything but the weights of the model, which is already loaded; returns the state besides the networks'.

    Raises:
        ValueError: If it is broken or has a different format version.
    """
    state = read_state(folder)
    load_averaged(folder, networks)
    if networks.discriminator is not None:
        networks.discriminator.load_state_dict(load_file(folder / "discriminator" / "model.safetensors"))
    restore_networks_state(networks, load_file(folder / STATE_TENSORS), state.optimizers)
    return state


def load_averaged(folder: Path, networks: Networks) -> None:
    """Loads the EMA of the weights, if the run has one, from what [`save_models`] wrote."""
    if networks.averaged is not None:
        averaged = type(networks.model).from_pretrained(folder / "ema")
        networks.averaged.module.load_state_dict(averaged.state_dict())


def networks_state(networks: Networks) -> tuple[dict[str, torch.Tensor], dict]:
    """Collects the state of optimizers, schedules and losses: tensors, and JSON by learner."""
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
    """Restores the state that [`networks_state`] collected."""
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
        # The fused AdamW of torch 2.14 needs moments in the memory format of their weights.
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
    """Yields a temporary folder to write into, which is renamed to `folder` when everything in it is on the disk."""
    unfinished, replaced = (folder.with_name(f".{folder.name}.{what}") for what in ("unfinished", "replaced"))
    for leftover in (unfinished, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for path in [*unfinished.rglob("*"), unfinished]:
            flush(path)
        if folder.exists():
            folder.rename(replaced)
        unfinished.rename(folder)
        flush(folder.parent)
    finally:
        if replaced.exists() and not folder.exists():  # the new folder could not be renamed
            replaced.rename(folder)
        for leftover in (unfinished, replaced):
            shutil.rmtree(leftover, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Replaces a file atomically: a reader sees the old or the new text."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text)
    flush(unfinished)
    unfinished.replace(path)


def flush(path: Path) -> None:
    """Flushes a file or folder from the system's memory to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints in an output folder, the newest first."""
    return [folder for _, folder in _numbered(output_dir)]


def _numbered(output_dir: Path) -> list[tuple[int, Path]]:
    """Checkpoints with their steps, the newest first."""
    found = ((FOLDER_NAME.fullmatch(path.name), path) for path in output_dir.glob("checkpoint-*"))
    return sorted(((int(match[1]), path) for match, path in found if match is not None), reverse=True)


def find_checkpoint(resume: str | None, output_dir: Path) -> Path | None:
    """Finds the checkpoint that `--resume` names; None for a new run.

    Raises:
        FileNotFoundError: If the folder is not a checkpoint.
        ValueError: If it is broken or has a different format version.
    """
    if resume is None:
        return None
    if resume != "auto":
        if not (Path(resume) / STATE_NUMBERS).is_file():
            raise FileNotFoundError(f"{resume} is not a checkpoint: it has no {STATE_NUMBERS}")
        check_intact(Path(resume))
        return Path(resume)
    checkpoints = list_checkpoints(output_dir)
    for folder in checkpoints:
        try:
            check_intact(folder)
        except BrokenCheckpointError as error:
            print(f"{error}; trying the previous one")
        else:
            return folder
    if checkpoints:
        raise BrokenCheckpointError(
            f"none of the {len(checkpoints)} checkpoints in {output_dir} is intact: pass --overwrite instead of --resume to "
            "remove that run and start anew, or another --output-dir"
        )
    return None


def check_intact(folder: Path) -> None:
    """Checks that every file of a checkpoint, and its state, is what was written.

    Raises:
        BrokenCheckpointError: If a file is missing or has changed.
        ValueError: If the checkpoint has a different format version.
    """
    check_files(folder, read_state(folder).files)


def is_inside(checkpoint: Path, output_dir: Path) -> bool:
    """Whether a checkpoint is one of the run in an output folder."""
    return checkpoint.parent.resolve() == output_dir.resolve()


def log_folder(checkpoint: Path) -> Path:
    """Folder of the log that belongs to a checkpoint: its run's folder, or itself if it comes from the Hub."""
    return checkpoint if (checkpoint / LOG_FILE).is_file() else checkpoint.parent


def begin_after(output_dir: Path, step: int) -> None:
    """Prepares the output folder for a run that starts or resumes at `step`.

    Checkpoints of later steps are renamed to `abandoned-...`. Temporary folders of killed processes are removed, or renamed
    back if they are complete. A model of an earlier end remains until the new end, but no longer counts as finished.
    """
    (output_dir / SUMMARY_FILE).unlink(missing_ok=True)
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
            removed = folder.rename(folder.with_name(f".{folder.name}.removed"))  # a checkpoint is never half removed
            shutil.rmtree(removed)


def note_score(output_dir: Path, folder: Path, mse: float) -> None:
    """Records a checkpoint as the best if its error is the lowest so far."""
    if mse < read_best(output_dir).get("mse", float("inf")):
        write_whole(output_dir / BEST_FILE, json.dumps({"folder": folder.name, "mse": mse}))


def read_best(output_dir: Path) -> dict:
    """The best checkpoint, as `folder` and `mse`; empty before the first score."""
    try:
        best = parse_json((output_dir / BEST_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return best if isinstance(best.get("folder"), str) and isinstance(best.get("mse"), float) else {}
