"""Runs a study of docs/results.md again: comparisons of quantizers, as scripts/studies/NAME.yaml lists them.

    python scripts/reproduce.py --study rivals --quick
    python scripts/reproduce.py --study rivals --parallel 14 --copy photos32=path/to/photos32

Every run is a file of its own: a study that is started again runs only what is missing. `--quick` runs a few steps of
everything, in a folder of its own, to show that it runs; its figures say nothing. `scripts/make_results_page.py --runs
runs/studies` takes results to the page.
"""

import argparse
import sys
from pathlib import Path


# Python puts this folder first on its path, where evaluate.py would hide the `evaluate` library.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]

from optvq_hf.commands.compare import make_parser  # noqa: E402
from optvq_hf.commands.errors import one_line_errors  # noqa: E402
from optvq_hf.commands.folders import check_writable  # noqa: E402
from optvq_hf.parsing import parse_yaml  # noqa: E402


STUDIES = {path.stem: path for path in sorted((Path(__file__).parent / "studies").glob("*.yaml"))}
QUICK = {
    "max_steps": 20,
    "max_images": 256,
    "eval_split": "test[:256]",
    "codebook_size": 64,
    "learning_rates": [5e-3],
    "confirm_seeds": [],
}


def words(flags: dict, output_dir: Path) -> list[str]:
    """The command line of `optvq compare` for flags by name; an empty list leaves a flag out."""
    line = ["--output-dir", str(output_dir)]
    for name, value in flags.items():
        values = value if isinstance(value, list) else [value]
        if values:
            line += [f"--{name.replace('_', '-')}", *map(str, values)]
    return line


def read_copies(pairs: list[str], study: dict) -> dict[str, str]:
    """Folders of local copies by the ids of datasets, from `ID=PATH`.

    Raises:
        ValueError: For another form, or an id that the study does not have.
    """
    settings = [study.get("common", {}) | flags for flags in study["comparisons"].values()]
    ids = sorted({flags[name] for flags in settings for name in ("dataset", "first_dataset") if name in flags})
    copies = {}
    for pair in pairs:
        dataset, _, path = pair.partition("=")
        if not path or dataset not in ids:
            raise ValueError(f"--copy takes ID=PATH, with an ID of {', '.join(ids)}, got {pair!r}")
        copies[dataset] = path
    return copies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", required=True, choices=STUDIES, help="name of the study")
    parser.add_argument("--quick", action="store_true", help="a few steps of every run, to see that all is there")
    parser.add_argument("--output-dir", default="runs/studies", help="folder of all studies")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--copy", nargs="+", default=[], metavar="ID=PATH", help="local copies of datasets")
    arguments = parser.parse_args()
    with one_line_errors("reproduce"):
        from optvq_hf.evaluation.studies import Comparison, run_comparisons

        study = parse_yaml(STUDIES[arguments.study].read_text())
        copies = read_copies(arguments.copy, study)
        folder = Path(arguments.output_dir) / (arguments.study + ("-quick" if arguments.quick else ""))
        comparisons = []
        for name, flags in study["comparisons"].items():
            flags = study.get("common", {}) | flags | (QUICK if arguments.quick else {})
            line = words(flags | {"parallel": arguments.parallel}, folder / str(name))
            comparisons.append(Comparison(*make_parser().parse(line), copies))
            check_writable(folder / str(name))
        run_comparisons(comparisons, arguments.parallel)


if __name__ == "__main__":
    main()
