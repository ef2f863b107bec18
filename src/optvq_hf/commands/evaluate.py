"""Measure reconstruction quality and codebook usage of tokenizers.

    optvq evaluate --model runs/mnist --dataset ylecun/mnist --assignment nearest potentials sinkhorn

Writes metrics.json and pictures; of several models also a table. Several processes share the batches, and rank 0 writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.arguments import DataArguments
from ..evaluation.arguments import EvaluationArguments
from ..evaluation.protocols import PROTOCOLS, check_images, is_frechet
from .cli import COMMANDS
from .errors import one_line_errors
from .folders import check_writable
from .parser import Parser
from .terminal import print_table


if TYPE_CHECKING:
    import torch

    from ..evaluation.evaluator import Processes
    from ..evaluation.tables import Row
    from ..image_processing_optvq import OptVQImageProcessor
    from ..modeling_optvq import OptVQModel


def make_parser() -> Parser:
    """Makes the parser of the command: flags of the evaluation and the data."""
    return Parser([EvaluationArguments, DataArguments], "evaluate", COMMANDS["evaluate"])


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `optvq evaluate`; a user's mistake ends the process with one line."""
    parser = make_parser()
    arguments, data = parser.parse(argv)
    if not arguments.model or not data.dataset:
        parser.error(f"--{'dataset' if arguments.model else 'model'} is missing")

    with one_line_errors("evaluate"):
        check_extras()
        from ..evaluation.evaluator import Processes
        from ..training.processes import start_together

        accelerator = start_together()
        processes = Processes(accelerator.process_index, accelerator.num_processes)
        if len(arguments.model) > 1 and arguments.output_dir:
            check_writable(Path(arguments.output_dir))  # the table of all
        # All are loaded and checked before the first is evaluated.
        prepared = {name: _load(of_model, data, processes) for name, of_model in by_model(arguments).items()}
        reports = {}
        for name in list(prepared):
            reports[name] = _evaluate(prepared.pop(name), accelerator.device, processes)
        if len(reports) > 1 and accelerator.is_main_process:
            report_all(reports, arguments)


def check_extras() -> None:
    """Raises ImportError, with the command that installs what is missing, before any work is done."""
    try:
        from ..evaluation import evaluator, report  # noqa: F401
    except ImportError as error:
        raise ImportError(f'{error.name} is not installed: run pip install "optvq_hf[train]"') from error


def by_model(arguments: EvaluationArguments) -> dict[str, EvaluationArguments]:
    """The arguments of each model alone, by a short name for it; of several, each has its own output folder.

    Raises:
        ValueError: If two models have the same folder, and no `output_dir` is given.
    """
    models = arguments.model or []
    short = [Path(model).resolve().name if Path(model).is_dir() else model for model in models]
    names = _distinct([name if short.count(name) == 1 else model for name, model in zip(short, models)])
    alone = [replace(arguments, model=[model]) for model in models]
    if arguments.output_dir is None:
        folders = [default_folder(of_model).resolve() for of_model in alone]
        for number, folder in enumerate(folders):
            if folder in folders[:number]:
                both = f"{models[folders.index(folder)]} and {models[number]}"
                raise ValueError(f"the results of {both} would lie in one folder, {folder}: pass --output-dir")
    elif len(models) > 1:
        folders = [name.strip("./").replace("/", "--") or file for name, file in zip(names, short)]
        folders = _distinct(folders, str.lower)  # some file systems do not tell A from a
        alone = [
            replace(of_model, output_dir=str(Path(arguments.output_dir) / folder))
            for of_model, folder in zip(alone, folders)
        ]
    return dict(zip(names, alone))


def _distinct(names: list[str], key: Callable[[str], str] = str) -> list[str]:
    """The names, with a number after those whose key one before has: a, a-2."""
    distinct: dict[str, str] = {}
    for name in names:
        candidates = [name, *(f"{name}-{number}" for number in range(2, len(names) + 1))]
        first = next(candidate for candidate in candidates if key(candidate) not in distinct)
        distinct[key(first)] = first
    return list(distinct.values())


