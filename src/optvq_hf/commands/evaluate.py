"""Measure reconstruction quality and codebook usage of a tokenizer.

    optvq evaluate --model runs/mnist --dataset ylecun/mnist --assignment nearest potentials sinkhorn
    accelerate launch scripts/evaluate.py --model runs/mnist --dataset ylecun/mnist

Writes metrics.json, reconstructions.png and codebook_usage.png.
"""

from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from ..data.arguments import DataArguments
from ..data.batches import evaluation_batches
from ..evaluation.arguments import EvaluationArguments
from ..image_processing_optvq import OptVQImageProcessor
from ..modeling_optvq import OptVQModel
from .arguments import Parser
from .errors import one_line_errors


def make_parser() -> Parser:
    return Parser([EvaluationArguments, DataArguments], "evaluate", __doc__.splitlines()[0])


def main(argv: Sequence[str] | None = None):
    parser = make_parser()
    arguments, data = parser.parse(argv)
    if not arguments.model or not data.dataset:
        parser.error(f"--{'dataset' if arguments.model else 'model'} is missing")
    with one_line_errors("evaluate"):
        model = OptVQModel.from_pretrained(arguments.model).to(PartialState().device)
        image_processor = OptVQImageProcessor.from_pretrained(arguments.model)
        evaluate_and_report(model, image_processor, data, arguments)


def evaluate_and_report(
    model: OptVQModel, image_processor: OptVQImageProcessor, data: DataArguments, arguments: EvaluationArguments
) -> dict:
    """Evaluates on `data.eval_split`, writes the report, prints it, and returns what metrics.json holds."""
    try:
        from ..evaluation.evaluator import evaluate_model
        from ..evaluation.report import format_table, write_report
    except ImportError as error:
        raise ImportError(f'{error.name} is not installed: run pip install "optvq_hf[eval]"') from error

    batches = evaluation_batches(data, image_processor, arguments.batch_size, arguments.max_images)
    assignments = arguments.assignment or [model.config.inference_assignment]
    evaluations = evaluate_model(model, batches, assignments)
    folder = Path(arguments.output_dir or arguments.model)
    settings = {
        "model": arguments.model,
        "dataset": data.dataset,
        "split": data.eval_split,
        "batch_size": arguments.batch_size,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    report = write_report(evaluations, image_processor, folder, settings)
    print(f"\n{data.dataset}, split {data.eval_split}: {report['num_images']:,} images\n")
    print(format_table(report["by_assignment"]))
    print(f"\nmetrics    {folder / 'metrics.json'}\npictures   {folder / 'reconstructions.png'}, codebook_usage.png")
    return report


if __name__ == "__main__":
    main()
