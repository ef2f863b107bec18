"""Train a tokenizer on any image dataset.

    optvq train --config scripts/recipes/quickstart.yaml
    accelerate launch scripts/train.py --config scripts/recipes/mnist.yaml --num-codebook-heads 1

Writes a folder that `OptVQModel.from_pretrained` loads, with the run's log, curves, pictures and settings, and evaluates
the model on the evaluation split.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import yaml
from accelerate.utils import set_seed
from huggingface_hub.errors import StrictDataclassError

from ..configuration_optvq import OptVQConfig
from ..data.arguments import DataArguments
from ..data.batches import evaluation_batches, training_batches
from ..evaluation.arguments import EvaluationArguments
from ..training.arguments import TrainingArguments
from ..training.loop import make_accelerator, train
from .arguments import ModelArguments, Parser
from .errors import one_line, one_line_errors
from .evaluate import check_extras, evaluate_and_report
from .models import load_model, make_model


def make_parser() -> Parser:
    return Parser([TrainingArguments, DataArguments, ModelArguments], "train", __doc__.splitlines()[0])


def main(argv: Sequence[str] | None = None):
    parser = make_parser()
    arguments, data, model_arguments = parser.parse(argv)
    fields = {name: value for name, value in vars(model_arguments).items() if value is not None}
    if not data.dataset:
        parser.error("--dataset is missing, for example --dataset fashion_mnist_sample")
    if data.streaming and arguments.max_steps is None:
        parser.error("--streaming needs --max-steps: the length of a stream is not known")
    if arguments.model is None:
        try:
            OptVQConfig(**fields)
        except StrictDataclassError as error:
            parser.error(one_line(error))
    with one_line_errors("train"):
        run(arguments, data, fields)


def run(arguments: TrainingArguments, data: DataArguments, model_fields: dict):
    """One training run, from the dataset to the report. What can go wrong goes wrong before the first step."""
    check_extras()
    accelerator = make_accelerator(arguments)
    set_seed(arguments.seed)
    model, image_processor = load_model(arguments.model, model_fields) if arguments.model else make_model(model_fields)
    set_seed(arguments.seed, device_specific=True)  # the same weights everywhere, but noise of its own in each process
    batches = training_batches(
        data,
        image_processor,
        arguments.batch_size,
        arguments.seed,
        accelerator.process_index,
        accelerator.num_processes,
    )
    unseen = evaluation_batches(data, image_processor, arguments.batch_size)
    total_steps = arguments.max_steps or arguments.num_epochs * batches.batches_per_epoch
    output_dir = Path(arguments.output_dir)
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        settings = {**asdict(arguments), **asdict(data), **model_fields}
        (output_dir / "recipe.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        print(f"training {model.num_parameters():,} parameters for {total_steps:,} steps on {accelerator.device}")
    history = train(model, image_processor, batches, total_steps, arguments, accelerator)
    if accelerator.is_main_process:
        curves = history.draw()
        evaluation = EvaluationArguments(model=str(output_dir), batch_size=arguments.batch_size)
        evaluate_and_report(model, image_processor, unseen, evaluation, data)
        print(f"curves     {curves}\nmodel      {output_dir}  (load it with OptVQModel.from_pretrained)")


if __name__ == "__main__":
    main()
