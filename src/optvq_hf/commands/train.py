"""Train a tokenizer on any image dataset.

    optvq train --config scripts/recipes/quickstart.yaml
    optvq train --config runs/quickstart/recipe.yaml --resume auto
    accelerate launch scripts/train.py --config scripts/recipes/mnist.yaml --num-codebook-heads 1

Writes a folder that `OptVQModel.from_pretrained` loads, with the run's log, curves, pictures and settings, and evaluates
the model on the evaluation split.
"""

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from accelerate.utils import set_seed
from huggingface_hub.errors import StrictDataclassError

from ..configuration_optvq import OptVQConfig
from ..data.arguments import DataArguments
from ..data.batches import evaluation_batches, training_batches
from ..evaluation.arguments import EvaluationArguments
from ..modeling_optvq import OptVQModel
from ..training.arguments import (
    CodebookArguments,
    ObjectiveArguments,
    OptimizationArguments,
    Recipe,
    RecordArguments,
    TrainingArguments,
)
from ..training.checkpoints import find_checkpoint, read_numbers
from ..training.history import first_steps_of_alarms
from ..training.loop import train
from ..training.trackers import make_accelerator
from .arguments import ModelArguments, Parser
from .errors import one_line, one_line_errors
from .evaluate import check_extras, evaluate_and_report
from .models import load_model, make_model


RUN_ARGUMENTS = [TrainingArguments, OptimizationArguments, ObjectiveArguments, CodebookArguments, RecordArguments]


def make_parser() -> Parser:
    return Parser([*RUN_ARGUMENTS, DataArguments, ModelArguments], "train", __doc__.splitlines()[0])


def main(argv: Sequence[str] | None = None):
    parser = make_parser()
    *of_run, data, model_arguments = parser.parse(argv)
    recipe = Recipe(*of_run)
    fields = {name: value for name, value in vars(model_arguments).items() if value is not None}
    if not data.dataset:
        parser.error("--dataset is missing, for example --dataset fashion_mnist_sample")
    if data.streaming and recipe.training.max_steps is None:
        parser.error("--streaming needs --max-steps: the length of a stream is not known")
    if model_arguments.freeze_codebook and (
        recipe.codebook.codebook_start != "normal" or recipe.codebook.reseed_dead_codes_after
    ):
        parser.error("--freeze-codebook excludes --codebook-start and --reseed-dead-codes-after")
    if recipe.training.model is None:
        try:
            OptVQConfig(**fields)
        except StrictDataclassError as error:
            parser.error(one_line(error))
    with one_line_errors("train"):
        run(recipe, data, fields)


def run(recipe: Recipe, data: DataArguments, model_fields: dict):
    """One training run, from the dataset to the report. What can go wrong goes wrong before the first step."""
    check_extras()
    training = recipe.training
    output_dir = Path(training.output_dir)
    checkpoint = find_checkpoint(training.resume, output_dir)
    accelerator = make_accelerator(recipe)
    set_seed(training.seed)
    source = str(checkpoint) if checkpoint else training.model
    model, image_processor = load_model(source, model_fields) if source else make_model(model_fields)
    processes = (accelerator.process_index, accelerator.num_processes)
    batches = training_batches(data, image_processor, training.batch_size, training.seed, *processes)
    unseen = evaluation_batches(data, image_processor, training.batch_size)
    steps_per_epoch = (batches.batches_per_epoch or 0) // training.gradient_accumulation_steps
    total_steps = training.max_steps or training.num_epochs * steps_per_epoch
    if recipe.codebook.quantization_start >= total_steps:
        raise ValueError(
            f"quantization would start after {recipe.codebook.quantization_start} steps, but the run has {total_steps}: lower "
            "--quantization-start"
        )
    settings = {**recipe.as_flags(), **asdict(data), **model_fields, "resume": None}
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "recipe.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        print(f"training {model.num_parameters():,} parameters for {total_steps:,} steps on {accelerator.device}")
        if checkpoint is not None:
            print(f"going on from {checkpoint}{_changes(checkpoint, recipe)}")

    def score(model: OptVQModel) -> float:
        some = evaluation_batches(data, image_processor, training.batch_size, training.eval_images)
        return mean_squared_error(model, some)

    result = train(model, image_processor, batches, total_steps, recipe, accelerator, checkpoint, score)
    if not accelerator.is_main_process:
        return
    curves = result.history.draw() if result.history.entries else None
    if not result.completed:
        command = shlex.join(["optvq", "train", "--config", str(output_dir / "recipe.yaml"), "--resume", "auto"])
        print(f"\nstopped after step {result.step}; checkpoint {result.checkpoint}\ngo on with: {command}")
        return
    for name, trained in result.networks.models().items():
        evaluation = EvaluationArguments(model=str(output_dir / name), batch_size=training.batch_size)
        evaluate_and_report(trained.eval(), image_processor, unseen, evaluation, data)
    if batches.num_unreadable:
        print(
            f"unreadable {batches.num_unreadable} of {batches.num_images} images, the last: {batches.last_unreadable}"
        )
    for name, step in first_steps_of_alarms(result.history.entries).items():
        print(f"alarm      {name}, first at step {step}")
    print(f"curves     {curves}\nmodel      {output_dir}  (load it with OptVQModel.from_pretrained)")


def _changes(checkpoint: Path, recipe: Recipe) -> str:
    """What is not as it was when the checkpoint was written, and so may make the run another one."""
    before = read_numbers(checkpoint)["settings"]
    ignored = ("resume", "output_dir", "model")
    changed = [
        f"{name} {before.get(name)} -> {value}"
        for name, value in recipe.as_flags().items()
        if name not in ignored and before.get(name) != value
    ]
    return f" with {', '.join(changed)}" if changed else ""


@torch.inference_mode()
def mean_squared_error(model: OptVQModel, batches) -> float:
    """Of reconstructions clamped to [-1, 1], the mean over images."""
    total = images = 0
    for pixel_values in batches:
        pixel_values = pixel_values.to(model.device)
        codes = model.encode(pixel_values, return_loss=False).codes
        difference = model.decode(codes=codes).reconstruction.float().clamp(-1, 1) - pixel_values
        total += difference.square().flatten(1).mean(dim=1).sum().item()
        images += len(pixel_values)
    return total / images


if __name__ == "__main__":
    main()
