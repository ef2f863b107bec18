"""Prepares a run from a recipe: finds checkpoint, model, data and length, and checks that they fit together."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset

from ..configuration_optvq import OptVQConfig
from ..data.arguments import DataArguments, may_change_on_resume
from ..data.batches import EvaluationBatches, ImageReader, TrainingBatches, evaluation_batches, training_batches
from ..data.fetching import find_folder
from ..data.latents import latent_batches
from ..data.loading import count_images, hub_id
from ..data.probe import warn_of_lost_colour
from ..image_processing_optvq import OptVQImageProcessor
from ..modeling_optvq import OptVQModel
from ..parsing import parse_yaml
from .arguments import Recipe, TrainingArguments
from .checkpoints import LAST_CHECKPOINT, find_checkpoint, is_inside, read_state
from .integrity import BrokenCheckpointError
from .memory import check_memory, plan_memory
from .models import load_config, load_model, make_model, note_source
from .results import place_result
from .run_folder import RunFolder
from .trainer import TrainingRun
from .watching.log import RECIPE_FILE
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
    open_latents: Callable[[DataArguments, OptVQModel, OptVQImageProcessor], tuple[Dataset, str]] | None = None,
) -> tuple[TrainingRun, str]:
    """Makes a run, at its first step or at that of the checkpoint. Wrong settings fail here, before training.

    Args:
        model_fields: Fields of the configuration that differ from the defaults, or from those of the given model.
        score: Mean squared error of a model on batches of unseen images.
        accelerator: By default a new one.
        open_latents: Opens the latents of `data`, with a digest of them; see [`~tokenization.latents.load_latents`].

    Returns:
        The run, and a message that says what it resumes; empty for a new run.

    Raises:
        ValueError, OSError, ImportError: If something does not exist or does not fit; the message says what.
    """
    training = recipe.training
    accelerator = accelerator or make_accelerator(recipe)
    if accelerator.is_main_process:
        place_result(Path(training.output_dir))
    accelerator.wait_for_everyone()
    start = _find_start(training)
    _check_agreement(start.checkpoint, accelerator.num_processes)
    training.mixed_precision = "bf16" if accelerator.mixed_precision == "bf16" else "no"
    set_seed(training.seed)
    model, image_processor = _make_model(start, recipe, model_fields, data, accelerator)
    processes = (accelerator.process_index, accelerator.num_processes)
    if data.latents is None:
        batches = training_batches(data, image_processor, training.batch_size, training.seed, *processes)
        if accelerator.is_main_process and isinstance(batches.reader, ImageReader):
            warn_of_lost_colour(batches.reader.images, model.config.num_channels)
    else:
        assert open_latents is not None
        latents = open_latents(data, model, image_processor)
        batches = latent_batches(*latents, training.batch_size, training.seed, *processes)
    total_steps = _total_steps(recipe, data, batches)
    if start.continues:
        start.output_dir.check_length(total_steps)
    settings = {**recipe.as_flags(), **asdict(data), **model_fields, **NOT_KEPT}
    resumed = _what_is_resumed(start, recipe, total_steps, settings)
    _check_images(data, image_processor, batches, training)
    _check_whitening(model.config, recipe)

    def score_unseen(model: OptVQModel) -> float:
        assert score is not None
        return score(model, _some_unseen(data, image_processor, training.batch_size, training.eval_images))

    names = {"dataset": data.dataset, "dataset_id": hub_id(data.dataset or "")}
    names["base_model_id"] = hub_id(training.model or "")  # here: in another folder, the name may be no folder
    run = TrainingRun(
        model,
        image_processor,
        batches,
        total_steps,
        recipe,
        accelerator,
        None if score is None else score_unseen,
        settings,
        dataset=names,
        of_latents=data.latents is not None,
    )
    if start.is_finished:
        run.restore_result()
    elif start.checkpoint is not None:
        run.resume(start.checkpoint)
    return run, resumed


# ---- where a run starts ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """Where a run starts: anew, at a checkpoint, or at the result of a finished run.

    Args:
        output_dir: Its output folder.
        checkpoint: The checkpoint that it resumes, or None.
        is_finished: Whether the output folder holds the result of a run of the length that is asked for.
    """

    output_dir: RunFolder
    checkpoint: Path | None = None
    is_finished: bool = False

    @property
    def continues(self) -> bool:
        """Whether it continues the run in its output folder; otherwise no run may be there, or it is to be removed."""
        return self.is_finished or (self.checkpoint is not None and is_inside(self.checkpoint, self.output_dir.path))

    @property
    def folder(self) -> Path | None:
        """Folder of the model that it starts from; None for a new run."""
        return self.output_dir.path if self.is_finished else self.checkpoint


def _find_start(training: TrainingArguments) -> Start:
    """Where the run starts; refuses to write over an earlier run.

    Raises:
        ValueError: If the output folder holds an earlier run that the command does not continue, or a longer one.
        OSError: If there is no such checkpoint.
    """
    folder = RunFolder(Path(training.output_dir))
    if training.resume == "auto" and _is_finished(training, folder):
        return Start(folder, is_finished=True)
    start = Start(folder, find_checkpoint(_fetched(training.resume), folder.path))
    if start.checkpoint is None and training.resume == "auto" and folder.finished_steps:
        raise ValueError(
            f"the finished run in {folder.path} has no checkpoint to extend it from: start a new run with --model "
            f"{folder.path} and another --output-dir"
        )
    if start.continues and training.overwrite:
        raise ValueError(f"--overwrite would remove {start.folder}, which --resume names: choose one of the two")
    if not (start.continues or training.overwrite):
        if start.checkpoint is None:
            folder.check_new_run()
        else:
            folder.check_run_from(start.checkpoint)
    return start


def _is_finished(training: TrainingArguments, folder: RunFolder) -> bool:
    """Whether the output folder holds the result of a run of the length that is asked for.

    Raises:
        ValueError: If it is the result of a longer run.
    """
    steps = folder.finished_steps
    if steps is None:
        return False
    if training.max_steps is None:
        before = _recorded_settings(folder.path)
        return before.get("max_steps") is None and before.get("num_epochs") == training.num_epochs
    folder.check_length(training.max_steps)
    return training.max_steps == steps


def _recorded_settings(output_dir: Path) -> dict:
    """Settings of the run whose result is in the output folder."""
    try:
        return parse_yaml((output_dir / RECIPE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the settings of the finished run: {error}") from error


def _fetched(resume: str | None) -> str | None:
    """The local folder that `--resume` names; a checkpoint on the Hub is downloaded."""
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


# ---- model, length and data ------------------------------------------------------------------------------------------


def _make_model(
    start: Start, recipe: Recipe, model_fields: dict, data: DataArguments, accelerator: Accelerator
) -> tuple[OptVQModel, OptVQImageProcessor]:
    """The model that the run starts with; before it is made, what it needs is printed and, if that is too much, refused."""
    training = recipe.training
    source, revision = (str(start.folder), None) if start.folder else (training.model, training.model_revision)
    if start.checkpoint is not None:
        _check_config(start.checkpoint)
    config = load_config(source, model_fields, revision) if source else OptVQConfig(**model_fields)
    if not start.is_finished:
        of_latents = data.latents is not None
        plan = plan_memory(config, recipe, accelerator.device, of_latents)
        accelerator.print(f"needs {plan}")
        if training.check_memory:
            check_memory(plan, config, recipe, accelerator.device, lambda: count_images(data), of_latents)
    if source is None:
        return make_model(model_fields)
    model, image_processor = load_model(source, model_fields, revision)
    if not start.folder:
        note_source(model.config, source, revision)
    return model, image_processor


def _check_whitening(config: OptVQConfig, recipe: Recipe) -> None:
    """Raises ValueError if the latents of a model cannot be whitened."""
    if not recipe.codebook.whiten_latents:
        return
    if not config.use_quant_conv:
        raise ValueError(
            "--whiten-latents needs convolutions around the quantizer, which the model lacks: add them with "
            "--use-quant-conv true"
        )
    if config.normalize_latents:
        raise ValueError("--whiten-latents is of no use here: the model scales latents to length 1 (normalize_latents)")


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


def _check_images(
    data: DataArguments, image_processor: OptVQImageProcessor, batches: TrainingBatches, training: TrainingArguments
) -> None:
    """Reads some images of the evaluation split, and of the training split if the run removes an earlier one.

    Raises:
        ValueError: If none of the former or too many of the latter can be read.
    """
    checked = _some_unseen(data, image_processor, training.batch_size, NUM_CHECKED)
    if sum(map(len, checked)) == 0:  # must fail before training, not after
        raise ValueError(
            f"none of {checked.num_images} images of split {data.evaluated_split!r} can be read: "
            f"{checked.last_unreadable}"
        )
    if training.overwrite:
        next(iter(TrainingBatches(batches.order, batches.reader, max_unreadable=data.max_unreadable)))


def _some_unseen(
    data: DataArguments, image_processor: OptVQImageProcessor, batch_size: int, number: int
) -> EvaluationBatches:
    """Some images of the evaluation split; how many of them may be unreadable is a share of the whole split."""
    batches = evaluation_batches(data, image_processor, batch_size, number)
    if isinstance(batches.order.images, Dataset):
        batches.num_expected = len(batches.order.images)
    return batches


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


# ---- what is resumed -------------------------------------------------------------------------------------------------


def _what_is_resumed(start: Start, recipe: Recipe, total_steps: int, settings: dict) -> str:
    """The message that says what is resumed; empty for a new run.

    Raises:
        ValueError: If a setting changed that may not.
    """
    changeable = may_change_on_resume(*map(type, recipe), DataArguments)
    if start.is_finished:
        folder = start.output_dir.path
        changed_settings(folder, _recorded_settings(folder), settings, changeable)
        return f"the finished run of {total_steps} steps in {folder}: only what is missing is done"
    if start.checkpoint is None:
        return ""
    if recipe.optimization.change_learning_rate:
        changeable |= LEARNING_RATES
    state = read_state(start.checkpoint)
    resumed = f"{start.checkpoint}{changed_settings(start.checkpoint, state.settings, settings, changeable)}"
    if state.total_steps != total_steps:
        resumed += (
            f"; from step {state.step} on, all schedules are those of a run of {total_steps} steps instead of "
            f"{state.total_steps}"
        )
    return resumed


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
