"""Measures `optvq ids`: collisions and memory beside residual k-means and residual nearest codes, and that bytes do not change.

    python scripts/benchmark_ids.py --output-dir runs/benchmark_ids

Makes embeddings with clusters of very different sizes and widths. Gives ids by the command as users run it: to the rows in
order and shuffled, in one process and in two. Then trains the rivals on the same embeddings: residual k-means (scikit-learn's
MiniBatchKMeans, level by level), and this package's quantizer with nearest codes instead of transport in training, from the
same first codes. Writes ids_benchmark.json into the output folder.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path


# Appended, because in first position scripts/evaluate.py would hide the library of that name.
sys.path.append(str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402
from sklearn.cluster import MiniBatchKMeans  # noqa: E402

from optvq_hf.item_ids.embeddings import Embeddings  # noqa: E402
from optvq_hf.item_ids.job import assign  # noqa: E402
from optvq_hf.item_ids.report import collisions_of, of_levels  # noqa: E402
from optvq_hf.item_ids.training import train_quantizer  # noqa: E402
from optvq_hf.item_ids.unique import Ids  # noqa: E402


# What must not depend on the order of the rows, nor on the number of processes.
COMPARED = ("ids.parquet", "report.json", "model.safetensors", "config.json")
COMMAND = """
import sys
from pathlib import Path
from optvq_hf.commands.ids import main
main(sys.argv[1:])
peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
print("peak", 1024 * int(peak), flush=True)
"""


def make_embeddings(items: int, dim: int, clusters: int, seed: int) -> np.ndarray:
    """(items, dim) float32: cluster n has a share of 1 / n of the items; widths are log-normal, later axes are shorter."""
    random = np.random.default_rng(seed)
    shares = 1 / np.arange(1, clusters + 1)
    lengths = np.arange(1, dim + 1) ** -0.5
    centres = random.standard_normal((clusters, dim)) * lengths
    widths = 0.5 * random.lognormal(0, 0.5, clusters)
    chosen = random.choice(clusters, items, p=shares / shares.sum())
    noise = random.standard_normal((items, dim)) * lengths
    return (centres[chosen] + widths[chosen, None] * noise).astype(np.float32)


def write_rows(embeddings: np.ndarray, order: np.ndarray, path: Path) -> None:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeddings[order].ravel()), embeddings.shape[1])
    pq.write_table(pa.table({"item": [f"item {number:09}" for number in order], "embedding": vectors}), path)


def give_ids(rows: Path, out: Path, flags: list[str], processes: int = 1) -> dict:
    """Runs the command; its seconds, and the peak memory of its largest process in bytes."""
    words = [
        "--dataset",
        str(rows),
        "--embedding-column",
        "embedding",
        "--key-column",
        "item",
        "--output-dir",
        str(out),
    ]
    script = out.with_suffix(".py")
    script.write_text(COMMAND)
    start = [sys.executable, str(script)]
    if processes > 1:
        start = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(processes),
            str(script),
        ]
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1] / "src"), os.environ.get("PYTHONPATH", "")])
    began = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([*start, *words, *flags], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    peaks = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak ")]
    return {"seconds": time.perf_counter() - began, "peak_memory": max(peaks)}


def summary(codes: np.ndarray, codebook_size: int, error: float) -> dict:
    collisions = collisions_of(Ids.of_levels(codes))
    return {
        "different ids": collisions["distinct_ids"],
        "colliding items": collisions["colliding_items"],
        "largest group": max(collisions["largest_groups"], default=1),
        "usage": [level["usage"] for level in of_levels(codes, [codebook_size] * codes.shape[1])],
        "share of variance lost": error,
    }


def k_means(embeddings: np.ndarray, levels: int, codebook_size: int, seed: int) -> dict:
    rest, codes = embeddings.copy(), []
    for _ in range(levels):
        clusters = MiniBatchKMeans(codebook_size, random_state=seed, n_init=1, batch_size=4096).fit(rest)
        codes.append(clusters.predict(rest))
        rest -= clusters.cluster_centers_[codes[-1]]
    lost = np.square(rest, dtype=np.float64).sum() / np.square(embeddings - embeddings.mean(0), dtype=np.float64).sum()
    return summary(np.stack(codes, axis=1), codebook_size, float(lost))


def nearest_codes(embeddings: Embeddings, settings: dict) -> dict:
    device = torch.device("cpu")
    quantizer = train_quantizer(embeddings, **settings, device=device, assignment="nearest")
    assigned = assign(quantizer, embeddings, device)
    return summary(assigned.codes, settings["codebook_size"], float(assigned.errors[-1]) / assigned.variance)


def table(results: dict) -> str:
    """The methods of results in Markdown."""
    lines = [
        "| | different ids | items that share one | largest group | usage, % | variance lost, % |",
        "| - " * 6 + "|",
    ]
    for name, row in results["methods"].items():
        usage = " / ".join(f"{value:.1f}" for value in row["usage"])
        counts = " | ".join(f"{row[key]:,}" for key in ("different ids", "colliding items", "largest group"))
        lines.append(f"| {name} | {counts} | {usage} | {100 * row['share of variance lost']:.1f} |")
    return "\n".join(lines)


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (("items", 200_000), ("dim", 128), ("clusters", 2000), ("levels", 3), ("codebook-size", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/benchmark_ids"))
    wanted = parser.parse_args(argv)
    out = wanted.output_dir
    out.mkdir(parents=True, exist_ok=True)

    vectors = make_embeddings(wanted.items, wanted.dim, wanted.clusters, wanted.seed)
    in_order = np.arange(wanted.items)
    write_rows(vectors, in_order, out / "in_order.parquet")
    write_rows(vectors, np.random.default_rng(1).permutation(wanted.items), out / "shuffled.parquet")
    settings = {"num_quantizers": wanted.levels, "codebook_size": wanted.codebook_size, "max_steps": wanted.max_steps}
    settings["seed"] = wanted.seed
    flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    ways = {"one process": ("in_order", 1), "shuffled rows": ("shuffled", 1), "two processes": ("in_order", 2)}
    runs = {}
    for number, (name, (rows, processes)) in enumerate(ways.items()):
        folder = out / f"ids-{number}"
        runs[name] = give_ids(out / f"{rows}.parquet", folder, [*flags, "--unique", "--overwrite"], processes)
        first = out / "ids-0"
        same = [file for file in COMPARED if (folder / file).read_bytes() == (first / file).read_bytes()]
        runs[name]["the same bytes as the first"] = same == list(COMPARED)

    report = json.loads((out / "ids-0" / "report.json").read_text())
    nearest, unique, error = *report["collisions"].values(), report["reconstruction_error"]
    ours = {
        "different ids": nearest["distinct_ids"],
        "colliding items": nearest["colliding_items"],
        "largest group": max(nearest["largest_groups"], default=1),
        "usage": [level["usage"] for level in report["levels"]],
        "share of variance lost": error["share_of_variance"][-1],
    }
    resolved = {
        "different ids": unique["distinct_ids"],
        "colliding items": unique["colliding_items"],
        "largest group": max(unique["largest_groups"], default=1),
        "usage": ours["usage"],
        "share of variance lost": error["share_of_variance_of_ids"],
    }
    vectors.tofile(out / "embeddings")
    embeddings = Embeddings(out / "embeddings", wanted.dim, in_order)
    settings = report["training"]
    results = {
        "settings": {name: value for name, value in vars(wanted).items() if name != "output_dir"},
        "methods": {
            "`optvq ids`": ours,
            "`optvq ids --unique`": resolved,
            "residual k-means": k_means(vectors, wanted.levels, wanted.codebook_size, wanted.seed),
            "residual nearest codes": nearest_codes(embeddings, settings),
        },
        "runs": runs,
        "items with a further code": report["items_with_a_further_code"],
    }
    (out / "embeddings").unlink()
    print(table(results))
    for name, run in runs.items():
        bytes_are = "the same bytes" if run["the same bytes as the first"] else "OTHER BYTES"
        print(f"{name}: {run['seconds']:.0f} s, peak memory {run['peak_memory'] / 1e9:.2f} GB, {bytes_are}")
    (out / "ids_benchmark.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
