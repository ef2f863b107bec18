"""Train a tokenizer on any image dataset.

    optvq train --config scripts/recipes/quickstart.yaml
    optvq train --config runs/quickstart/recipe.yaml --resume auto
    accelerate launch scripts/train.py --config scripts/recipes/mnist.yaml --num-codebook-heads 1

Writes a folder that `OptVQModel.from_pretrained` loads, with the run's log, curves, pictures and settings, and evaluates
the model on the evaluation split.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import yaml
from huggingface_hub.errors import StrictDataclassError

from ..configuration_optvq import OptVQConfig
from ..data.arguments import DataArguments
from ..evaluation.arguments import EvaluationArguments
from ..publishing.arguments import PublishingArguments
from ..training.arguments import (
    CodebookArguments,
    ObjectiveArguments,
    OptimizationArguments,
    Recipe,
    RecordArguments,
    TrainingArguments,
)
from .arguments import Parser
from .cli import COMMANDS
from .errors import one_line, one_line_errors
from .evaluate import check_extras, evaluate_and_report
from .model_arguments import ModelArguments
from .publish import check_repo_id, publish


if TYPE_CHECKING:
    from ..modeling_optvq import OptVQModel


RUN_ARGUMENTS = [TrainingArguments, OptimizationArguments, ObjectiveArguments, CodebookArguments, RecordArguments]


def make_parser() -> Parser:
    """The command's parser: the run, its data, and a new model's configuration."""
    return Parser([*RUN_ARGUMENTS, DataArguments, ModelArguments], "train", COMMANDS["train"])


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `optvq train`; ends the process at a user's mistake."""
    parser = make_parser()
    *of_run, data, model_arguments = parser.parse(argv)
    recipe = Recipe(*of_run)
    fields = {name: value for name, value in vars(model_arguments).items() if value is not None}
    if recipe.training.push_to_hub:
        check_repo_id(parser, "--push-to-hub", recipe.training.push_to_hub)
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


def run(recipe: Recipe, data: DataArguments, model_fields: dict) -> None:
    """One training run, from the dataset to the report. What can go wrong goes wrong before the first step."""
    check_extras()
    from accelerate.utils import set_seed
    from transformers.utils.logging import disable_progress_bar

    from ..data.batches import evaluation_batches, training_batches
    from ..data.loading import hub_id
    from ..publishing.checkpoints import CheckpointPusher
    from ..training.checkpoints import find_checkpoint, write_whole
    from ..training.history import RECIPE_FILE, SUMMARY_FILE, summarize
    from ..training.loop import train
    from ..training.trackers import make_accelerator
    from .models import load_model, make_model

    disable_progress_bar()  # of every save; the run has its own
    training = recipe.training
    output_dir = Path(training.output_dir)
    checkpoint = find_checkpoint(_fetched(training.resume, output_dir), output_dir)
    accelerator = make_accelerator(recipe)
    _check_agreement(checkpoint, accelerator.num_processes)
    training.mixed_precision = cast(Literal["no", "bf16"], accelerator.mixed_precision)
    set_seed(training.seed)
    source = str(checkpoint) if checkpoint else training.model
    revision = None if checkpoint else training.model_revision
    model, image_processor = load_model(source, model_fields, revision) if source else make_model(model_fields)
    processes = (accelerator.process_index, accelerator.num_processes)
    batches = training_batches(data, image_processor, training.batch_size, training.seed, *processes)
    unseen = evaluation_batches(data, image_processor, training.batch_size)
    steps_per_epoch = (batches.batches_per_epoch or 0) // training.gradient_accumulation_steps
    total_steps = training.max_steps or training.num_epochs * steps_per_epoch
    if total_steps == 0:
        raise ValueError(
            f"split {data.train_split!r} has no {training.gradient_accumulation_steps} batches of {training.batch_size} for "
            "--gradient-accumulation-steps in an epoch"
        )
    if recipe.codebook.quantization_start >= total_steps:
        raise ValueError(
            f"quantization would start after {recipe.codebook.quantization_start} steps, but the run has {total_steps}: lower "
            "--quantization-start"
        )
    settings = {**recipe.as_flags(), **asdict(data), **model_fields, "resume": None}
    changes = changed_settings(checkpoint, settings) if checkpoint else ""
    if training.save_every and training.eval_images:  # one that cannot be read is better known now
        for _ in evaluation_batches(data, image_processor, training.batch_size, training.eval_images):
            pass
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_whole(output_dir / RECIPE_FILE, yaml.safe_dump(settings, sort_keys=False))
        print(f"training {model.num_parameters():,} parameters for {total_steps:,} steps on {accelerator.device}")
        if checkpoint is not None:
            print(f"going on from {checkpoint}{changes}")

    pusher = None
    if training.push_to_hub and accelerator.is_main_process:
        pusher = CheckpointPusher(training.push_to_hub, training.hub_private, output_dir)

    def score(model: OptVQModel) -> float:
        from ..evaluation.evaluator import evaluate_model

        some = evaluation_batches(data, image_processor, training.batch_size, training.eval_images)
        [evaluation] = evaluate_model(model, some, [model.config.inference_assignment], num_shown=0).values()
        return evaluation.metrics["mse"]

    on_checkpoint = pusher.push if pusher else None
    result = train(
        model, image_processor, batches, total_steps, recipe, accelerator, checkpoint, score, settings, on_checkpoint
    )
    if pusher and not result.completed:
        pusher.finish(patience=60)
    if not accelerator.is_main_process:
        return
    assert result.history is not None  # of the main process
    curves = result.history.draw() if result.history.entries else None
    if not result.completed:
        command = shlex.join(["optvq", "train", "--config", str(output_dir / RECIPE_FILE), "--resume", "auto"])
        print(f"\nstopped after step {result.step}; checkpoint {result.checkpoint}")
        print(f"go on with: {command}{' (started in as many processes)' if accelerator.num_processes > 1 else ''}")
        return
    images_per_step = training.batch_size * training.gradient_accumulation_steps * accelerator.num_processes
    of_data = {"dataset": data.dataset, "dataset_id": hub_id(data.dataset or "")}
    summary = summarize(result.history.entries, images_per_step, accelerator, of_data)
    for name, trained in result.networks.models().items():
        write_whole(output_dir / name / RECIPE_FILE, yaml.safe_dump(settings, sort_keys=False))
        write_whole(output_dir / name / SUMMARY_FILE, json.dumps(summary, indent=1) + "\n")
        evaluation = EvaluationArguments(model=str(output_dir / name), batch_size=training.batch_size)
        evaluate_and_report(trained.eval(), image_processor, unseen, evaluation, data)
    if batches.num_unreadable:
        print(
            f"unreadable {batches.num_unreadable} of {batches.num_images} images, the last: {batches.last_unreadable}"
        )
    for name, step in summary["alarms"].items():
        print(f"alarm      {name}, first at step {step}")
    print(f"curves     {curves}\nmodel      {output_dir}  (load it with OptVQModel.from_pretrained)")
    if pusher:
        pusher.finish(patience=600)
        publish(str(output_dir), pusher.repo_id, PublishingArguments(private=training.hub_private))


