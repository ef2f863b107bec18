"""The `optvq` console script."""

import importlib
import sys
from collections.abc import Sequence

from .. import __version__


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


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command and imports only that one; --help and --version import none."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in COMMANDS:
        importlib.import_module(f"optvq_hf.commands.{argv[0]}").main(argv[1:])
        return
    if argv and argv[0] == "--version":
        print(f"optvq_hf {__version__}")
        return
    listing = "\n".join(f"  {name:10} {description}" for name, description in COMMANDS.items())
    usage = (
        f"usage: optvq COMMAND [flags]\n       optvq --version\n\n{listing}\n\n"
        "optvq COMMAND --help lists the flags of a command."
    )
    if argv and argv[0] in ("-h", "--help"):
        print(usage)
        return
    wrong = f"unknown command {argv[0]!r}" if argv else "no command given"
    print(f"optvq: error: {wrong}; commands are {', '.join(COMMANDS)}", file=sys.stderr)
    sys.exit(2)
