"""Prepares a run from a recipe: finds checkpoint, model, data and length, and checks that they fit together."""

import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from ..configuration_optvq import OptVQConfig
from ..data.arguments import DataArguments, may_change_on_resume
from ..data.batches import TrainingBatches, evaluation_batches, training_batches
from ..data.fetching import find_folder
from ..data.loading import count_images, hub_id
from ..data.probe import warn_of_lost_colour
from ..modeling_optvq import OptVQModel
from ..parsing import parse_yaml
from .arguments import Recipe, TrainingArguments
from .checkpoints import LAST_CHECKPOINT, find_checkpoint, read_state
from .integrity import BrokenCheckpointError
from .memory import check_memory, plan_memory
from .models import load_config, load_model, make_model
from .results import check_free, finished_steps, place_result
from .trainer import TrainingRun
from .watching.log import LOG_FILE, RECIPE_FILE
from .watching.trackers import make_accelerator


# Images of the evaluation split that are read before training.
NUM_CHECKED = 100
# Flags whose change on resume is not worth a message.
UNTOLD = ("output_dir", "model", "model_revision", "resume", "push_to_hub", "tracker_project")
# Flags of one command, with the value that the run's recipe has: a second run with this recipe must not repeat them.
NOT_KEPT = {"resume": None, "overwrite": False, "change_learning_rate": False}
# Flags that may change on resume with --change-learning-rate.
LEARNING_RATES = {"learning_rate", "discriminator_learning_rate"}


def make_run(
    recipe: Recipe,
    data: DataArguments,
    model_fields: dict,
    score: Callable[[OptVQModel, Iterable[torch.Tensor]], float] | None = None,
    accelerator: Accelerator | None = None,
) -> tuple[TrainingRun, str]:
    """Makes a run, at its first step or at that of the checkpoint. Wrong settings fail here, before training.

    Args:
        model_fields: Fields of the configuration that differ from the defaults, or from those of the given model.
        score: Mean squared error of a model on batches of unseen images.
        accelerator: By default a new one.

    Returns:
        The run, and a message that says what it resumes; empty for a new run.

    Raises:
        ValueError, OSError, ImportError: If something does not exist or does not fit; the message says what.
    """
    training = recipe.training
    output_dir = Path(training.output_dir)
    accelerator = accelerator or make_accelerator(recipe)
    if accelerator.is_main_process:
        place_result(output_dir)
    accelerator.wait_for_everyone()
    is_finished = training.resume == "auto" and _is_finished(recipe, output_dir)
    checkpoint = None if is_finished else _find_start(training, output_dir)
    _check_agreement(checkpoint, accelerator.num_processes)
    training.mixed_precision = "bf16" if accelerator.mixed_precision == "bf16" else "no"
    set_seed(training.seed)
    folder = output_dir if is_finished else checkpoint
    source, revision = (str(folder), None) if folder else (training.model, training.model_revision)
    if checkpoint is not None:
        _check_config(checkpoint)
    config = load_config(source, model_fields, revision) if source else OptVQConfig(**model_fields)
    if not is_finished:
        plan = plan_memory(config, recipe, accelerator.device)
        accelerator.print(f"needs {plan}")
        if training.check_memory:
            check_memory(plan, config, recipe, accelerator.device, lambda: count_images(data))
    model, image_processor = load_model(source, model_fields, revision) if source else make_model(model_fields)
    processes = (accelerator.process_index, accelerator.num_processes)
    batches = training_batches(data, image_processor, training.batch_size, training.seed, *processes)
    if accelerator.is_main_process:
        warn_of_lost_colour(batches.reader.images, model.config.num_channels)
    total_steps = _total_steps(recipe, data, batches)
    settings = {**recipe.as_flags(), **asdict(data), **model_fields, **NOT_KEPT}
    resumed, changeable = "", may_change_on_resume(*map(type, recipe), DataArguments)
    if recipe.optimization.change_learning_rate and checkpoint is not None:
        changeable |= LEARNING_RATES
    if is_finished:
        changed_settings(output_dir, _recorded_settings(output_dir), settings, changeable)
        resumed = f"the finished run of {total_steps} steps in {output_dir}: only what is missing is done"
    if checkpoint is not None:
        state = read_state(checkpoint)
        resumed = f"{checkpoint}{changed_settings(checkpoint, state.settings, settings, changeable)}"
        if state.total_steps != total_steps:
            resumed += (
                f"; from step {state.step} on, all schedules are those of a run of {total_steps} steps instead of "
                f"{state.total_steps}"
            )

    def unseen() -> Iterable[torch.Tensor]:
        return evaluation_batches(data, image_processor, training.batch_size, training.eval_images)

    checked = evaluation_batches(data, image_processor, training.batch_size, NUM_CHECKED)
    if sum(map(len, checked)) == 0:  # too many unreadable images must fail before training, not after
        raise ValueError(f"none of the images of split {data.evaluated_split!r} can be read: {checked.last_unreadable}")
    score_unseen = None if score is None else lambda model: score(model, unseen())
    names = {"dataset": data.dataset, "dataset_id": hub_id(data.dataset or "")}
    names["base_model_id"] = hub_id(training.model or "")  # here: in another folder, the name may be no folder
    run = TrainingRun(
        model, image_processor, batches, total_steps, recipe, accelerator, score_unseen, settings, dataset=names
    )
    if is_finished:
        run.restore_result()
    elif checkpoint is not None:
        run.resume(checkpoint)
    return run, resumed


