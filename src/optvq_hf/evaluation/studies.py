"""Comparisons in folders: every run is a file of its own, and what is missing is run, in one pool of processes."""

import functools
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from tqdm.auto import tqdm

from ..data.arguments import DataArguments
from ..data.batches import evaluation_batches
from ..image_processing_optvq import OptVQImageProcessor
from ..parsing import parse_json
from ..training.checkpoints import write_whole
from ..training.lock import locked
from .arguments import ComparisonArguments
from .comparison import OF_ALL, Images, RunSettings, run, split_images
from .comparison_report import IMAGES_FILE, RUNS_FOLDER, best_rates, read_runs, write_comparison
from .pictures import save_strip
from .rivals import RIVALS, make_rival


SETTINGS_FILE = "comparison.json"
# What may differ when a comparison is continued.
MAY_CHANGE = ("rivals", "learning_rates", "seeds", "confirm_seeds", "parallel", "output_dir")
OF_DATA = ("dataset", "dataset_config", "data_dir", "image_column", "train_split", "eval_split", "max_unreadable")
# Flags of the data that mean nothing here: validation images are held out of the training split, and none is augmented.
OF_TRAINING = ("eval_fraction", "eval_fraction_seed", "shuffle_buffer", "random_crop", "random_flip")


class Comparison:
    """Rivals over a grid of learning rates on one dataset, in a folder.

    Args:
        copies: Folders with local copies of datasets, by Hub id.

    Raises:
        ValueError: For a rival, size or setting that cannot be, or a flag that has no effect here.
        ImportError: If a library is missing.
    """

    def __init__(
        self, arguments: ComparisonArguments, data: DataArguments, copies: Mapping[str, str] = MappingProxyType({})
    ):
        assert arguments.output_dir is not None  # the parser has checked this
        for field in fields(data):
            if field.name in OF_TRAINING and getattr(data, field.name) != field.default:
                flag = f"--{field.name.replace('_', '-')}"
                raise ValueError(f"{flag} has no effect on a comparison, leave it out (see docs/comparison.md)")
        self.arguments, self.data, self.folder, self._copies = arguments, data, Path(arguments.output_dir), copies
        self.rivals = arguments.rivals or list(RIVALS)
        for name in self.rivals:
            make_rival(name, arguments.codebook_size, arguments.codebook_dim)

    def prepare(self) -> None:
        """Decodes and resizes all images once, and notes them and the settings in the folder.

        Raises:
            ValueError: If the folder holds a comparison with other settings or of other images.
        """
        path, unfinished = self.folder / IMAGES_FILE, self.folder / f"{IMAGES_FILE}.unfinished"
        settings, earlier = self._shared_settings(), self._noted() if self._settings_path.is_file() else None
        if earlier is not None:
            self._check_same(earlier, settings)
        (self.folder / RUNS_FOLDER).mkdir(exist_ok=True)
        if earlier is None or not path.is_file():
            images, unreadable = self._read_images()
            digests = images.digests
            of_images = {
                "images": {name: len(part) for name, part in images.parts.items()},
                "unreadable": unreadable,
                "images_sha256": digests,
            }
            if earlier is not None and earlier.get("images_sha256") != digests:
                raise ValueError(
                    f"{self.folder} holds a comparison of other images than those of --dataset {self.data.dataset} now, by "
                    "their SHA-256: choose another --output-dir"
                )
            images.save(unfinished)
            # Settings before images: images without settings could be any, and are read again.
            write_whole(self._settings_path, json.dumps(settings | of_images, indent=2) + "\n")
            unfinished.replace(path)
        self._runs()

    def search(self) -> list[RunSettings]:
        """Runs of every rival at every learning rate."""
        arguments = self.arguments
        return [
            self._settings(rival, rate, seed)
            for seed in arguments.seeds
            for rate in arguments.learning_rates
            for rival in self.rivals
        ]

    def confirmation(self) -> list[RunSettings]:
        """Runs of every rival at its best learning rate so far, with further seeds."""
        best = best_rates(self._runs()) if self.arguments.confirm_seeds else {}
        return [
            self._settings(rival, best[rival], seed)
            for seed in self.arguments.confirm_seeds
            for rival in self.rivals
            if rival in best
        ]

    def report(self) -> str:
        """Writes results, tables and figures of all runs in the folder, and returns the tables and where the files are."""
        tables, folder = write_comparison(self.folder, self._runs(), self.rivals, self._noted()), self.folder
        files = (
            f"results    {folder / 'results.json'}, results.md\npictures   {folder / 'rates.png'}, reconstructions.png"
        )
        return f"{tables}\n\n{files}"

    @property
    def _settings_path(self) -> Path:
        return self.folder / SETTINGS_FILE

    def _noted(self) -> dict[str, Any]:
        return parse_json(self._settings_path.read_text())

    def _runs(self) -> list[dict[str, Any]]:
        return read_runs(self.folder / RUNS_FOLDER, self._noted())

    def _settings(self, rival: str, rate: float, seed: int) -> RunSettings:
        return RunSettings(rival, rate, seed, **{name: getattr(self.arguments, name) for name in OF_ALL})

    def _shared_settings(self) -> dict[str, Any]:
        """What all runs of the folder have in common, beside the images themselves."""
        settings = {name: value for name, value in asdict(self.arguments).items() if name not in MAY_CHANGE}
        settings |= {name: getattr(self.data, name) for name in OF_DATA}
        for name in ("dataset", "first_dataset"):
            if settings[name] and Path(settings[name]).exists():  # results go to others, to whom the path says nothing
                settings[name] = Path(settings[name]).resolve().name
        return settings

    def _check_same(self, earlier: dict[str, Any], settings: dict[str, Any]) -> None:
        for name, value in settings.items():
            if earlier.get(name) != value:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(
                    f"{self.folder} holds a comparison with {flag} {earlier.get(name)}, not {value}: "
                    "choose another --output-dir"
                )

    def _read_images(self) -> tuple[Images, dict[str, int]]:
        """The images, and how many of each split could not be read."""
        arguments, data, size = self.arguments, self.data, self.arguments.image_size
        processor = OptVQImageProcessor(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}, num_channels=arguments.num_channels
        )

        unreadable = {}

        def read(of_data: DataArguments, name: str, max_images: int | None) -> torch.Tensor:
            assert of_data.dataset is not None  # the parser has checked this
            of_data = replace(of_data, dataset=self._copies.get(of_data.dataset, of_data.dataset))
            batches = evaluation_batches(of_data, processor, 256, max_images)
            pixels = [((x + 1) * 127.5).round().to(torch.uint8) for x in tqdm(batches, desc=name, unit="batch")]
            unreadable[name] = batches.num_unreadable
            return torch.cat(pixels)

        of_training = replace(data, eval_split=data.train_split)
        train = read(of_training, "training images", arguments.max_images)
        first = None
        if arguments.first_dataset:
            of_first = replace(of_training, dataset=arguments.first_dataset)
            first = read(of_first, "images of the first half", arguments.max_images)
        return split_images(train, read(data, "test images", None), first), unreadable