def default_folder(arguments: EvaluationArguments) -> Path:
    """The model's own folder; for a Hub id one that no other id, revision or training run has."""
    assert arguments.model is not None
    [model] = arguments.model
    if Path(model).is_dir():
        return Path(model)
    parts = (model, arguments.model_revision)
    return Path("runs") / "--".join(part.replace("/", "--") for part in parts if part)


def report_all(reports: dict[str, dict], arguments: EvaluationArguments) -> None:
    """Prints the table of several models, and writes it to the output folder, if there is one, in three formats."""
    from ..evaluation.report import write_tables
    from ..evaluation.tables import rows_of

    rows = [row for name, report in reports.items() for row in rows_of(report, name)]
    metrics = metrics_of(arguments)
    print()
    show_table(rows, metrics, arguments.table)
    if len({report["images_sha256"] for report in reports.values()}) > 1:
        print("\nthe models got different pixels, as their image processors differ: compare their errors with care")
    if arguments.output_dir:
        write_tables(rows, metrics, Path(arguments.output_dir))
        print(f"\ntable      {Path(arguments.output_dir) / 'table.txt'}, table.md, table.tex")


def show_table(rows: Sequence[Row], metrics: Sequence[str], style: str) -> None:
    """Prints the table of an evaluation; Markdown and LaTeX, which are to be copied, as they are."""
    from ..evaluation.tables import cells_of, format_table

    text = format_table(rows, metrics, style)
    if style == "text":
        print_table(*cells_of(rows, metrics), plain=text)
    else:
        print(text)


def metrics_of(arguments: EvaluationArguments) -> tuple[str, ...]:
    """Names of the metrics that were asked for: those of the protocol, unless they are named."""
    return tuple(arguments.metrics or PROTOCOLS[arguments.protocol].metrics)


@dataclass
class _Prepared:
    """A model with all that its evaluation needs, checked."""

    model: OptVQModel
    image_processor: OptVQImageProcessor
    batches: Iterable[torch.Tensor]
    arguments: EvaluationArguments
    data: DataArguments
    assignments: list[str]
    metrics: tuple[str, ...]
    folder: Path
    settings: dict
    earlier: dict


def _load(arguments: EvaluationArguments, data: DataArguments, processes: Processes) -> _Prepared:
    from ..data.batches import evaluation_batches
    from ..training.models import load_model

    assert arguments.model is not None
    model, image_processor = load_model(arguments.model[0], revision=arguments.model_revision)
    model.quantizer.solver = arguments.solver
    share = (processes.index, processes.count)
    batches = evaluation_batches(data, image_processor, arguments.batch_size, arguments.max_images, *share)
    return _prepare(model, image_processor, batches, arguments, data)


def evaluate_and_report(
    model: OptVQModel,
    image_processor: OptVQImageProcessor,
    batches: Iterable[torch.Tensor],
    arguments: EvaluationArguments,
    data: DataArguments,
) -> dict:
    """Evaluates a model where it is, prints and then writes the report, and returns the content of metrics.json.

    The report goes to `arguments.output_dir`; by default to the folder of the model, or to runs/OWNER--NAME for a Hub id.

    Raises:
        ValueError: If a metric is not of such images, or the report would say less than an earlier one, or replace one of other
            weights or images, without `--overwrite`.
        OSError: If it cannot be written.
    """
    from ..evaluation.evaluator import Processes

    return _evaluate(_prepare(model, image_processor, batches, arguments, data), model.device, Processes())


