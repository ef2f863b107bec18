"""Writes docs/results.md and the tables in README.md from the results in docs/results and model_cards.

    python scripts/make_results_page.py
    python scripts/make_results_page.py --runs runs/studies

The second takes over the results of `scripts/reproduce.py` first.
"""

import argparse
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any


REPOSITORY = Path(__file__).resolve().parents[1]
# Python puts this folder first on its path, where evaluate.py would hide the `evaluate` library.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != REPOSITORY / "scripts"]

from optvq_hf.evaluation.arguments import ComparisonArguments  # noqa: E402
from optvq_hf.evaluation.comparison_report import (  # noqa: E402
    different_versions,
    draw_rates,
    error_cell,
    number_cell,
    summarise,
    tables,
)
from optvq_hf.evaluation.protocols import LITE  # noqa: E402
from optvq_hf.parsing import parse_json, parse_yaml  # noqa: E402


PAGE, README = REPOSITORY / "docs" / "results.md", REPOSITORY / "README.md"
RESULTS, STUDIES = REPOSITORY / "docs" / "results", REPOSITORY / "scripts" / "studies"
ORDER = ("rivals", "default", "codebook_size", "ablation", "stability", "long", "photos256")
DEFAULTS = {field.name: field.default for field in fields(ComparisonArguments)}
CARDS = REPOSITORY / "model_cards"
MODELS = ("photos32", "fashion_mnist", "mnist")
INTRODUCTION = """\
# Results

- **Error.** Over three seeds our default has the lowest error on Fashion-MNIST and on photographs of 32 and of 256 pixels, and
  shares the lowest on MNIST. EMA codes are level with it after twenty times as many steps.
- **Use.** Our default uses 99 % of its codes and more in these; with more codes than tokens in a step, EMA codes use more.
- **Rates.** It trains at rates at which nearest codes and SimVQ collapse; nobody stands ten times the best rate.
- **Why.** The transport does it, not the normalisation of its costs.

## How to read this page

Quantizers under equal conditions, which [Comparing quantizers](comparison.md) describes: the same networks from the same
weights, the same images, batches, steps and optimizer. A method's figure is that at its best learning rate, chosen on images
held out from the training split; errors are mean squared errors on [-1, 1] of the test images, with the codes of inference.
`+-` is the standard error over seeds. Bits are those of a token, and usage is the share of all different tokens that the test
images use, in percent. (The test images of `photos32` are of other photographs than those for training: codes that held-out
images need may be without use there.) `diverged` is a run that ended without a number, `not run` one of the recipe that is
still to be made, `-` a figure that was not measured: of residual VQ, the runs so far counted the codes of each level, not the
tokens of both.

`photos32` and `photos256` are crops of photographs under free licences (scikit-image, scikit-learn, Debian's backgrounds),
12,000 and 400 for training; they are not on the Hub. Every results file has a digest of its images: `images_sha256` by part, as
`optvq evaluate` computes it, or, in the first ones, `images_file_sha256` of the file that held them. This page is made from the
files in [results](results) by `python scripts/make_results_page.py`, and a test compares.
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


def flags_of(study: str, name: str) -> dict[str, Any]:
    """Flags of a comparison of a study."""
    recipe = read_study(study)
    [flags] = [flags for of, flags in recipe["comparisons"].items() if str(of) == name]
    return recipe.get("common", {}) | flags


def rows_of(results: dict[str, Any], rivals: list[str]) -> list[dict[str, Any]]:
    """The summary of rivals, from all runs."""
    return summarise(results["runs"], rivals, results["settings"]["codebook_size"])


def count_runs(flags: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """Of the search over rates and of its confirmation, how many runs there are, and how many the recipe has."""
    found = {(run["rival"], run["learning_rate"], run["seed"]) for run in runs}
    seeds, confirm_seeds = flags.get("seeds", [0]), flags.get("confirm_seeds", [])
    rates = [float(rate) for rate in flags["learning_rates"]]
    search = {(rival, rate, seed) for rival in flags["rivals"] for rate in rates for seed in seeds}
    confirmed = {(rival, seed) for rival, _, seed in found if rival in flags["rivals"] and seed in confirm_seeds}
    counts = {"the search": (len(found & search), len(search))}
    if confirm_seeds:
        counts["the confirmation"] = (len(confirmed), len(confirm_seeds) * len(flags["rivals"]))
    return counts


def draw_curves() -> None:
    """Draws the error of the tables' rivals over the learning rate, for every comparison with three rates or more."""
    for study in ORDER:
        for name, results in read_results(study).items():
            rows = rows_of(results, flags_of(study, name)["rivals"])
            if len({rate for row in rows for rate in row["mse_of_rates"]}) > 2:
                draw_rates(rows, RESULTS / study / f"{name}-rates.png")


