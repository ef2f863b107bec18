"""Comparisons in folders: every run is a file of its own, and what is missing is run, in one pool of processes."""

import functools
import hashlib
import json
import multiprocessing
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType

import torch
from tqdm.auto import tqdm

from ..data.arguments import DataArguments
from ..data.batches import evaluation_batches
from ..image_processing_optvq import OptVQImageProcessor
from ..parsing import parse_json
from ..training.checkpoints import write_whole
from ..training.lock import locked
from .arguments import ComparisonArguments
from .comparison import Images, RunSettings, run, split_images
from .comparison_report import IMAGES_FILE, RUNS_FOLDER, best_rates, read_runs, write_comparison
from .pictures import save_strip
from .rivals import find_rival


SETTINGS_FILE = "comparison.json"
# Settings that all runs of a comparison share.
OF_ALL = (
    *("max_steps", "batch_size", "codebook_size", "codebook_dim"),
    *("backbone", "latent_scale", "latent_shift"),
)
# What may differ when a comparison is continued.
MAY_CHANGE = ("rivals", "learning_rates", "seeds", "confirm_seeds", "parallel", "output_dir")
OF_DATA = ("dataset", "dataset_config", "data_dir", "image_column", "train_split", "eval_split")


class Comparison:
    """Rivals over a grid of learning rates on one dataset, in a folder.

    Args:
        copies: Folders with local copies of datasets, by Hub id.

    Raises:
        ValueError: For a rival, size or setting that cannot be, or a share of the training split held out for evaluation.
        ImportError: If a library is missing.
    """

    def __init__(
        self, arguments: ComparisonArguments, data: DataArguments, copies: Mapping[str, str] = MappingProxyType({})
    ):
        assert arguments.output_dir is not None  # the parser has checked this
        if data.eval_fraction:
            raise ValueError("compare holds out images of the training split by itself: leave --eval-fraction out")
        self.arguments, self.data, self.folder, self._copies = arguments, data, Path(arguments.output_dir), copies
        for name in arguments.rivals:
            try:
                find_rival(name).make(arguments.codebook_size, arguments.codebook_dim)
            except TypeError as error:
                raise ValueError(f"rival {name!r}: {error}") from error

    def prepare(self) -> None:
        """Notes the settings in the folder, and decodes and resizes all images once.

        Raises:
            ValueError: If the folder holds a comparison with other settings.
        """
        self._check_settings()
        (self.folder / RUNS_FOLDER).mkdir(exist_ok=True)
        path = self.folder / IMAGES_FILE
        if not path.is_file():
            unfinished = path.with_suffix(".unfinished")
            self._read_images().save(unfinished)
            unfinished.replace(path)
        self._note_images(path)

    def search(self) -> list[RunSettings]:
        """Runs of every rival at every learning rate."""
        arguments = self.arguments
        return [
            self._settings(rival, rate, seed)
            for seed in arguments.seeds
            for rate in arguments.learning_rates
            for rival in arguments.rivals
        ]

    def confirmation(self) -> list[RunSettings]:
        """Runs of every rival at its best learning rate alone, with further seeds."""
        best = best_rates(read_runs(self.folder / RUNS_FOLDER, self.search())) if self.arguments.confirm_seeds else {}
        return [self._settings(rival, best[rival], seed) for seed in self.arguments.confirm_seeds for rival in best]

    def report(self) -> str:
        """Writes results, tables and figures to the folder, and returns the tables.

        Raises:
            ValueError: If every run diverged.
        """
        runs = read_runs(self.folder / RUNS_FOLDER, [*self.search(), *self.confirmation()])
        settings = parse_json((self.folder / SETTINGS_FILE).read_text())
        return write_comparison(self.folder, runs, self.arguments.rivals, settings)

    def _settings(self, rival: str, rate: float, seed: int) -> RunSettings:
        return RunSettings(rival, rate, seed, **{name: getattr(self.arguments, name) for name in OF_ALL})

    def _check_settings(self) -> None:
        settings = {name: value for name, value in asdict(self.arguments).items() if name not in MAY_CHANGE}
        settings |= {name: getattr(self.data, name) for name in OF_DATA}
        for name in ("dataset", "first_dataset"):
            if settings[name] and Path(settings[name]).exists():  # results go to others, to whom the path says nothing
                settings[name] = Path(settings[name]).resolve().name
        path = self.folder / SETTINGS_FILE
        if not path.is_file():
            write_whole(path, json.dumps(settings, indent=2) + "\n")
            return
        earlier = parse_json(path.read_text())
        for name, value in settings.items():
            if earlier.get(name) != value:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(
                    f"{self.folder} holds a comparison with {flag} {earlier.get(name)}, not {value}: "
                    "choose another --output-dir"
                )

    def _note_images(self, path: Path) -> None:
        """Adds number and digest of the images to the settings, so that whoever repeats the comparison can check his."""
        settings_path = self.folder / SETTINGS_FILE
        settings, images = parse_json(settings_path.read_text()), Images.load(path, torch.device("cpu"))
        if "images" not in settings:
            parts = {name: part for name, part in vars(images).items() if part is not None}
            settings["images"] = {name: len(part) for name, part in parts.items()}
            settings["images_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
            write_whole(settings_path, json.dumps(settings, indent=2) + "\n")

    def _read_images(self) -> Images:
        arguments, data, size = self.arguments, self.data, self.arguments.image_size
        processor = OptVQImageProcessor(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}, num_channels=arguments.num_channels
        )

        def read(of_data: DataArguments, name: str, max_images: int | None) -> torch.Tensor:
            assert of_data.dataset is not None  # the parser has checked this
            of_data = replace(of_data, dataset=self._copies.get(of_data.dataset, of_data.dataset))
            batches = evaluation_batches(of_data, processor, 256, max_images)
            pixels = [((x + 1) * 127.5).round().to(torch.uint8) for x in tqdm(batches, desc=name, unit="batch")]
            return torch.cat(pixels)

        of_training = replace(data, eval_split=data.train_split)
        train = read(of_training, "training images", arguments.max_images)
        first = None
        if arguments.first_dataset:
            of_first = replace(of_training, dataset=arguments.first_dataset)
            first = read(of_first, "images of the first half", arguments.max_images)
        return split_images(train, read(data, "test images", None), first)


