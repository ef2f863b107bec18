"""Compares settings of the small recipes: `optvq train` with one setting changed at a time.

    python scripts/compare_recipes.py --mnist ylecun/mnist --photos path/to/images

Trains with `scripts/recipes/mnist.yaml` (one head) and `scripts/recipes/small_photos.yaml`, and writes the metrics of
each run to docs/recipe_comparison.json; docs/training.md shows them. One thread per run; about an hour on two cores.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parents[1]
RECIPES = {"mnist": "mnist.yaml", "photos": "small_photos.yaml"}
SEEDS = (0, 1, 2)
# Name, flags on top of the recipe, seeds.
VARIANTS = (
    ("the recipe", "", SEEDS),
    (
        "as in the paper: the four below at once",
        "--learning-rate 2e-3 --epsilon-schedule 10 10 --warmup-ratio 0.01 --codebook-learning-rate-multiplier 1",
        SEEDS,
    ),
    ("learning rate 2e-3", "--learning-rate 2e-3", SEEDS[:2]),
    ("epsilon 10 throughout", "--epsilon-schedule 10 10", SEEDS[:2]),
    ("warm-up of 1 %", "--warmup-ratio 0.01", SEEDS[:2]),
    ("codebook rate x 1", "--codebook-learning-rate-multiplier 1", SEEDS),
    ("balance 1 to 0.7", "--balance-schedule 1 0.7", SEEDS[:2]),
    ("start on samples", "--codebook-start samples", SEEDS[:2]),
    (
        "EMA codebook, k-means after 40 steps",
        "--codebook-update ema --use-codebook-projection false --codebook-start kmeans --quantization-start 40",
        SEEDS[:2],
    ),
)


def train(recipe: str, dataset: str, flags: str, seed: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(REPOSITORY / "scripts" / "train.py")]
        command += ["--config", str(REPOSITORY / "scripts" / "recipes" / RECIPES[recipe]), "--dataset", dataset]
        command += ["--num-codebook-heads", "1", "--seed", str(seed), "--output-dir", folder, "--report-to", "none"]
        command += ["--images-every", "0", *shlex.split(flags)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=environment, check=True, capture_output=True)
        metrics = json.loads((Path(folder) / "metrics.json").read_text())
    result = {name: metrics[name] for name in ("mse", "psnr", "ssim", "codebook_usage", "perplexity")}
    return {"recipe": recipe, "seed": seed, **result}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", required=True, help="Hub id or folder of MNIST")
    parser.add_argument(
        "--photos", required=True, help="Hub id or folder of small colour images, splits train and test"
    )
    parser.add_argument("--output", default=REPOSITORY / "docs" / "recipe_comparison.json", type=Path)
    parser.add_argument("--parallel", default=2, type=int, help="Runs at a time")
    arguments = parser.parse_args()
    datasets = {"mnist": arguments.mnist, "photos": arguments.photos}
    with ThreadPoolExecutor(arguments.parallel) as pool:
        runs = {
            name: [pool.submit(train, recipe, datasets[recipe], flags, seed) for recipe in RECIPES for seed in seeds]
            for name, flags, seeds in VARIANTS
        }
        report = []
        for name, flags, _ in VARIANTS:
            report.append({"name": name, "flags": flags, "runs": [run.result() for run in runs[name]]})
            arguments.output.write_text(json.dumps(report, indent=1) + "\n")
            print(format_row(report[-1]), flush=True)


def format_row(variant: dict) -> str:
    """A line of the table in docs/training.md."""
    cells = [variant["name"]]
    for recipe in RECIPES:
        runs = [run for run in variant["runs"] if run["recipe"] == recipe]
        cells.append(", ".join(f"{run['mse']:.4f}" for run in runs))
        cells.append(", ".join(f"{run['codebook_usage']:.4g}" for run in runs))
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
