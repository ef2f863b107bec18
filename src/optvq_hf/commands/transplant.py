"""Give a pretrained autoencoder a quantizer of optimal transport, and train both for each other.

    optvq convert --from diffusers stabilityai/sdxl-vae runs/sdxl --codebook-size 16384
    optvq transplant --model runs/sdxl --dataset path/to/images --eval-fraction 0.1 --output-dir runs/mine

Runs three commands, which it prints: `optvq tokenize --latents` encodes all images once, `optvq train` trains the quantizer on
these latents, and then the decoder on images. Started again, it resumes where it was stopped.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import FrameType

from ..data.arguments import DataArguments
from ..training.transplant_arguments import TransplantArguments
from .cli import COMMANDS
from .errors import one_line_errors
from .folders import check_writable
from .parser import Parser


# Folders in the output folder: of the latents, and of the run of each stage.
LATENTS, QUANTIZER, DECODER = "latents", "quantizer", "decoder"
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
    for name, value in (("model", arguments.model), ("dataset", data.dataset)):
        if not value:
            parser.error(f"--{name} is missing")
    for name in ("streaming", "latents"):
        if getattr(data, name):
            parser.error(f"--{name} is not for this command, which makes the latents of the images itself")
    with one_line_errors("transplant"):
        transplant(arguments, data)


def transplant(arguments: TransplantArguments, data: DataArguments) -> None:
    """Runs the stages one after the other, each as a process of its own, until one fails or is stopped.

    Raises:
        OSError: If the output folder cannot be written to.
        ValueError: If it is started as several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        stages = "\n".join(shlex.join(["optvq", *words]) for words in commands(arguments, data))
        raise ValueError(f"optvq transplant is one process; run each of its stages with several:\n{stages}")
    from ..tokenization.manifest import MANIFEST_FILE
    from ..training.watching.log import SUMMARY_FILE

    folder = Path(arguments.output_dir)
    check_writable(folder)
    marks = (folder / LATENTS / MANIFEST_FILE, *(folder / name / SUMMARY_FILE for name in (QUANTIZER, DECODER)))
    for words, mark in zip(commands(arguments, data), marks):
        print(f"stage      {shlex.join(['optvq', *words])}", flush=True)
        if code := run_stage(words):
            sys.exit(code)
        if not mark.is_file():
            print("stopped; the same command resumes")
            return
    print(f"transplant {folder / DECODER}  (load it with OptVQModel.from_pretrained)")


def commands(arguments: TransplantArguments, data: DataArguments) -> list[list[str]]:
    """The words of the three commands after `optvq`."""
    folder = Path(arguments.output_dir)
    latents, quantizer, decoder = (str(folder / name) for name in (LATENTS, QUANTIZER, DECODER))
    of_model = ["--model", arguments.model or ""]
    of_model += ["--model-revision", arguments.model_revision] if arguments.model_revision else []
    again = ["--overwrite"] if arguments.overwrite else []
    resume = again or ["--resume", "auto"]
    views = ["--crops", str(arguments.crops)] if arguments.crops else []
    views += ["--flips"] if arguments.flips else []
    source = _flags(data, OF_SOURCE)
    every = [entry.name for entry in fields(data)]
    of_latents = _flags(data, [name for name in every if name not in NOT_OF_LATENTS])
    encode = ["tokenize", "--latents", *of_model, *source, "--split", data.train_split, *views]
    train_quantizer = ["train", "--config", arguments.quantizer_config, *of_model, "--latents", latents, *of_latents]
    train_decoder = ["train", "--config", arguments.decoder_config, "--model", quantizer, *_flags(data, every)]
    return [
        [*encode, "--output-dir", latents, *again],
        [*train_quantizer, "--output-dir", quantizer, *resume],
        [*train_decoder, "--output-dir", decoder, *resume],
    ]


def _flags(data: DataArguments, names: Sequence[str]) -> list[str]:
    """The flags of these settings that are not the defaults."""
    flags = []
    for entry in fields(data):
        value = getattr(data, entry.name)
        if entry.name in names and value != entry.default:
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
