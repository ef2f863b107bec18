"""Train a tokenizer on any image dataset.

    optvq train --config scripts/recipes/quickstart.yaml
    optvq train --config runs/quickstart/recipe.yaml --resume auto
    accelerate launch scripts/train.py --config scripts/recipes/mnist.yaml --num-codebook-heads 1

Writes a folder that `OptVQModel.from_pretrained` loads, with the run's log, curves, pictures and settings, and evaluates
the model on the evaluation split.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from huggingface_hub.errors import StrictDataclassError

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
from .cli import COMMANDS
from .errors import one_line, one_line_errors
from .evaluate import check_extras, evaluate_and_report
from .folders import check_writable
from .model_arguments import ModelArguments
from .parser import Parser
from .publish import check_repo_id, publish


if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..publishing.checkpoint_pusher import CheckpointPusher
    from ..training.trainer import TrainingRun


RUN_ARGUMENTS = [TrainingArguments, OptimizationArguments, ObjectiveArguments, CodebookArguments, RecordArguments]


def make_parser() -> Parser:
    """Makes the parser of the command: flags of the run, the data and the model."""
    return Parser([*RUN_ARGUMENTS, DataArguments, ModelArguments], "train", COMMANDS["train"])


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `optvq train`; a user's mistake ends the process with one line."""
    parser = make_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    with one_line_errors("train"):
        settings = parse(parser, words)
        proposal = propose_for(settings, words)
        if proposal is not None:
            settings = parse(parser, [*proposal, *words])
        run(*settings)


def parse(parser: Parser, words: list[str]) -> tuple[Recipe, DataArguments, dict]:
    """Parses a command line to settings that fit together, with the model's fields that are given."""
    *of_run, data, model_arguments = parser.parse(words)
    recipe = Recipe(*of_run)
    fields = {name: value for name, value in vars(model_arguments).items() if value is not None}
    if recipe.training.push_to_hub:
        check_repo_id(parser, "--push-to-hub", recipe.training.push_to_hub)
    if not data.dataset:
        parser.error("--dataset is missing, for example --dataset fashion_mnist_sample")
    if recipe.training.overwrite and recipe.training.resume == "auto":
        parser.error("--overwrite excludes --resume auto: one removes the earlier run, the other continues it")
    if model_arguments.freeze_codebook and (
        recipe.codebook.codebook_start != "normal" or recipe.codebook.reseed_dead_codes_after
    ):
        parser.error("--freeze-codebook excludes --codebook-start and --reseed-dead-codes-after")
    if recipe.training.freeze_decoder and recipe.objective.adversarial_weight > 0:
        parser.error("--freeze-decoder excludes --adversarial-weight, whose scale is a gradient of the decoder")
    if data.latents is not None:
        _check_latents(parser, recipe)
    if recipe.training.model is None:
        from ..configuration_optvq import OptVQConfig

        try:
            OptVQConfig(**fields)
        except StrictDataclassError as error:
            parser.error(one_line(error))
        if data.streaming and recipe.training.max_steps is None and not _may_be_proposed(recipe, fields, words):
            parser.error("--streaming needs --max-steps: the length of a stream is not known")
    return recipe, data, fields


def _check_latents(parser: Parser, recipe: Recipe) -> None:
    """Ends the command if settings do not go with `--latents`."""
    training, objective = recipe.training, recipe.objective
    if training.model is None and training.resume is None:
        parser.error("--latents are of the encoder of a model: name it with --model")
    if not (training.freeze_encoder and training.freeze_decoder):
        parser.error("--latents trains the quantizer alone: it needs --freeze-encoder and --freeze-decoder")
    if objective.perceptual_weight > 0:
        parser.error("--latents excludes --perceptual-weight: there are no pictures")
    if recipe.codebook.quantization_start > 0:
        parser.error("--latents excludes --quantization-start: nothing but the quantizer is trained")


def _may_be_proposed(recipe: Recipe, fields: dict, words: list[str]) -> bool:
    """Whether nothing is said about the model."""
    return not (recipe.training.model or "backbone" in fields or _has_flag(words, "config"))


def _has_flag(words: list[str], name: str) -> bool:
    return any(word.partition("=")[0].replace("_", "-") == f"--{name}" for word in words)


def propose_for(settings: tuple[Recipe, DataArguments, dict], words: list[str]) -> list[str] | None:
    """The recipe for a run without recipe, model or backbone: that of the run it resumes, or what fits images and memory.

    Returns:
        Words of a command line, to be put before the user's; None for any other run.
    """
    recipe, data, fields = settings
    if not _may_be_proposed(recipe, fields, words):
        return None
    from ..configuration_optvq import OptVQConfig
    from ..data.loading import load_images, load_split
    from ..data.probe import look_at
    from ..training.memory import fitting_batch_size, run_device
    from ..training.proposal import propose
    from ..training.watching.log import RECIPE_FILE

    of_earlier_run = Path(recipe.training.output_dir) / RECIPE_FILE
    if recipe.training.resume == "auto" and of_earlier_run.is_file():
        return ["--config", str(of_earlier_run)]
    facts = look_at(load_images(data, data.train_split))
    proposal = propose(facts)
    if data.eval_fraction == 0 and not _has_flag(words, "eval-split"):
        try:
            load_split(data, held_out=True)
        except ValueError:  # there is no split of the default name
            proposal.settings["eval_fraction"] = 0.1
    if not _has_flag(words, "batch-size"):
        recipe, data, fields = parse(make_parser(), [*proposal.as_flags(), *words])
        num_images = None if facts.total is None else int(facts.total * (1 - data.eval_fraction))
        batch_size = fitting_batch_size(OptVQConfig(**fields), recipe, run_device(), num_images)
        if batch_size < recipe.training.batch_size:
            proposal.settings["batch_size"] = batch_size
    print(f"{facts}: proposing {shlex.join(['optvq', 'train', *proposal.as_flags(), *words])}")
    return [*proposal.as_flags(), "--output-dir", settings[0].training.output_dir]


