"""The `optvq` console script."""

import importlib
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from .. import __version__
from .suggestions import suggestion
from .terminal import end_without_reader, print_error, print_help


COMMANDS = {
    "train": "Train a tokenizer on any image dataset.",
    "evaluate": "Measure reconstruction quality and codebook usage of a tokenizer.",
    "compare": "Train tokenizers with rival quantizers under equal conditions, and compare them.",
    "tokenize": "Turn a dataset of images into a dataset of tokens.",
    "detokenize": "Turn a dataset of tokens back into pictures.",
    "transplant": "Give a pretrained autoencoder a quantizer of optimal transport, and train both for each other.",
    "ids": "Turn embeddings of items into ids, short sequences of codes.",
    "convert": "Turn a model of the original OptVQ implementation, or another library's autoencoder, into one of this library.",
    "publish": "Put a model on the Hub, with its code, pipelines, card and results.",
}


EXIT_CODES = {
    0: "done; of a training that was asked to stop: its checkpoint is written",
    1: "the command failed; stderr says why in one line",
    2: "a wrong command, flag or recipe",
    130: "interrupted, with nothing to save",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command and imports only that one; --help and --version import none."""
    word, *others = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        try:
            _run(word, others)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:  # before the command itself answers to it
        print("optvq: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        end_without_reader()


def _run(word: str, others: Sequence[str]) -> None:
    if word in COMMANDS:
        importlib.import_module(f"optvq_hf.commands.{word}").main(others)
    elif word == "help" and others:
        _run(others[0], ["--help"])
    elif word in ("help", "-h", "--help", "--help-all"):
        print_help(make_help())
    elif word == "--version":
        print(f"optvq_hf {__version__}")
    elif word == "--print-completion":
        importlib.import_module("optvq_hf.commands.completion").main(others)
    else:
        print_error("optvq", f"{_what_is_wrong(word)} (see optvq --help)")
        sys.exit(2)


def make_help() -> str:
    """The text of `optvq --help`."""
    width = shutil.get_terminal_size().columns - 2  # as argparse has it
    last = "optvq COMMAND --help shows the usual flags of a command, optvq COMMAND --help-all all of them."

    def wrap(text: str, indent: int = 0) -> str:
        return textwrap.fill(text, width, subsequent_indent=" " * indent, break_on_hyphens=False)

    def table(entries: Mapping[Any, str]) -> str:
        return "\n".join(wrap(f"  {entry:<12}{text}", indent=14) for entry, text in entries.items())

    return f"""usage: optvq COMMAND [flags]
       optvq --version
       optvq --print-completion SHELL

commands:
{table(COMMANDS)}

exit codes:
{table(EXIT_CODES)}

{wrap(last)}"""


def _what_is_wrong(word: str) -> str:
    if word.startswith("-"):
        return f"unknown flag {word}: flags come after a command"
    return f"unknown command {word!r}{suggestion(word, COMMANDS) or '; commands are ' + ', '.join(COMMANDS)}"
