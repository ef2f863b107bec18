"""Results as a table: plain text, Markdown or LaTeX."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .protocols import columns_of


STYLES = {"text": "txt", "markdown": "md", "latex": "tex"}  # with the ending of their files
_LATEX = {
    **{character: "\\" + character for character in "%_&#${}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line: what was evaluated, and its metrics as in metrics.json.

    Attributes:
        model: Its name; empty leaves the column out, if it is empty in all rows.
    """

    model: str
    assignment: str
    metrics: dict[str, Any]


def rows_of(report: dict[str, Any], model: str = "") -> list[Row]:
    """The rows of the content of a metrics.json, one per assignment."""
    return [Row(model, assignment, metrics) for assignment, metrics in report["by_assignment"].items()]


def format_table(rows: Sequence[Row], metrics: Sequence[str], style: str = "text") -> str:
    """A table with a line for each row. The mean of an image metric has half the width of its 95 % interval beside it,
    or a dash if there is none.

    Args:
        metrics: Names of the metrics to show, in this order; columns of codes follow, as far as a row has them.
        style: "text", "markdown" or "latex" (with the rules of booktabs).
    """
    titles, lines, num_named = cells_of(rows, metrics)
    if style == "markdown":
        head = [_markdown(titles), _markdown(["-"] * len(titles))]
        return "\n".join([*head, *map(_markdown, lines)])
    if style == "latex":
        alignment = "l" * num_named + "r" * (len(titles) - num_named)
        body = [rf"\begin{{tabular}}{{{alignment}}}", r"\toprule", _latex(titles), r"\midrule", *map(_latex, lines)]
        return "\n".join([*body, r"\bottomrule", r"\end{tabular}"])
    widths = [max(len(text) for text in column) for column in zip(titles, *lines)]
    return "\n".join(_text(line, widths, num_named) for line in (titles, *lines))


def cells_of(rows: Sequence[Row], metrics: Sequence[str]) -> tuple[Sequence[str], list[Sequence[str]], int]:
    """The texts of a table: titles, the cells of each row, and how many of the first columns hold names."""
    columns = {
        key: (title, [_cell(row.metrics, key, form) for row in rows])
        for key, (title, form) in columns_of(metrics).items()
        if any(key in row.metrics for row in rows) and not _says_nothing(key, rows)
    }
    named = [("model", [row.model for row in rows])] if any(row.model for row in rows) else []
    named += [("assignment", [row.assignment for row in rows])]
    titles, cells = zip(*named, *columns.values())
    return titles, list(zip(*cells)), len(named)


def _cell(metrics: dict[str, Any], key: str, form: str) -> str:
    value = metrics.get(key)
    if value is None:
        return "-"
    if isinstance(value, list):
        return " ".join(map(form.format, value))
    intervals = metrics.get("intervals", {})
    if key not in intervals:
        return form.format(value)
    interval = intervals[key]
    return f"{form.format(value)} ± {form.format((interval[1] - interval[0]) / 2) if interval else '-'}"


def _says_nothing(key: str, rows: Sequence[Row]) -> bool:
    """Whether figures per head are of one head each, and so those of the column before."""
    return key.endswith("_per_head") and all(len(row.metrics.get(key, ())) < 2 for row in rows)


def _text(cells: Sequence[str], widths: Sequence[int], num_named: int) -> str:
    padded = [
        cell.ljust(width) if i < num_named else cell.rjust(width) for i, (cell, width) in enumerate(zip(cells, widths))
    ]
    return " | ".join(padded)


def _markdown(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _latex(cells: Sequence[str]) -> str:
    return " & ".join(cell.translate(str.maketrans(_LATEX)) for cell in cells) + r" \\"
