"""Checkpoints: folders that are either complete or not there, from which a run goes on exactly.

    OUTPUT_DIR/checkpoint-STEP/
        config.json, model.safetensors, preprocessor_config.json    the model, for `from_pretrained`
        ema/                                                        the same of the averaged weights
        discriminator/                                              for `PatchDiscriminator.from_pretrained`
        training_state.safetensors                                  moments of the optimizers, counters, ...
        training_state.json                                         step, schedules, places in the data, record, settings

The state of random generators is not among them: every step seeds them with its number (see `loop.py`).
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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


def save_checkpoint(folder: Path, networks: Networks, image_processor: OptVQImageProcessor, state: dict):
    """Writes a checkpoint; before it is complete it has another name.

    Args:
        state: JSON of everything besides the networks: step, places in the data, record, ...

    Raises:
        OSError: If the disk is full or cannot be written to. Nothing is left then, and other checkpoints are as they were.
    """
    try:
        with complete_or_absent(folder) as unfinished:
            save_models(unfinished, networks, image_processor)
            if networks.discriminator is not None:
                networks.discriminator.save_pretrained(unfinished / "discriminator")
            tensors, numbers = networks_state(networks)
            save_file(tensors, unfinished / STATE_TENSORS)
            files = {str(path.relative_to(unfinished)): path.stat().st_size for path in _files(unfinished)}
            numbers = {**state, "networks": numbers, "files": files}
            (unfinished / STATE_NUMBERS).write_text(json.dumps(numbers, indent=1))
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write checkpoint {folder}: {error}; earlier checkpoints are as they were") from error


def save_models(folder: Path, networks: Networks, image_processor: OptVQImageProcessor):
    """The trained model and, in a folder of its own, the averaged one, for `from_pretrained`."""
    for name, model in networks.models().items():
        model.config.sinkhorn_epsilon = networks.model.quantizer.epsilon  # schedules may have moved them
        model.config.sinkhorn_balance = networks.model.quantizer.balance
        model.save_pretrained(folder / name)
        image_processor.save_pretrained(folder / name)


def load_state(folder: Path, networks: Networks) -> dict:
    """Puts everything but the trained weights, which the model was made with, where it was; returns the rest of the state."""
    state = read_numbers(folder)
    if networks.averaged is not None:
        averaged = type(networks.model).from_pretrained(folder / "ema")
        networks.averaged.module.load_state_dict(averaged.state_dict())
    if networks.discriminator is not None:
        networks.discriminator.load_state_dict(load_file(folder / "discriminator" / "model.safetensors"))
    restore_networks_state(networks, load_file(folder / STATE_TENSORS), state.pop("networks"))
    return state


def networks_state(networks: Networks) -> tuple[dict[str, torch.Tensor], dict]:
    """Optimizers, schedules and the rest as tensors and as JSON."""
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


def restore_networks_state(networks: Networks, tensors: dict[str, torch.Tensor], numbers: dict):
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
    """A temporary folder to write into, which takes its name when everything in it is on the disk."""
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


def write_whole(path: Path, text: str):
    """Replaces a file; it is never half of it."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text)
    _flush(unfinished)
    unfinished.replace(path)


def save_result(output_dir: Path, networks: Networks, image_processor: OptVQImageProcessor):
    """The models of a finished run, into its output folder; a file there is the old or the new one, never half of it."""
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


def _flush(path: Path):
    """To the disk, not only to the system's memory."""
    if path.is_dir() and os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints, the newest first."""
    steps = {
        int(match[1]): path for path in output_dir.glob("checkpoint-*") if (match := FOLDER_NAME.fullmatch(path.name))
    }
    return [steps[step] for step in sorted(steps, reverse=True)]


def find_checkpoint(resume: str | None, output_dir: Path) -> Path | None:
    """The checkpoint that `--resume` means.

    Raises:
        FileNotFoundError: If the folder that it names is none.
        ValueError: If it is broken, or, without `--resume`, if the output folder holds checkpoints of another run.
    """
    if resume is None:
        if list_checkpoints(output_dir):
            raise ValueError(
                f"{output_dir} holds checkpoints of an earlier run; pass --resume auto to go on with it, or another "
                "--output-dir"
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
        except ValueError as error:
            print(f"{error}; trying the one before")
        else:
            return folder
    return None


def check_complete(folder: Path):
    """Raises ValueError if a file is missing or has another size than when it was written."""
    try:
        for name, size in read_numbers(folder)["files"].items():
            found = (folder / name).stat().st_size
            if found != size:
                raise ValueError(f"{name} has {found} bytes instead of {size}")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"checkpoint {folder} is broken: {error}") from error


def begin_after(output_dir: Path, step: int):
    """Makes the output folder that of a run that is at `step`.

    Later checkpoints, broken ones or of a run that went on otherwise, are renamed to `abandoned-...`; what killed processes
    left behind is removed, or put back if it is complete.
    """
    for leftover in output_dir.glob(".checkpoint-*.*"):
        name, _, state = leftover.name[1:].rpartition(".")
        if state == "replaced" and not (output_dir / name).exists():
            leftover.rename(output_dir / name)
        else:
            shutil.rmtree(leftover)
    for folder in list_checkpoints(output_dir):
        if int(FOLDER_NAME.fullmatch(folder.name)[1]) > step:
            abandoned = folder.with_name(f"abandoned-{folder.name}")
            shutil.rmtree(abandoned, ignore_errors=True)
            folder.rename(abandoned)
            if read_best(output_dir).get("folder") == folder.name:
                (output_dir / BEST_FILE).unlink()


def read_numbers(folder: Path) -> dict:
    return json.loads((folder / STATE_NUMBERS).read_text())


def keep_newest_and_best(output_dir: Path, number: int):
    """Removes all checkpoints but the newest and the best."""
    best = read_best(output_dir).get("folder")
    for folder in list_checkpoints(output_dir)[number:]:
        if folder.name != best:
            removed = folder.rename(folder.with_name(f".{folder.name}.removed"))  # never half a checkpoint of that name
            shutil.rmtree(removed)


def note_score(output_dir: Path, folder: Path, mse: float):
    """Remembers the checkpoint with the lowest error."""
    if mse < read_best(output_dir).get("mse", float("inf")):
        write_whole(output_dir / BEST_FILE, json.dumps({"folder": folder.name, "mse": mse}))


def read_best(output_dir: Path) -> dict:
    path = output_dir / BEST_FILE
    return json.loads(path.read_text()) if path.is_file() else {}
