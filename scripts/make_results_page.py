"""Writes docs/results.md and the table in README.md from the results in docs/results.

    python scripts/make_results_page.py
    python scripts/make_results_page.py --runs runs/studies

The second takes over the results of `scripts/reproduce.py` first.
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any


REPOSITORY = Path(__file__).resolve().parents[1]
# Python puts this folder first on its path, where evaluate.py would hide the `evaluate` library.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != REPOSITORY / "scripts"]

from optvq_hf.evaluation.comparison_report import draw_rates, summarise, tables  # noqa: E402
from optvq_hf.parsing import parse_json, parse_yaml  # noqa: E402


PAGE, README = REPOSITORY / "docs" / "results.md", REPOSITORY / "README.md"
RESULTS, STUDIES = REPOSITORY / "docs" / "results", REPOSITORY / "scripts" / "studies"
ORDER = ("rivals", "default", "codebook_size", "ablation", "stability", "long", "photos256")
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
INTRODUCTION = """\
# Results

Quantizers under equal conditions, as [comparison.md](comparison.md) describes them: the same networks from the same weights,
the same images, batches, steps and optimizer. A method's figure is that at its best learning rate, which is chosen on images
held out from the training split; errors are mean squared errors on [-1, 1] of the test images, with the codes of inference.
`+-` is the standard error over seeds. Usage is the share of codes that the test images use, in percent.

`photos32` and `photos256` are crops of photographs under free licences (scikit-image, scikit-learn, Debian's backgrounds),
12,000 and 400 for training; they are not on the Hub. Every results file has the digest of its images. This page is made from
the files in [results](results) by `python scripts/make_results_page.py`, and a test compares.
"""


def read_results(study: str) -> dict[str, dict[str, Any]]:
    """Results of the comparisons of a study, by name, in the order of its recipe; without those that were not run."""
    names = [str(name) for name in read_study(study)["comparisons"]]
    paths = [RESULTS / study / f"{name}.json" for name in names]
    return {path.stem: parse_json(path.read_text()) for path in paths if path.is_file()}


def read_study(study: str) -> dict[str, Any]:
    """Title, question, comparisons and, once it was run, findings."""
    return parse_yaml((STUDIES / f"{study}.yaml").read_text())


def take_over(runs: Path) -> None:
    """Copies results of `scripts/reproduce.py` to docs/results."""
    for study in ORDER:
        for name in map(str, read_study(study)["comparisons"]):
            found = runs / study / name
            if (found / "results.json").is_file():
                (RESULTS / study).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(found / "results.json", RESULTS / study / f"{name}.json")
                if study in ("rivals", "photos256"):
                    shutil.copyfile(found / "reconstructions.png", RESULTS / study / f"{name}-reconstructions.png")


def rows_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The summary of every rival, from all of its runs."""
    return summarise(results["runs"], list(dict.fromkeys(row["rival"] for row in results["rows"])))


def draw_curves() -> None:
    """Draws the error over the learning rate for every comparison with three rates or more."""
    for study in ORDER:
        for name, results in read_results(study).items():
            rows = rows_of(results)
            if len({rate for row in rows for rate in row["mse_of_rates"]}) > 2:
                draw_rates(rows, RESULTS / study / f"{name}-rates.png")


def make_page() -> str:
    """The page."""
    parts, not_run = [INTRODUCTION], []
    for study in ORDER:
        recipe, results = read_study(study), read_results(study)
        if not results:
            not_run.append(f"- **{recipe['title']}** (`{study}`): {recipe['question']}")
            continue
        parts += [f"## {recipe['title']}\n\n{recipe['question']}\n\n{recipe['found'].strip()}\n"]
        for name, of_one in results.items():
            parts.append(f"### {name.replace('_', ' ')}\n\n{describe(of_one)}\n\n{tables(rows_of(of_one))}\n")
            for kind in ("rates", "reconstructions"):
                if (RESULTS / study / f"{name}-{kind}.png").is_file():
                    parts.append(f"![{kind} of {name}](results/{study}/{name}-{kind}.png)\n")
        parts.append(f"```bash\npython scripts/reproduce.py --study {study}\n```\n")
    if not_run:
        parts.append("## Not run yet\n\nRecipes in `scripts/studies` without results:\n\n" + "\n".join(not_run) + "\n")
    return "\n".join(parts)


def describe(results: dict[str, Any]) -> str:
    """Data, sizes, machine and time of a comparison."""
    settings, runs = results["settings"], results["runs"]
    devices = ", ".join(sorted({run["device"] for run in runs}))
    seconds = sum(run["seconds"] for run in runs)
    return (
        f"`{settings['dataset']}`, {settings['images']['train']:,} training and {settings['images']['test']:,} test images; "
        f"{settings['max_steps']:,} steps of {settings['batch_size']}; {settings['codebook_size']:,} codes of width "
        f"{settings['codebook_dim']}. {len(runs)} runs, {seconds / 60:.0f} minutes in all, several at a time on {devices}."
    )


def make_table() -> str:
    """The table of README.md: all rivals on all datasets of the study `rivals`."""
    results = read_results("rivals")
    by_name = {name: {row["rival"]: row for row in rows_of(of_one)} for name, of_one in results.items()}
    lines = ["| quantizer | " + " | ".join(name.replace("_", " ") for name in by_name) + " |"]
    lines.append("| - " * (len(by_name) + 1) + "|")
    first = next(iter(by_name.values()), {})
    for rival, row in first.items():
        cells = [
            f"{rows[rival]['mse']:.4f} / {rows[rival]['codebook_usage']:.1f}" if rival in rows else "-"
            for rows in by_name.values()
        ]
        lines.append(f"| {row['title']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def put_table(readme: str) -> str:
    """README.md with the table between its marks."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{make_table()}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, help="folder of scripts/reproduce.py, whose results are taken over")
    arguments = parser.parse_args()
    if arguments.runs:
        take_over(arguments.runs)
    draw_curves()
    PAGE.write_text(make_page())
    README.write_text(put_table(README.read_text()))


if __name__ == "__main__":
    main()
