"""Give a pretrained autoencoder a quantizer of optimal transport, and train both for each other.

    optvq convert --from diffusers stabilityai/sdxl-vae runs/sdxl --codebook-size 16384
    optvq transplant --model runs/sdxl --dataset path/to/images --eval-fraction 0.1 --output-dir runs/mine

Runs three commands, which it prints: `optvq tokenize --latents` encodes all images once, `optvq train` trains the quantizer on
these latents, and then the decoder on images. Started again, it resumes where it was stopped.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from types import FrameType

from ..data.arguments import DataArguments
from ..parsing import parse_json
from ..training.transplant_arguments import TransplantArguments
from .cli import COMMANDS
from .errors import one_line_errors
from .folders import check_writable
from .parser import Parser


# Folders in the output folder: of the latents, and of the run of each stage.
LATENTS, QUANTIZER, DECODER = "latents", "quantizer", "decoder"
# Beside them: the digest of the weights that the run of the decoder started from.
RECORD_FILE, BASE_DIGEST = "transplant.json", "base_weights_sha256"
# What `optvq tokenize` and the run on latents take of the data flags; the latter has no augmentation of its own.
OF_SOURCE = ("dataset", "dataset_config", "data_dir", "image_column", "max_unreadable", "num_workers")
NOT_OF_LATENTS = ("random_crop", "random_flip")


def make_parser() -> Parser:
    """Makes the parser of the command: flags of the transplant and of the data."""
    return Parser([TransplantArguments, DataArguments], "transplant", COMMANDS["transplant"])


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `optvq transplant`; a user's mistake ends the process with one line."""
    parser = make_parser()
    arguments, data = parser.parse(argv)
    given = parser.given(argv)
    for name, value in (("model", arguments.model), ("dataset", data.dataset)):
        if not value:
            parser.error(f"--{name} is missing")
    for name in ("streaming", "latents"):
        if getattr(data, name):
            parser.error(f"--{name} is not for this command, which makes the latents of the images itself")
    stages = commands(arguments, data, given)
    with one_line_errors("transplant"):
        fields = check_words(stages)
        transplant(arguments, data, stages, fields)


def check_words(stages: list[list[str]]) -> dict:
    """Ends the command if the words of a stage are wrong: those of a later one must not be found after an earlier one.

    Returns:
        The fields of the model that its first training changes.
    """
    from . import tokenize, train

    encode, *trainings = stages
    tokenize.make_parser().parse(encode[1:])
    of_quantizer, _ = (train.parse(train.make_parser(), words[1:]) for words in trainings)
    return of_quantizer[-1]


