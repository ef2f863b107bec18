"""Whole datasets of images to tokens, and back."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .reading import load_tokens
    from .tokenizer import OptVQTokenizer

__all__ = ["OptVQTokenizer", "load_tokens"]


def __getattr__(name: str) -> Any:
    """Imports names on first use (PEP 562): settings of a command need neither torch nor datasets."""
    modules = {"OptVQTokenizer": "tokenizer", "load_tokens": "reading"}
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{modules[name]}", __name__), name)
