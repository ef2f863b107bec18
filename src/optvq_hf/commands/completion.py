"""Completion of commands, flags, choices and paths in a shell, from the same parsers that read them.

    optvq --print-completion bash > ~/.local/share/bash-completion/completions/optvq

The script is static: completing imports nothing.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from .cli import COMMANDS
from .dataclass_flags import to_bool
from .errors import one_line_errors
from .parser import RECIPES
from .terminal import print_error


# What values of flags are, by the name of the field.
FOLDERS = ("output_dir", "data_dir", "model", "tokens", "quantizer", "source", "folder", "out")
FILES = ("dataset", "first_dataset", "reference_config", "discriminator_weights", "check_images")
# The name ends in _file because shtab tells by it that bash has to treat the words as paths.
RECIPE = {"bash": "_optvq_recipe_file", "zsh": "_optvq_recipe_file"}
PREAMBLE = {
    "bash": f'_optvq_recipe_file() {{ compgen -W "{" ".join(RECIPES)}" -- "$1"; compgen -f -- "$1"; }}\n',
    "zsh": f'_optvq_recipe_file() {{ _alternative "recipes:recipe:({" ".join(RECIPES)})" "files:file:_files" }}\n',
}


def main(words: Sequence[str]) -> None:
    """Prints the script for the shell that is named; a user's mistake ends the process with one line."""
    with one_line_errors("--print-completion"):
        shells = supported_shells()
    if len(words) != 1 or words[0] not in shells:
        got = f", got {' '.join(words)!r}" if words else ""
        print_error("optvq", f"--print-completion takes one of {', '.join(shells)}{got}")
        sys.exit(2)
    print(make_script(words[0]))


def supported_shells() -> list[str]:
    """Shells that shtab writes scripts for. Raises ImportError if it is not installed."""
    try:
        import shtab
    except ImportError as error:
        raise ImportError('shtab is not installed: run pip install "optvq_hf[completion]"') from error
    return list(shtab.SUPPORTED_SHELLS)


def make_script(shell: str) -> str:
    """The script that completes `optvq` in one of `supported_shells`."""
    import shtab

    kinds: dict[str, Any] = {"config": {**shtab.FILE, **RECIPE}}
    kinds.update(dict.fromkeys(FOLDERS, shtab.DIRECTORY))
    kinds.update(dict.fromkeys(FILES, shtab.FILE))
    root = argparse.ArgumentParser("optvq")
    root.add_argument("--version", action="store_true", help="Print the version")
    root.add_argument(
        "--print-completion", choices=shtab.SUPPORTED_SHELLS, help="Print the completion script of a shell"
    )
    commands = root.add_subparsers()
    for name, description in COMMANDS.items():
        parser = importlib.import_module(f"optvq_hf.commands.{name}").make_parser()
        for action in parser._actions:
            _prepare(action, kinds)
        commands.add_parser(name, help=description, parents=[parser], add_help=False)
    return shtab.complete(root, shell, preamble=PREAMBLE.get(shell, ""))


def _prepare(action: Any, kinds: dict[str, Any]) -> None:
    """Leaves an option without its aliases `--long_flag` and, if it is a switch, without a value; adds what completes it."""
    action.option_strings = [option for option in action.option_strings if "_" not in option]
    if action.type is to_bool and action.const is True:
        action.nargs = 0
    if action.dest in kinds:
        action.complete = kinds[action.dest]
