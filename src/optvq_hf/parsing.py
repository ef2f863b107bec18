"""Reading JSON and YAML that people may have changed: whatever is wrong with a text is a ValueError of one line."""

import json
from typing import Any

import yaml


def parse_json(text: str | bytes) -> dict[str, Any]:
    """The entries of a JSON object.

    Raises:
        ValueError: If the text is broken, nested too deeply, or something else than an object.
    """
    try:
        entries = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return _mapping(entries)


def parse_yaml(text: str) -> dict[str, Any]:
    """The entries of a YAML mapping; raises as [`parse_json`]."""
    try:
        entries = yaml.safe_load(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except Exception as error:  # beside YAML's own, those of Python's types, such as AttributeError for a broken date
        raise ValueError(" ".join(str(error).split())) from error
    return _mapping(entries)


def _mapping(entries: Any) -> dict[str, Any]:
    if not isinstance(entries, dict):
        raise ValueError(f"it must hold entries, got {type(entries).__name__}")
    return entries