def _total_steps(recipe: Recipe, data: DataArguments, batches: TrainingBatches) -> int:
    training = recipe.training
    steps_per_epoch = (batches.batches_per_epoch or 0) // training.gradient_accumulation_steps
    total_steps = training.max_steps or training.num_epochs * steps_per_epoch
    if total_steps == 0:
        raise ValueError(
            f"an epoch of split {data.train_split!r} has fewer than {training.gradient_accumulation_steps} batches of "
            f"{training.batch_size}: lower --batch-size or --gradient-accumulation-steps"
        )
    if recipe.codebook.quantization_start >= total_steps:
        raise ValueError(
            f"quantization would start after {recipe.codebook.quantization_start} steps, but the run has {total_steps}: lower "
            "--quantization-start"
        )
    return total_steps


def changed_settings(folder: Path, before: dict, settings: dict, changeable: set[str]) -> str:
    """Says which settings changed since a run began that is resumed.

    Args:
        folder: Checkpoint or result that is resumed.
        before, settings: Those of the run, and those of now.
        changeable: Names of settings that may change on resume. Fields of the model may not.

    Raises:
        ValueError: If a setting changed that may not.
    """
    names = [name for name in before.keys() | settings.keys() if before.get(name) != settings.get(name)]
    changed = {name: f"{name} {before.get(name)} -> {settings.get(name)}" for name in sorted(names)}
    fixed = [text for name, text in changed.items() if name not in changeable]
    if fixed:
        advice = ", or pass --change-learning-rate" if LEARNING_RATES & changed.keys() - changeable else ""
        raise ValueError(
            f"cannot resume {folder} with {', '.join(fixed)}: a resumed run must compute the same; start a new run with "
            f"--model {folder}, or restore these settings (recipe.yaml has them){advice}"
        )
    told = [text for name, text in changed.items() if name not in UNTOLD]
    return f" with {', '.join(told)}" if told else ""


def _find_start(training: TrainingArguments, output_dir: Path) -> Path | None:
    """The checkpoint to start from, or None; refuses to write over an earlier run.

    Raises:
        ValueError: If the output folder holds the model or checkpoints of an earlier run that the command does not name.
    """
    checkpoint = find_checkpoint(_fetched(training.resume, output_dir), output_dir)
    if checkpoint is None and training.resume == "auto" and finished_steps(output_dir):
        raise ValueError(
            f"the finished run in {output_dir} has no checkpoint to extend it from: start a new run with --model {output_dir} "
            "and another --output-dir"
        )
    continues = checkpoint is not None and (training.resume == "auto" or checkpoint.parent.samefile(output_dir))
    if not (continues or training.overwrite):
        check_free(output_dir, but_for_checkpoints=training.resume is not None)
    return checkpoint


def _is_finished(recipe: Recipe, output_dir: Path) -> bool:
    """Whether the output folder holds the result of a run of the length that is asked for.

    Raises:
        ValueError: If it is the result of a longer run.
    """
    training, steps = recipe.training, finished_steps(output_dir)
    if steps is None:
        return False
    if training.max_steps is None:
        before = _recorded_settings(output_dir)
        return before.get("max_steps") is None and before.get("num_epochs") == training.num_epochs
    if training.max_steps < steps:
        raise ValueError(
            f"the run in {output_dir} has {steps} steps already, more than --max-steps {training.max_steps}: choose another "
            "--output-dir, or --overwrite to start anew"
        )
    return training.max_steps == steps


def _recorded_settings(output_dir: Path) -> dict:
    """Settings of the run whose result is in the output folder."""
    try:
        return parse_yaml((output_dir / RECIPE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the settings of the finished run: {error}") from error


def _check_config(checkpoint: Path) -> None:
    """Raises BrokenCheckpointError if the checkpoint's config.json is not that of the run whose state lies beside it."""
    config, settings = load_config(str(checkpoint)), read_state(checkpoint).settings
    scheduled = {
        "sinkhorn_epsilon": settings.get("epsilon_schedule"),
        "sinkhorn_balance": settings.get("balance_schedule"),
    }
    for name in sorted(settings.keys() & vars(config).keys()):
        expected, found = settings[name], getattr(config, name)
        expected, found = (tuple(value) if isinstance(value, list) else value for value in (expected, found))
        if found != expected and not scheduled.get(name):
            raise BrokenCheckpointError(
                f"checkpoint {checkpoint} is broken: config.json has {name} {found!r}, its run {expected!r}"
            )


def _fetched(resume: str | None, output_dir: Path) -> str | None:
    """The local folder that `--resume` names; a checkpoint on the Hub is downloaded, with its log."""
    if resume is None or resume == "auto" or Path(resume).exists():
        return resume
    try:
        folder = find_folder(resume, allow_patterns=[f"{LAST_CHECKPOINT}/*"]) / LAST_CHECKPOINT
    except OSError as error:
        raise OSError(f"{resume} is not a checkpoint: {error}") from error
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{resume} has no checkpoint to resume (a finished run has none): start a new run with --model"
        )
    if (folder / LOG_FILE).is_file() and not (output_dir / LOG_FILE).exists():
        output_dir.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / LOG_FILE, output_dir)
    return str(folder)


def _check_agreement(checkpoint: Path | None, num_processes: int) -> None:
    """Raises ValueError if the processes, each on its own disk, found different checkpoints."""
    if num_processes == 1:
        return
    found: list[str | None] = [None] * num_processes
    mine = f"{checkpoint.name} of step {read_state(checkpoint).step}" if checkpoint else None
    torch.distributed.all_gather_object(found, mine)
    if len(set(found)) > 1:
        raise ValueError(
            f"the processes found different checkpoints: {found}; the output folder must be on a shared disk"
        )