def _prepare(
    model: OptVQModel,
    image_processor: OptVQImageProcessor,
    batches: Iterable[torch.Tensor],
    arguments: EvaluationArguments,
    data: DataArguments,
) -> _Prepared:
    """Checks all that can be checked before the work."""
    from ..data.batches import EvaluationBatches
    from ..evaluation.results import check_loses_nothing, read_result

    metrics = metrics_of(arguments)
    assignments = arguments.assignment or [
        PROTOCOLS[arguments.protocol].assignment or model.config.inference_assignment
    ]
    model.check_tile_size(arguments.tile_size)
    folder = Path(arguments.output_dir) if arguments.output_dir else default_folder(arguments)
    check_writable(folder)
    most = (batches.num_expected if isinstance(batches, EvaluationBatches) else 0) or arguments.max_images
    if most == 1 and any(map(is_frechet, metrics)):
        raise ValueError("a Frechet distance needs at least 2 images, got 1: name other metrics in --metrics")
    if image_processor.do_center_crop:
        check_images(metrics, image_processor.num_channels, **dict(image_processor.crop_size))
    settings = _settings(model, image_processor, arguments, data)
    earlier = {} if arguments.overwrite else read_result(folder)
    check_loses_nothing(earlier, settings, most or float("inf"), assignments, metrics, folder)
    return _Prepared(model, image_processor, batches, arguments, data, assignments, metrics, folder, settings, earlier)


def _evaluate(prepared: _Prepared, device: torch.device, processes: Processes) -> dict:
    """Evaluates and reports; of several processes, only the first reports, and the others get an empty dict."""
    from ..data.batches import EvaluationBatches
    from ..evaluation.evaluator import evaluate_model
    from ..evaluation.report import make_report, write_report
    from ..evaluation.results import check_loses_nothing
    from ..evaluation.tables import rows_of

    batches, assignments, metrics = prepared.batches, prepared.assignments, prepared.metrics
    tile_size = prepared.arguments.tile_size
    model = prepared.model.to(device)  # pyright: ignore[reportArgumentType]  # its decorator hides self
    evaluations = evaluate_model(model, batches, assignments, metrics=metrics, processes=processes, tile_size=tile_size)
    if processes.index > 0:
        return {}
    is_counted = isinstance(batches, EvaluationBatches)
    counts = {"num_unreadable": batches.num_unreadable} if is_counted else {}
    report, folder = make_report(evaluations, {**prepared.settings, **counts}), prepared.folder
    print(f"\n{prepared.data.dataset}, split {prepared.data.evaluated_split}: {report['num_images']:,} images\n")
    if is_counted and batches.report:
        print(f"{batches.report}\n")
    show_table(rows_of(report), metrics, prepared.arguments.table)
    check_loses_nothing(prepared.earlier, report, report["num_images"], assignments, metrics, folder)
    write_report(report, evaluations[assignments[0]], prepared.image_processor, folder)
    print(f"\nmetrics    {folder / 'metrics.json'}")
    print(f"pictures   {folder / 'reconstructions.png'}, examples.png, codebook_usage.png")
    return report


def _settings(
    model: OptVQModel, image_processor: OptVQImageProcessor, arguments: EvaluationArguments, data: DataArguments
) -> dict:
    """The entries of metrics.json that say which model was evaluated, on which images, and how."""
    from ..data.loading import hub_id
    from ..training.digests import DIGEST, weights_digest

    assert arguments.model is not None and data.dataset is not None  # the parser has checked this
    settings = {
        "model": arguments.model[0],
        **({"model_revision": arguments.model_revision} if arguments.model_revision else {}),
        DIGEST: weights_digest(model),
        "dataset": data.dataset,
        "dataset_id": hub_id(data.dataset),
        "split": data.evaluated_split,
        "protocol": arguments.protocol,
        "image_size": list(dict(image_processor.crop_size).values()),
        "batch_size": arguments.batch_size,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    if data.eval_fraction:
        names = ("train_split", "eval_fraction", "eval_fraction_seed")
        settings |= {name: getattr(data, name) for name in names}
    limits = {
        "max_images": arguments.max_images,
        "tile_size": arguments.tile_size,
        "dataset_config": data.dataset_config,
        "data_dir": data.data_dir,
    }
    settings |= {name: value for name, value in {**limits, "image_column": data.image_column}.items() if value}
    if arguments.max_images:
        settings["sample"] = "first" if data.streaming else "random"
    return settings


if __name__ == "__main__":
    main()