def run(recipe: Recipe, data: DataArguments, model_fields: dict) -> None:
    """Trains, evaluates and, with `--push-to-hub`, publishes, while no other run can write to the output folder."""
    check_extras()
    from ..training.lock import locked
    from ..training.watching.trackers import make_accelerator

    accelerator = make_accelerator(recipe)
    check_writable(Path(recipe.training.output_dir))
    with locked(Path(recipe.training.output_dir)):
        _run(recipe, data, model_fields, accelerator)


def _run(recipe: Recipe, data: DataArguments, model_fields: dict, accelerator: Accelerator) -> None:
    from transformers.utils.logging import disable_progress_bar

    from ..evaluation.evaluator import reconstruction_error
    from ..publishing.checkpoint_pusher import CheckpointPusher
    from ..tokenization.latents import load_latents
    from ..training.preparation import make_run

    disable_progress_bar()  # of every save; the run has a progress bar of its own
    training_run, resumed = make_run(recipe, data, model_fields, reconstruction_error, accelerator, load_latents)
    if not training_run.accelerator.is_main_process:
        training_run.train()
        return
    pusher = None
    if recipe.training.push_to_hub:  # the Hub may refuse, before anything in the output folder changes
        pusher = CheckpointPusher(recipe.training.push_to_hub, recipe.training.hub_private, training_run.output_dir)
        training_run.on_checkpoint = pusher.push
    if resumed:
        print(f"resuming {resumed}")
    if not training_run.completed:
        begin(training_run, recipe)
    training_run.train()
    if training_run.completed:
        complete(training_run, pusher, recipe, data)
        return
    if pusher:
        pusher.finish(patience=60)
    print(f"\nstopped after step {training_run.step}; checkpoint {training_run.checkpoint}")
    print(f"resume with: {how_to_resume(training_run)}")


def begin(run: TrainingRun, recipe: Recipe) -> None:
    """Removes an earlier run that is not continued, and writes the recipe. All that can be checked has been before."""
    from ..training.checkpoints import write_whole
    from ..training.run_folder import RunFolder
    from ..training.watching.log import RECIPE_FILE

    if not run.continues:
        RunFolder(run.output_dir).remove_run(with_checkpoints=recipe.training.overwrite)
    write_whole(run.output_dir / RECIPE_FILE, yaml.safe_dump(run.settings, sort_keys=False))
    device = run.accelerator.device
    print(f"training {run.model.num_parameters():,} parameters for {run.total_steps:,} steps on {device}")


def complete(run: TrainingRun, pusher: CheckpointPusher | None, recipe: Recipe, data: DataArguments) -> None:
    """Evaluates a completed run and publishes it; whatever ends that, it says how to do the rest."""
    from ..training.signals import interrupted_by_requests

    try:
        with interrupted_by_requests():
            if run.interrupted:
                raise KeyboardInterrupt
            report(run, recipe, data)
            if pusher:
                pusher.finish(patience=600)
                publish(str(run.output_dir), pusher.repo_id, PublishingArguments(private=recipe.training.hub_private))
    except (KeyboardInterrupt, Exception):
        print(f"\nthe run is finished; do what is missing with: {how_to_resume(run)}")
        raise


def how_to_resume(run: TrainingRun) -> str:
    """The command that resumes a run."""
    from ..data.order import StreamOrder
    from ..training.watching.log import RECIPE_FILE

    command = shlex.join(["optvq", "train", "--config", str(run.output_dir / RECIPE_FILE), "--resume", "auto"])
    is_stream = isinstance(getattr(run.batches, "order", None), StreamOrder)
    return (
        f"{command} (with the same number of processes)" if is_stream and run.accelerator.num_processes > 1 else command
    )


def report(run: TrainingRun, recipe: Recipe, data: DataArguments) -> None:
    """Draws the curves and evaluates the models of a completed run, as far as that is missing; prints where the results are."""
    from ..data.batches import TrainingBatches, evaluation_batches
    from ..evaluation.results import read_result_of
    from ..training.watching.curves import draw_curves
    from ..training.watching.log import first_steps_of_alarms

    curves = draw_curves(run.log.entries, run.output_dir) if run.log.entries else None
    batch_size = recipe.training.batch_size
    unseen = evaluation_batches(data, run.image_processor, batch_size)
    for name, trained in run.networks.models().items():
        folder = run.output_dir / name
        earlier = read_result_of(trained, folder)
        if earlier and not earlier.get("max_images"):
            print(f"evaluated  {folder} already")
            continue
        # A result of other weights is that of the run before it was extended.
        evaluation = EvaluationArguments(model=[str(folder)], batch_size=batch_size, overwrite=not earlier)
        evaluate_and_report(trained.eval(), run.image_processor, unseen, evaluation, data)
    if isinstance(run.batches, TrainingBatches) and run.batches.report:
        print(f"training   {run.batches.report}")
    for name, step in first_steps_of_alarms(run.log.entries).items():
        print(f"alarm      {name}, first at step {step}")
    print(f"curves     {curves}\nmodel      {run.output_dir}  (load it with OptVQModel.from_pretrained)")


if __name__ == "__main__":
    main()
