"""The `optvq` console script."""

import importlib
import sys
from collections.abc import Sequence

from .. import __version__
from .suggestions import suggestion
from .terminal import print_error, print_help


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
    argv = list(sys.argv[1:] if argv is None else argv)
    word = argv[0] if argv else ""
    if word in COMMANDS:
        importlib.import_module(f"optvq_hf.commands.{word}").main(argv[1:])
    elif word in ("-h", "--help", "--help-all"):
        print_help(make_help())
    elif word == "--version":
        print(f"optvq_hf {__version__}")
    elif word == "--print-completion":
        importlib.import_module("optvq_hf.commands.completion").main(argv[1:])
    else:
        print_error("optvq", f"{_what_is_wrong(word)} (see optvq --help)")
        sys.exit(2)


def make_help() -> str:
    """The text of `optvq --help`."""
    commands = "\n".join(f"  {name:12}{description}" for name, description in COMMANDS.items())
    codes = "\n".join(f"  {code:<12}{meaning}" for code, meaning in EXIT_CODES.items())
    return f"""usage: optvq COMMAND [flags]
       optvq --version
       optvq --print-completion SHELL

commands:
{commands}

exit codes:
{codes}

optvq COMMAND --help shows the usual flags of a command, optvq COMMAND --help-all all of them."""


def _what_is_wrong(word: str) -> str:
    if word.startswith("-"):
        return f"unknown flag {word}: flags come after a command"
    wrong = f"unknown command {word!r}" if word else "no command given"
    return f"{wrong}{suggestion(word, COMMANDS) or '; commands are ' + ', '.join(COMMANDS)}"