def make_page() -> str:
    """The page."""
    parts, not_run = [INTRODUCTION], []
    for study in ORDER:
        recipe, results = read_study(study), read_results(study)
        found = recipe.get("found", "Nothing is written of these results yet.")
        if not results:
            not_run.append(f"- **{recipe['title']}** (`{study}`): {recipe['question']}")
            continue
        parts += [f"## {recipe['title']}\n\n{recipe['question']}\n\n{found.strip()}\n"]
        for name, of_one in results.items():
            flags = flags_of(study, name)
            shown = tables(rows_of(of_one, flags["rivals"]))
            parts.append(f"### {name.replace('_', ' ')}\n\n{describe(of_one, flags)}\n\n{shown}\n")
            for kind in ("rates", "reconstructions"):
                if (RESULTS / study / f"{name}-{kind}.png").is_file():
                    parts.append(f"![{kind} of {name}](results/{study}/{name}-{kind}.png)\n")
        parts.append(f"```bash\npython scripts/reproduce.py --study {study}\n```\n")
    if not_run:
        parts.append("## Not run yet\n\nRecipes in `scripts/studies` without results:\n\n" + "\n".join(not_run) + "\n")
    return "\n".join(parts)


def describe(results: dict[str, Any], flags: dict[str, Any]) -> str:
    """Data, sizes, machine and time of a comparison, and how much of its recipe was run."""
    settings, runs = results["settings"], results["runs"]
    devices = ", ".join(sorted({run["device"] for run in runs}))
    seconds = sum(run["seconds"] for run in runs)
    counts = [f"{found} of {wanted} runs of {part}" for part, (found, wanted) in count_runs(flags, runs).items()]
    changed = [
        f"{name.replace('_', ' ')} `{settings[name]}`"
        for name in ("backbone", "image_size", "latent_scale", "latent_shift", "first_dataset")
        if settings.get(name, DEFAULTS[name]) != DEFAULTS[name]
    ]
    sizes = [
        f"{settings['max_steps']:,} steps of {settings['batch_size']}",
        f"{settings['codebook_size']:,} codes of width {settings['codebook_dim']}",
        *changed,
    ]
    sentences = [
        f"`{settings['dataset']}`, {settings['images']['train']:,} training and {settings['images']['test']:,} test images.",
        f"{'; '.join(sizes)}.",
        f"{' and '.join(counts)}; their training took {seconds / 60:.0f} minutes in sum, several at a time on {devices}.",
        different_versions(runs),
    ]
    return " ".join(filter(None, sentences))


def make_table() -> str:
    """The table of README.md: rivals on all datasets of the study `rivals`, without those that were run on none."""
    results = read_results("rivals")
    columns = [rows_of(of_one, flags_of("rivals", name)["rivals"]) for name, of_one in results.items()]
    lines = ["| quantizer | " + " | ".join(name.replace("_", " ") for name in results) + " |"]
    lines.append("| - " * (len(results) + 1) + "|")
    lowest = [min(map(error_cell, column)) for column in columns]
    for of_rival in zip(*columns, strict=True):
        cells = [error_cell(row) for row in of_rival]
        bold = [f"**{cell}**" if cell == best else cell for cell, best in zip(cells, lowest)]
        of_error = [f" ± {number_cell(row['mse_standard_error'], 4)}" for row in of_rival]
        of_usage = [number_cell(row["codebook_usage"], 1) for row in of_rival]
        cells = [f"{cell}{error} / {usage}" for cell, error, usage in zip(bold, of_error, of_usage)]
        lines.append(f"| {of_rival[0]['title']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def make_table_of_models() -> str:
    """The table of README.md: the models trained here, from their configurations and records."""
    lines = [
        "| model | pixels | tokens | bits of a token | codes used (%) | of each head | PSNR (dB) | SSIM | FD |",
        "| - " * 9 + "|",
    ]
    for name in MODELS:
        config, metrics = (parse_json((CARDS / name / f"{part}.json").read_text()) for part in ("config", "metrics"))
        height, width = metrics["image_size"]
        usage = ", ".join(f"{of_head:.1f}" for of_head in metrics["codebook_usage_per_head"])
        lines.append(
            f"| [{name}](model_cards/{name}) | {height} x {width} | {height // 4} x {width // 4} of "
            f"{config['num_codebook_heads']} codes | {metrics['bits_per_token']:.0f} | {metrics['codebook_usage']:.1f} | "
            f"{usage} | {metrics['psnr']:.1f} | {metrics['ssim']:.3f} | {number_cell(metrics.get(LITE), 1)} |"
        )
    return "\n".join(lines)


def put_tables(readme: str) -> str:
    """README.md with its tables between their marks."""
    for name, table in (("results", make_table()), ("models", make_table_of_models())):
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, _, rest = readme.partition(begin)
        _, _, after = rest.partition(end)
        readme = f"{before}{begin}\n{table}\n{end}{after}"
    return readme


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, help="folder of scripts/reproduce.py, whose results are taken over")
    arguments = parser.parse_args()
    if arguments.runs:
        take_over(arguments.runs)
    draw_curves()
    PAGE.write_text(make_page())
    README.write_text(put_tables(README.read_text()))


if __name__ == "__main__":
    main()
