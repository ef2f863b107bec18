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
from ..data.probe import warn_of_lost_colour
from ..modeling_optvq import OptVQModel
from .arguments import Recipe
from .checkpoints import LAST_CHECKPOINT, find_checkpoint, read_state
from .integrity import BrokenCheckpointError
from .memory import check_memory, plan_memory
from .models import load_config, load_model, make_model
from .trainer import TrainingRun
from .watching.log import LOG_FILE
from .watching.trackers import make_accelerator


# Images of the evaluation split that are read before training.
NUM_CHECKED = 100
# Flags whose change on resume is not worth a message.
UNTOLD = ("output_dir", "model", "model_revision", "resume")


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
    checkpoint = find_checkpoint(_fetched(training.resume, output_dir), output_dir)
    accelerator = accelerator or make_accelerator(recipe)
    _check_agreement(checkpoint, accelerator.num_processes)
    training.mixed_precision = "bf16" if accelerator.mixed_precision == "bf16" else "no"
    set_seed(training.seed)
    source = str(checkpoint) if checkpoint else training.model
    revision = None if checkpoint else training.model_revision
    if checkpoint is not None:
        _check_config(checkpoint)
    config = load_config(source, model_fields, revision) if source else OptVQConfig(**model_fields)
    plan = plan_memory(config, recipe, accelerator.device)
    accelerator.print(f"needs {plan}")
    if training.check_memory:
        check_memory(plan, config, recipe, accelerator.device)
    model, image_processor = load_model(source, model_fields, revision) if source else make_model(model_fields)
    processes = (accelerator.process_index, accelerator.num_processes)
    batches = training_batches(data, image_processor, training.batch_size, training.seed, *processes)
    if accelerator.is_main_process:
        warn_of_lost_colour(batches.reader.images, model.config.num_channels)
    total_steps = _total_steps(recipe, data, batches)
    settings = {**recipe.as_flags(), **asdict(data), **model_fields, "resume": None}
    resumed = ""
    if checkpoint is not None:
        resumed = f"{checkpoint}{changed_settings(checkpoint, settings, (*map(type, recipe), DataArguments))}"

    def unseen() -> Iterable[torch.Tensor]:
        return evaluation_batches(data, image_processor, training.batch_size, training.eval_images)

    for _ in evaluation_batches(data, image_processor, training.batch_size, NUM_CHECKED):
        pass  # too many unreadable images must fail before training, not after
    score_unseen = None if score is None else lambda model: score(model, unseen())
    run = TrainingRun(model, image_processor, batches, total_steps, recipe, accelerator, score_unseen, settings)
    if checkpoint is not None:
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


def changed_settings(checkpoint: Path, settings: dict, arguments: Iterable[type]) -> str:
    """Says which settings changed since the checkpoint.

    Args:
        arguments: Dataclasses of flags, which say what may change on resume. Fields of the model may not.

    Raises:
        ValueError: If a setting changed that may not.
    """
    before, changeable = read_state(checkpoint).settings, may_change_on_resume(*arguments)
    names = [name for name in before.keys() | settings.keys() if before.get(name) != settings.get(name)]
    changed = {name: f"{name} {before.get(name)} -> {settings.get(name)}" for name in sorted(names)}
    fixed = [text for name, text in changed.items() if name not in changeable]
    if fixed:
        raise ValueError(
            f"cannot resume {checkpoint} with {', '.join(fixed)}: a resumed run must compute the same; start a new run with "
            f"--model {checkpoint}, or restore these settings (recipe.yaml has them)"
        )
    told = [text for name, text in changed.items() if name not in UNTOLD]
    return f" with {', '.join(told)}" if told else ""


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
