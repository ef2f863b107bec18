"""Checks of the settings in the configuration of a source, whose errors name what is wrong."""

from collections.abc import Iterable
from typing import Any


def known(names: dict[Any, Any], name: Any, what: str) -> Any:
    """The entry of this name, which may be None where `names` has it.

    Raises:
        ValueError: If there is none.
    """
    if not isinstance(name, (str, type(None))) or name not in names:
        others = ", ".join(name for name in names if name is not None)
        raise ValueError(f"unknown {what} {name!r} in the configuration; known are {others}")
    return names[name]


def check_names(part: dict, names: Iterable[str], of: str) -> None:
    """Raises ValueError for a setting that is not known."""
    for name in part:
        if name not in names:
            raise ValueError(f"unknown {of} setting {name!r} in the configuration")


def checked_dict(value: Any, name: str, of: str = "the original implementation") -> dict[str, Any]:
    """The value, if it is a mapping."""
    if not isinstance(value, dict):
        what = "no entry" if value is None else f"{type(value).__name__} instead of a mapping as its entry"
        raise ValueError(f"the configuration has {what} {name!r}: is it one of {of}?")
    return value


def checked_bool(value: Any, name: str) -> bool:
    """The value, if it is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false in the configuration, got {value!r}")
    return value


def checked_count(value: Any, name: str) -> int:
    """The value, if it is a positive integer."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a positive integer in the configuration, got {value!r}")
    return value