def transplant(arguments: TransplantArguments, data: DataArguments, stages: list[list[str]], fields: dict) -> None:
    """Runs the stages one after the other, each as a process of its own, until one fails or is stopped.

    Args:
        stages: Their words, as of [`commands`].
        fields: Of the model, as of [`check_words`].

    Raises:
        OSError: If the output folder cannot be written to, or model or images do not exist.
        ValueError: If it is started as several processes, there are no images to evaluate on, `--overwrite` would remove what
            it needs, or the decoder in the output folder was trained for another quantizer.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        lines = "\n".join(shlex.join(["optvq", *words]) for words in stages)
        raise ValueError(f"optvq transplant is one process; run each of its stages with several:\n{lines}")
    from ..data.loading import load_split
    from ..tokenization.manifest import MANIFEST_FILE
    from ..training.models import load_config
    from ..training.watching.log import SUMMARY_FILE

    folder = Path(arguments.output_dir)
    check_writable(folder)
    load_config(arguments.model or "", fields, arguments.model_revision)
    load_split(data, held_out=True)
    if arguments.overwrite:
        remove_stages(arguments)
    marks = (folder / LATENTS / MANIFEST_FILE, *(folder / name / SUMMARY_FILE for name in (QUANTIZER, DECODER)))
    for words, mark in zip(stages, marks):
        if mark.parent.name == DECODER:
            tie_decoder(folder)
        print(f"stage      {shlex.join(['optvq', *words])}", flush=True)
        if code := run_stage(words):
            sys.exit(code)
        if not mark.is_file():
            print(f"stopped; the same command{' without --overwrite' if arguments.overwrite else ''} resumes")
            return
    print(f"transplant {folder / DECODER}  (load it with OptVQModel.from_pretrained)")


def remove_stages(arguments: TransplantArguments) -> None:
    """Removes what earlier runs of both stages wrote, and nothing else, before the first of them could be stopped.

    Raises:
        OSError: If a run writes to one of the folders.
        ValueError: If the model or a recipe of this command lies there.
    """
    from ..training.lock import locked
    from ..training.run_folder import RunFolder

    folders = [Path(arguments.output_dir) / name for name in (QUANTIZER, DECODER)]
    for name in ("model", "quantizer_config", "decoder_config"):
        path = getattr(arguments, name)
        if any(Path(path).resolve().is_relative_to(folder.resolve()) for folder in folders):
            raise ValueError(f"--overwrite would remove {path}, which --{name.replace('_', '-')} names")
    with ExitStack() as locks:
        folders = [folder for folder in folders if folder.is_dir()]
        for folder in folders:
            locks.enter_context(locked(folder))
        for folder in folders:
            RunFolder(folder).remove_run(with_checkpoints=True)


def tie_decoder(folder: Path) -> None:
    """Records which quantizer the run of the decoder starts from.

    Args:
        folder: Output folder of the transplant.

    Raises:
        ValueError: If there is a run of the decoder already, and it started from another quantizer.
    """
    from ..training.checkpoints import write_whole
    from ..training.digests import folder_digest
    from ..training.run_folder import RunFolder

    digest = folder_digest(folder / QUANTIZER)
    decoder = RunFolder(folder / DECODER)
    if not (decoder.has_log or decoder.has_model):
        write_whole(folder / RECORD_FILE, json.dumps({BASE_DIGEST: digest}, indent=1) + "\n")
        return
    try:
        recorded = parse_json((folder / RECORD_FILE).read_text()).get(BASE_DIGEST)
    except (OSError, ValueError):
        recorded = None
    if recorded != digest:
        raise ValueError(
            f"the run in {decoder.path} is not recorded as one from the model that is in {folder / QUANTIZER} now: pass "
            "--overwrite to start both stages anew"
        )


def commands(arguments: TransplantArguments, data: DataArguments, given: set[str]) -> list[list[str]]:
    """The words of the three commands after `optvq`.

    Args:
        given: Names of the flags that the user gave: the others are left to the recipes of the stages.
    """
    folder = Path(arguments.output_dir)
    latents, quantizer, decoder = (str(folder / name) for name in (LATENTS, QUANTIZER, DECODER))
    of_model = ["--model", arguments.model or ""]
    of_model += ["--model-revision", arguments.model_revision] if arguments.model_revision else []
    again = ["--overwrite"] if arguments.overwrite else []
    resume = again or ["--resume", "auto"]
    views = ["--crops", str(arguments.crops)] if arguments.crops else []
    views += ["--flips"] if arguments.flips else []
    source = _flags(data, given & {*OF_SOURCE})
    of_latents = _flags(data, given - {*NOT_OF_LATENTS})
    encode = ["tokenize", "--latents", *of_model, *source, "--split", data.train_split, *views]
    train_quantizer = ["train", "--config", arguments.quantizer_config, *of_model, "--latents", latents, *of_latents]
    train_decoder = ["train", "--config", arguments.decoder_config, "--model", quantizer, *_flags(data, given)]
    return [
        [*encode, "--output-dir", latents, *again],
        [*train_quantizer, "--output-dir", quantizer, *resume],
        [*train_decoder, "--output-dir", decoder, *resume],
    ]


def _flags(data: DataArguments, names: Collection[str]) -> list[str]:
    """The flags of these settings, as far as they are of the data and have a value."""
    flags = []
    for entry in fields(data):
        value = getattr(data, entry.name)
        if entry.name in names and value is not None:
            flags += [
                f"--{entry.name.replace('_', '-')}",
                str(value).lower() if isinstance(value, bool) else str(value),
            ]
    return flags


def run_stage(words: list[str]) -> int:
    """Runs `optvq` in a process of its own, which gets the requests to stop that this one gets; returns its exit code."""
    stage = subprocess.Popen([sys.executable, "-m", "optvq_hf", *words])

    def pass_on(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGINT:  # a terminal sends Ctrl-C to both
            stage.send_signal(number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        code = stage.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    main()
