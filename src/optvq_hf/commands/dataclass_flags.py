"""The fields of a dataclass as flags, by the rules of transformers' HfArgumentParser, whose import takes seconds."""

import argparse
from dataclasses import MISSING, Field, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


WORDS = {"true": True, "yes": True, "t": True, "y": True, "1": True}
WORDS |= {"false": False, "no": False, "f": False, "n": False, "0": False}


def to_bool(word: str) -> bool:
    """The value of a switch: true or false, as words of any case.

    Raises:
        argparse.ArgumentTypeError: For another word.
    """
    if word.lower() not in WORDS:
        raise argparse.ArgumentTypeError(f"must be true or false, got {word!r}")
    return WORDS[word.lower()]


def add_flags(parser: argparse.ArgumentParser, dataclass_type: Any) -> None:
    """Adds a group, named by the `_argument_group_name` of the class, with a flag for each field.

    `field_name` becomes `--field-name`, with the alias `--field_name`; `from_`, otherwise a word of Python's, becomes `--from`.
    A list takes several words. A bool is a switch: `--flag`, `--flag true` or `--flag false`, and `--no-flag` if its default
    is true.
    """
    group = parser.add_argument_group(dataclass_type._argument_group_name)
    types = get_type_hints(dataclass_type)
    for entry in fields(dataclass_type):
        _add_flag(group, entry, types[entry.name])


def _add_flag(group: argparse._ArgumentGroup, entry: Field, kind: Any) -> None:
    name = entry.name.rstrip("_")
    default = entry.default if entry.default_factory is MISSING else entry.default_factory()
    settings = {"dest": entry.name, "default": default, "help": entry.metadata["help"]}
    group.add_argument(*_options(name), **settings, **_reading(kind))
    if default is True:
        no_text = f"The same as --{name.replace('_', '-')} false"
        group.add_argument(*_options(f"no_{name}"), action="store_false", dest=entry.name, help=no_text)


def _options(name: str) -> list[str]:
    return list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))


def _reading(kind: Any) -> dict[str, Any]:
    """How argparse reads words as a type, or as that type or None."""
    if get_origin(kind) in (Union, UnionType):
        [kind] = [one for one in get_args(kind) if one is not NoneType]
    if kind is bool:
        return {"type": to_bool, "nargs": "?", "const": True}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if get_origin(kind) is list:
        return {"type": get_args(kind)[0], "nargs": "+"}
    return {"type": kind}