def run_comparisons(comparisons: Sequence[Comparison], parallel: int, show: Callable[[str], None] = print) -> None:
    """Runs what is missing in the folders of all comparisons, `parallel` runs at a time, and shows their reports.

    Raises:
        ValueError: If a folder holds a comparison with other settings or of other images; after all others and the reports, if
            runs failed.
        OSError: If a folder cannot be written to, or another comparison runs in it.
    """
    failed = []
    with ExitStack() as stack:
        for comparison in comparisons:
            stack.enter_context(locked(comparison.folder))
            comparison.prepare()
        failed += _run_all(_missing(comparisons, Comparison.search), parallel)
        tried: set[tuple[Path, RunSettings]] = set()
        # Further seeds may change which rate is the best, which then gets its further seeds.
        while missing := [pair for pair in _missing(comparisons, Comparison.confirmation) if pair not in tried]:
            failed += _run_all(missing, parallel)
            tried.update(missing)
        for comparison in comparisons:
            show(f"\n{comparison.report()}")
    if failed:
        raise ValueError(f"{len(failed)} runs failed, the first by {failed[0]}") from failed[0]


def _missing(
    comparisons: Sequence[Comparison], stage: Callable[[Comparison], list[RunSettings]]
) -> list[tuple[Path, RunSettings]]:
    """Folders and settings of the runs of a stage that have no result."""
    runs = [(comparison.folder, settings) for comparison in comparisons for settings in stage(comparison)]
    return [(folder, settings) for folder, settings in runs if not _result_path(folder, settings).is_file()]


def _run_all(missing: list[tuple[Path, RunSettings]], parallel: int) -> list[Exception]:
    """Returns what the runs that failed have raised."""
    failed: list[Exception] = []
    if not missing:
        return failed
    threads = max(1, (os.cpu_count() or 1) // parallel)
    with (
        ProcessPoolExecutor(parallel, multiprocessing.get_context("spawn"), _start_process, (threads,)) as pool,
        tqdm(total=len(missing), desc="runs", unit="run") as progress,
    ):
        futures = [pool.submit(_run, *pair) for pair in missing]
        try:
            for future in as_completed(futures):
                try:
                    progress.set_postfix_str(future.result())
                except Exception as error:  # the other runs are not its fault
                    failed.append(error)
                progress.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def _start_process(threads: int) -> None:
    """In a process of the pool, which ends when the command does, also when that is killed."""
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # we were started by the pool
    parent.join()
    os._exit(1)


def _result_path(folder: Path, settings: RunSettings) -> Path:
    return folder / RUNS_FOLDER / f"{settings.name}.json"


def _run(folder: Path, settings: RunSettings) -> str:
    """One run, in a process of the pool; writes its files."""
    path = _result_path(folder, settings)
    try:
        result, reconstructions = run(settings, _images(folder / IMAGES_FILE))
        result["images_sha256"] = parse_json((folder / SETTINGS_FILE).read_text())["images_sha256"]
        save_strip(reconstructions, path.with_suffix(".png"))
        write_whole(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
    except Exception as error:
        raise RuntimeError(f"{settings.name}: {error or type(error).__name__}") from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    mse = result["test"]["mse"]
    return f"{settings.name}: " + (f"MSE {mse:.4f}" if mse is not None else "diverged")


@functools.lru_cache(maxsize=4)
def _images(path: Path) -> Images:
    """The images, read once by each process."""
    return Images.load(path, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
