"""What a terminal shows in colour and with rules. Pipes, files and terminals with NO_COLOR get the same words as plain text."""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn, TextIO


if TYPE_CHECKING:
    from rich.console import Console


HELP_STYLES = (
    (r"(?m)^[a-z][a-z ]*:", "bold"),  # usage, and the title of a group
    (r"(?<![\w/.-])--?[a-z][\w-]*", "cyan"),  # a flag
    (r"(?s)\(default: .*?\)", "dim"),
)


def print_help(text: str, stream: TextIO | None = None) -> None:
    """Prints a help text, with its flags, titles and defaults set off."""
    console = _console(stream or sys.stdout)
    if console is None:
        print(text.rstrip("\n"), file=stream or sys.stdout)
        return
    from rich.text import Text

    styled = Text(text.rstrip("\n"))
    for pattern, style in HELP_STYLES:
        styled.highlight_regex(pattern, style)
    console.print(styled, soft_wrap=True)


def end_without_reader() -> NoReturn:
    """Ends the program, with exit code 1, where whoever read its output has gone, as `head` does."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be written
    sys.exit(1)


def print_error(program: str, message: str) -> None:
    """Prints `PROGRAM: error: MESSAGE` as one line of stderr."""
    console = _console(sys.stderr)
    if console is None:
        print(f"{program}: error: {message}", file=sys.stderr)
        return
    from rich.text import Text

    console.print(Text.assemble(f"{program}: ", ("error:", "bold red"), f" {message}"), soft_wrap=True)


def print_table(titles: Sequence[str], lines: Sequence[Sequence[str]], num_named: int, plain: str) -> None:
    """Prints a table, which a terminal shows with rules and fits to its width.

    Args:
        num_named: The first columns, which hold names and not numbers.
        plain: The same table as plain text.
    """
    console = _console(sys.stdout)
    if console is None:
        print(plain)
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for number, title in enumerate(titles):
        table.add_column(Text(title), justify="left" if number < num_named else "right")
    for cells in lines:
        table.add_row(*map(Text, cells))
    console.print(table)


def print_markdown(text: str) -> None:
    """Prints Markdown, which a terminal shows as what it means."""
    console = _console(sys.stdout)
    if console is None:
        print(text)
        return
    from rich.markdown import Markdown

    console.print(Markdown(text))


def _console(stream: TextIO) -> "Console | None":
    """A console that writes to the stream; None where plain text is wanted."""
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return None
    from rich.console import Console

    return Console(file=stream, highlight=False)
