"""Measure reconstruction quality and codebook usage of a tokenizer.

    optvq evaluate --model runs/mnist --dataset ylecun/mnist --assignment nearest potentials sinkhorn

Writes metrics.json, reconstructions.png and codebook_usage.png. Of several processes, rank 0 does all the work.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.arguments import DataArguments
from ..evaluation.arguments import EvaluationArguments
from .cli import COMMANDS
from .errors import one_line_errors
from .folders import check_writable
from .parser import Parser


if TYPE_CHECKING:
    import torch

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

    from accelerate import Accelerator

    accelerator = Accelerator()
    if not accelerator.is_main_process:
        return
    with one_line_errors("evaluate"):
        check_extras()
        from ..data.batches import evaluation_batches
        from ..training.models import load_model

        model, image_processor = load_model(arguments.model, revision=arguments.model_revision)
        model.quantizer.solver = arguments.solver
        batches = evaluation_batches(data, image_processor, arguments.batch_size, arguments.max_images)
        evaluate_and_report(model.to(accelerator.device), image_processor, batches, arguments, data)


def check_extras() -> None:
    """Raises ImportError, with the command that installs what is missing, before any work is done."""
    try:
        from ..evaluation import evaluator, report  # noqa: F401
    except ImportError as error:
        raise ImportError(f'{error.name} is not installed: run pip install "optvq_hf[train]"') from error


def default_folder(arguments: EvaluationArguments) -> Path:
    """The model's own folder; for a Hub id one that no other id, revision or training run has."""
    assert arguments.model is not None
    if Path(arguments.model).is_dir():
        return Path(arguments.model)
    parts = (arguments.model, arguments.model_revision)
    return Path("runs") / "--".join(part.replace("/", "--") for part in parts if part)


def evaluate_and_report(
    model: OptVQModel,
    image_processor: OptVQImageProcessor,
    batches: Iterable[torch.Tensor],
    arguments: EvaluationArguments,
    data: DataArguments,
) -> dict:
    """Evaluates a model, prints and then writes the report, and returns the content of metrics.json.

    The report goes to `arguments.output_dir`; by default to the folder of the model, or to runs/OWNER--NAME for a Hub id.

    Raises:
        ValueError: If it would say less than an earlier report, or replace one of other weights, without `--overwrite`.
        OSError: If it cannot be written.
    """
    from ..data.batches import CountedBatches
    from ..data.loading import hub_id
    from ..evaluation.evaluator import evaluate_model
    from ..evaluation.report import make_report, write_report
    from ..evaluation.results import check_loses_nothing, format_table, read_result
    from ..training.digests import DIGEST, weights_digest

    assert arguments.model is not None and data.dataset is not None  # the parser has checked this
    assignments = arguments.assignment or [model.config.inference_assignment]
    folder = Path(arguments.output_dir) if arguments.output_dir else default_folder(arguments)
    check_writable(folder)
    settings = {
        "model": arguments.model,
        **({"model_revision": arguments.model_revision} if arguments.model_revision else {}),
        DIGEST: weights_digest(model),
        "dataset": data.dataset,
        "dataset_id": hub_id(data.dataset),
        "split": data.evaluated_split,
        "batch_size": arguments.batch_size,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    if data.eval_fraction:
        names = ("train_split", "eval_fraction", "eval_fraction_seed")
        settings |= {name: getattr(data, name) for name in names}
    limits = {"max_images": arguments.max_images, "dataset_config": data.dataset_config, "data_dir": data.data_dir}
    settings |= {name: value for name, value in {**limits, "image_column": data.image_column}.items() if value}
    if arguments.max_images:
        settings["sample"] = "first" if data.streaming else "random"
    earlier = {} if arguments.overwrite else read_result(folder)
    check_loses_nothing(earlier, settings, arguments.max_images or float("inf"), assignments, folder)
    evaluations = evaluate_model(model, batches, assignments)
    if isinstance(batches, CountedBatches):
        settings["num_unreadable"] = batches.num_unreadable
    report = make_report(evaluations, settings)
    print(f"\n{data.dataset}, split {data.evaluated_split}: {report['num_images']:,} images\n")
    if isinstance(batches, CountedBatches) and batches.report:
        print(f"{batches.report}\n")
    print(format_table(report["by_assignment"]))
    check_loses_nothing(earlier, settings, report["num_images"], assignments, folder)
    write_report(report, evaluations[assignments[0]], image_processor, folder)
    print(f"\nmetrics    {folder / 'metrics.json'}\npictures   {folder / 'reconstructions.png'}, codebook_usage.png")
    return report


if __name__ == "__main__":
    main()