# What may be another when a run goes on. The rest decides what it computes.
MAY_CHANGE = {
    *RecordArguments.__dataclass_fields__,
    *("output_dir", "model", "model_revision", "discriminator_weights", "resume", "push_to_hub", "hub_private"),
    *("max_steps", "num_epochs", "save_every", "keep_checkpoints", "eval_images"),
    *("mixed_precision", "gradient_checkpointing", "compile", "channels_last"),
    *("dataset", "dataset_config", "data_dir", "eval_split", "num_workers", "max_unreadable"),
}


def changed_settings(checkpoint: Path, settings: dict) -> str:
    """What was set otherwise when the checkpoint was written, for the message.

    Raises:
        ValueError: If it decides what the run computes.
    """
    from ..training.checkpoints import read_numbers

    before = read_numbers(checkpoint)["settings"]
    names = [name for name in before.keys() | settings.keys() if before.get(name) != settings.get(name)]
    changed = {name: f"{name} {before.get(name)} -> {settings.get(name)}" for name in sorted(names)}
    fixed = [text for name, text in changed.items() if name not in MAY_CHANGE]
    if fixed:
        raise ValueError(
            f"cannot go on from {checkpoint} with {', '.join(fixed)}: a run that goes on is the same run; begin a new one with "
            f"--model {checkpoint}, or leave the settings as they were (recipe.yaml)"
        )
    told = [text for name, text in changed.items() if name not in ("output_dir", "model", "model_revision", "resume")]
    return f" with {', '.join(told)}" if told else ""


def _fetched(resume: str | None, output_dir: Path) -> str | None:
    """Where `--resume` points on this disk: the checkpoint of a run that was pushed to the Hub is downloaded, with its log."""
    if resume is None or resume == "auto" or Path(resume).exists():
        return resume

    from ..data.hub import find_folder
    from ..publishing.hub import LAST_CHECKPOINT
    from ..training.history import LOG_FILE

    try:
        folder = find_folder(resume, allow_patterns=[f"{LAST_CHECKPOINT}/*"]) / LAST_CHECKPOINT
    except OSError as error:
        raise OSError(f"{resume} is not a checkpoint: {error}") from error
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{resume} has no checkpoint to go on from: a finished run has none; begin a new one with --model"
        )
    if (folder / LOG_FILE).is_file() and not (output_dir / LOG_FILE).exists():
        output_dir.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / LOG_FILE, output_dir)
    return str(folder)


def _check_agreement(checkpoint: Path | None, num_processes: int) -> None:
    """Raises ValueError if the processes, each on its own disk, found different checkpoints."""
    if num_processes == 1:
        return

    import torch

    from ..training.checkpoints import read_numbers

    found: list[str | None] = [None] * num_processes
    mine = f"{checkpoint.name} of step {read_numbers(checkpoint)['step']}" if checkpoint else None
    torch.distributed.all_gather_object(found, mine)
    if len(set(found)) > 1:
        raise ValueError(
            f"the processes found different checkpoints: {found}; the output folder must be on a shared disk"
        )


if __name__ == "__main__":
    main()
