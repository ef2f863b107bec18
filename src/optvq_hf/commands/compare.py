"""Command line `optvq compare`: rivals under equal conditions, each over a grid of learning rates.

    optvq compare --dataset ylecun/mnist --num-channels 1 --output-dir runs/compare_mnist --confirm-seeds 1 2

Every run is a file of its own, `runs/NAME.json`, written as a whole: the same command started again runs what is missing. The
best learning rate of each rival is chosen on images held out from the training split; results are of the test split.
"""

import functools
import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..data.arguments import DataArguments
from ..evaluation.arguments import ComparisonArguments
from .cli import COMMANDS
from .errors import one_line_errors
from .folders import check_writable
from .parser import Parser


IMAGES_FILE, SETTINGS_FILE, RUNS_FOLDER = "images.safetensors", "comparison.json", "runs"
# What may differ when a comparison is continued.
MAY_CHANGE = ("rivals", "learning_rates", "seeds", "confirm_seeds", "parallel", "output_dir")


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
        ValueError: If the folder holds a comparison with other settings.
        ImportError: If a library is missing.
        OSError: If the folder cannot be written to, or another comparison runs in it.
    """
    from ..evaluation.comparison import RunSettings
    from ..evaluation.comparison_report import best_rates, read_runs, write_comparison
    from ..evaluation.rivals import RIVALS
    from ..training.lock import locked

    assert arguments.output_dir is not None  # the parser has checked this
    folder = Path(arguments.output_dir)
    check_writable(folder)
    for name in arguments.rivals:
        RIVALS[name].make(arguments.codebook_size, arguments.codebook_dim)  # a missing library, or a size that it lacks
    of_all = {name: getattr(arguments, name) for name in ("max_steps", "batch_size", "codebook_size", "codebook_dim")}

    def settings_of(rates: dict[str, list[float]], seeds: list[int]) -> list[RunSettings]:
        pairs = [(seed, place) for seed in seeds for place in range(len(arguments.learning_rates))]
        return [
            RunSettings(rival, rates[rival][place], seed, **of_all)
            for seed, place in pairs
            for rival in arguments.rivals
            if place < len(rates[rival])
        ]

    with locked(folder):
        _check_settings(folder, arguments, data)
        (folder / RUNS_FOLDER).mkdir(exist_ok=True)
        _prepare_images(folder, arguments, data)
        search = settings_of(dict.fromkeys(arguments.rivals, arguments.learning_rates), arguments.seeds)
        _run_missing(folder, search, arguments.parallel)
        if arguments.confirm_seeds:
            best = best_rates(read_runs(folder / RUNS_FOLDER, search))
            confirmed = {rival: [best[rival]] if rival in best else [] for rival in arguments.rivals}
            _run_missing(folder, settings_of(confirmed, arguments.confirm_seeds), arguments.parallel)
        print(write_comparison(folder, folder / RUNS_FOLDER, folder / IMAGES_FILE, arguments.rivals))
    print(f"\nresults    {folder / 'results.json'}, results.md\npictures   {folder / 'rates.png'}, reconstructions.png")


def _check_settings(folder: Path, arguments: ComparisonArguments, data: DataArguments) -> None:
    """Notes the settings in the folder, or compares them with those that are there."""
    from ..parsing import parse_json
    from ..training.checkpoints import write_whole

    settings = {name: value for name, value in asdict(arguments).items() if name not in MAY_CHANGE}
    names = ("dataset", "dataset_config", "data_dir", "image_column", "train_split", "eval_split")
    settings |= {name: getattr(data, name) for name in (*names, "eval_fraction", "eval_fraction_seed")}
    path = folder / SETTINGS_FILE
    if path.is_file():
        earlier = parse_json(path.read_text())
        for name, value in settings.items():
            if earlier.get(name) != value:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(
                    f"{folder} holds a comparison with {flag} {earlier.get(name)}, not {value}: choose another --output-dir"
                )
    else:
        write_whole(path, json.dumps(settings, indent=2) + "\n")


def _prepare_images(folder: Path, arguments: ComparisonArguments, data: DataArguments) -> None:
    """Decodes and resizes all images once."""
    import torch
    from tqdm.auto import tqdm

    from ..data.batches import evaluation_batches
    from ..evaluation.comparison import split_images
    from ..image_processing_optvq import OptVQImageProcessor

    path = folder / IMAGES_FILE
    if path.is_file():
        return
    size = arguments.image_size
    processor = OptVQImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, num_channels=arguments.num_channels
    )

    def read(of_data: DataArguments, name: str, max_images: int | None) -> Any:
        batches = evaluation_batches(of_data, processor, 256, max_images)
        return torch.cat([((x + 1) * 127.5).round().to(torch.uint8) for x in tqdm(batches, desc=name, unit="batch")])

    if data.eval_fraction:
        raise ValueError("compare holds out images of the training split by itself: leave --eval-fraction out")
    train = read(replace(data, eval_split=data.train_split), "training images", arguments.max_images)
    unfinished = path.with_suffix(".unfinished")
    split_images(train, read(data, "test images", None)).save(unfinished)
    unfinished.replace(path)


def _run_missing(folder: Path, runs: list[Any], parallel: int) -> None:
    """Raises ValueError in the end if some failed."""
    from tqdm.auto import tqdm

    missing = [settings for settings in runs if not (folder / RUNS_FOLDER / f"{settings.name}.json").is_file()]
    if not missing:
        return
    threads = max(1, (os.cpu_count() or 1) // parallel)
    with (
        ProcessPoolExecutor(parallel, multiprocessing.get_context("spawn"), _limit_threads, (threads,)) as pool,
        tqdm(total=len(missing), desc="runs", unit="run") as progress,
    ):
        futures, failed = [pool.submit(_run, folder, settings) for settings in missing], []
        try:
            for future in as_completed(futures):
                try:
                    progress.set_postfix_str(future.result())
                except (ValueError, OSError, RuntimeError) as error:  # the other runs are not its fault
                    failed.append(error)
                progress.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if failed:
        raise ValueError(f"{len(failed)} of {len(missing)} runs failed, the first by {failed[0]}") from failed[0]


def _limit_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _run(folder: Path, settings: Any) -> str:
    """One run, in a process of the pool; writes its files."""
    import torch

    from ..evaluation.comparison import run
    from ..evaluation.pictures import save_strip
    from ..training.checkpoints import write_whole

    result, reconstructions = run(settings, _images(folder / IMAGES_FILE))
    save_strip(reconstructions, folder / RUNS_FOLDER / f"{settings.name}.png")
    write_whole(folder / RUNS_FOLDER / f"{settings.name}.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    mse = result["test"]["mse"]
    return f"{settings.name}: " + (f"MSE {mse:.4f}" if mse is not None else "diverged")


@functools.cache
def _images(path: Path) -> Any:
    """The images, read once by each process."""
    import torch

    from ..evaluation.comparison import Images

    return Images.load(path, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    main()
