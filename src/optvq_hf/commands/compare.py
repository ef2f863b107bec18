"""Command line `optvq compare`: rivals under equal conditions, each over a grid of learning rates.

    optvq compare --dataset ylecun/mnist --num-channels 1 --output-dir runs/compare_mnist --confirm-seeds 1 2

Every run is a file of its own, `runs/NAME.json`, written as a whole: the same command started again runs what is missing. The
best learning rate of each rival is chosen on images held out from the training split; results are of the test split.
"""

from collections.abc import Sequence

from ..data.arguments import DataArguments
from ..evaluation.arguments import ComparisonArguments
from .cli import COMMANDS
from .errors import one_line_errors
from .folders import check_writable
from .parser import Parser
from .terminal import print_markdown


def make_parser() -> Parser:
    """Makes the parser of the command: flags of the comparison and the data."""
    return Parser([ComparisonArguments, DataArguments], "compare", COMMANDS["compare"])


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `optvq compare`; a user's mistake ends the process with one line."""
    parser = make_parser()
    arguments, data = parser.parse(argv)
    for name, value in (("dataset", data.dataset), ("output-dir", arguments.output_dir)):
        if not value:
            parser.error(f"--{name} is missing")
    with one_line_errors("compare"):
        compare(arguments, data)


def compare(arguments: ComparisonArguments, data: DataArguments) -> None:
    """Runs what is missing in the output folder, and writes the report.

    Raises:
        ValueError: If the folder holds a comparison with other settings or of other images; after the report, if runs failed.
        ImportError: If a library is missing.
        OSError: If the folder cannot be written to, or another comparison runs in it.
    """
    from ..evaluation.studies import Comparison, run_comparisons

    comparison = Comparison(arguments, data)
    check_writable(comparison.folder)
    run_comparisons([comparison], arguments.parallel, print_markdown)


if __name__ == "__main__":
    main()