def run_comparisons(comparisons: Sequence[Comparison], parallel: int) -> None:
    """Runs what is missing in the folders of all comparisons, `parallel` runs at a time.

    Raises:
        ValueError: If a folder holds a comparison with other settings, or runs failed, after all others.
        OSError: If a folder cannot be written to, or another comparison runs in it.
    """
    with ExitStack() as stack:
        for comparison in comparisons:
            stack.enter_context(locked(comparison.folder))
            comparison.prepare()
        for stage in (Comparison.search, Comparison.confirmation):
            _run_missing(
                [(comparison.folder, settings) for comparison in comparisons for settings in stage(comparison)],
                parallel,
            )


def _run_missing(runs: list[tuple[Path, RunSettings]], parallel: int) -> None:
    missing = [(folder, settings) for folder, settings in runs if not _result_path(folder, settings).is_file()]
    if not missing:
        return
    threads = max(1, (os.cpu_count() or 1) // parallel)
    with (
        ProcessPoolExecutor(parallel, multiprocessing.get_context("spawn"), _start_process, (threads,)) as pool,
        tqdm(total=len(missing), desc="runs", unit="run") as progress,
    ):
        futures, failed = [pool.submit(_run, *pair) for pair in missing], []
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
    result, reconstructions = run(settings, _images(folder / IMAGES_FILE))
    save_strip(reconstructions, path.with_suffix(".png"))
    write_whole(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    mse = result["test"]["mse"]
    return f"{settings.name}: " + (f"MSE {mse:.4f}" if mse is not None else "diverged")


@functools.lru_cache(maxsize=4)
def _images(path: Path) -> Images:
    """The images, read once by each process."""
    return Images.load(path, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
