"""The numbers of a training run. The model's own are in OptVQConfig."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from ..data.arguments import argument
from .losses.adversarial import DiscriminatorLoss
from .losses.perceptual import Network


def _check(arguments: Any, lower: str, *names: str) -> None:
    """Each of these fields must be a number `> 0`, `>= 0`, `>= 1`, or in `[0, 1)`."""
    tests = {
        "> 0": ("be greater than 0", lambda value: value > 0),
        ">= 0": ("be 0 or greater", lambda value: value >= 0),
        ">= 1": ("be at least 1", lambda value: value >= 1),
        "[0, 1)": ("lie in [0, 1)", lambda value: 0 <= value < 1),
    }
    must, test = tests[lower]
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not test(value):
            raise ValueError(f"{name} must {must}, got {value}")


@dataclass
class TrainingArguments:
    """How long a run is, on what, and what it keeps."""

    _argument_group_name = "training"

    output_dir: str = argument(
        "runs/optvq", "Folder for the model, checkpoints, metrics, pictures and logs", may_change_on_resume=True
    )
    model: str | None = argument(
        None, "Hub id or folder of a model to start from; by default a new one is made", may_change_on_resume=True
    )
    model_revision: str | None = argument(
        None, "Branch, tag or commit of a model on the Hub", may_change_on_resume=True
    )
    resume: str | None = argument(
        None,
        "A checkpoint's folder, the Hub id that a run was pushed to, or `auto` for the newest complete one in OUTPUT_DIR, if "
        "there is one",
        may_change_on_resume=True,
    )
    max_steps: int | None = argument(
        None, "Optimizer steps; by default --num-epochs decides", may_change_on_resume=True
    )
    num_epochs: int = argument(
        1, "Passes over the training split, unless --max-steps is given", may_change_on_resume=True
    )
    batch_size: int = argument(64, "Images per batch and process; the transport balances them together")
    gradient_accumulation_steps: int = argument(1, "Batches per optimizer step and process")
    mixed_precision: Literal["no", "bf16"] | None = argument(
        None,
        "Precision of encoder, decoder and discriminator, by default that of `accelerate config`; transport and losses are "
        "always float32",
        may_change_on_resume=True,
    )
    gradient_checkpointing: bool = argument(
        False, "Compute activations again in the backward pass, to save memory", may_change_on_resume=True
    )
    compile: bool = argument(
        False, "Compile the encoder, and the stages of a VQGAN's decoder, with torch.compile", may_change_on_resume=True
    )
    channels_last: bool = argument(
        False, "Memory format of images and convolutions; faster on GPUs with bf16", may_change_on_resume=True
    )
    seed: int = argument(0, "Seed of weights, data order and everything random in training")
    save_every: int = argument(
        0,
        "Steps between two checkpoints, OUTPUT_DIR/checkpoint-STEP; 0 for none before the end",
        may_change_on_resume=True,
    )
    keep_checkpoints: int = argument(
        2, "Newest checkpoints to keep; the best one is kept besides", may_change_on_resume=True
    )
    push_to_hub: str | None = argument(
        None,
        "Hub id to publish the finished model to, and every checkpoint while it trains, from which --resume resumes",
        may_change_on_resume=True,
    )
    hub_private: bool = argument(False, "Make that repository private", may_change_on_resume=True)
    eval_images: int = argument(
        500,
        "Images of the evaluation split whose error decides which checkpoint is the best; 0 for none",
        may_change_on_resume=True,
    )

    def __post_init__(self) -> None:
        _check(self, "> 0", "batch_size", "num_epochs", "gradient_accumulation_steps")
        _check(self, ">= 1", "max_steps", "keep_checkpoints")
        _check(self, ">= 0", "save_every", "eval_images")


@dataclass
class OptimizationArguments:
    """Optimizers, schedules and averages of weights."""

    _argument_group_name = "optimization"

    learning_rate: float = argument(1e-3, "Peak of the one-cycle schedule")
    codebook_learning_rate_multiplier: float = argument(1.0, "Learning rate of codebook and projection, relative")
    warmup_ratio: float = argument(0.01, "Share of the steps in which the learning rate rises to its peak")
    adam_beta2: float = argument(
        0.99, "Decay of AdamW's second moments; a short run wants a shorter memory than torch's 0.999"
    )
    weight_decay: float = argument(0.05, "AdamW's weight decay, on convolution and linear weights only")
    max_grad_norm: float = argument(1.0, "Global gradient norm to clip to, of either network")
    ema_decay: float = argument(
        0.0, "Decay of an exponential moving average of the weights, kept and evaluated beside them; 0 for none"
    )

    def __post_init__(self) -> None:
        _check(self, "> 0", "learning_rate", "codebook_learning_rate_multiplier", "max_grad_norm")
        _check(self, "[0, 1)", "warmup_ratio", "adam_beta2", "ema_decay")
        _check(self, ">= 0", "weight_decay")


@dataclass
class ObjectiveArguments:
    """The losses and the discriminator."""

    _argument_group_name = "objective"

    l1_weight: float = argument(1.0, "Weight of the mean absolute pixel error")
    l2_weight: float = argument(1.0, "Weight of the mean squared pixel error")
    quantizer_weight: float = argument(1.0, "Weight of the quantizer's loss")
    perceptual_weight: float = argument(0.0, "Weight of LPIPS; its network is downloaded only if this is above 0")
    perceptual_network: Network = argument("vgg", "Network of LPIPS")
    adversarial_weight: float = argument(
        0.0, "Weight of the adversarial loss, times the adaptive weight; above 0 there is a discriminator"
    )
    discriminator_start: int = argument(0, "First step, from 0, of the adversarial loss and of the discriminator")
    discriminator_ramp: int = argument(0, "Steps after the start in which the adversarial weight rises from 0")
    discriminator_loss: DiscriminatorLoss = argument("hinge", "Loss of the discriminator")
    discriminator_weight: float = argument(1.0, "Weight of the discriminator's loss")
    discriminator_learning_rate: float | None = argument(
        None, "Peak of the discriminator's one-cycle schedule; by default that of the model"
    )
    discriminator_channels: int = argument(64, "Channels after the discriminator's first layer")
    discriminator_layers: int = argument(3, "Strided layers of the discriminator; 3 see patches of 70 x 70 pixels")
    discriminator_weights: str | None = argument(
        None,
        "Discriminator to begin with: a model's folder or Hub id, as `optvq convert --with-discriminator` or a checkpoint has "
        "one, or the discriminator's own folder",
        may_change_on_resume=True,
    )
    r1_weight: float = argument(0.0, "Weight of the R1 penalty on the discriminator's gradient at real images")
    r1_every: int = argument(16, "Steps between two R1 penalties, each weighted with that many steps")
    lecam_weight: float = argument(
        0.0, "Weight of the LeCam regularisation, which ties real and fake logits to each other's running means"
    )

    def __post_init__(self) -> None:
        weights = (name for name in self.__dataclass_fields__ if name.endswith("_weight"))
        _check(self, ">= 0", *weights, "discriminator_start", "discriminator_ramp")
        _check(self, ">= 1", "discriminator_channels", "discriminator_layers", "r1_every")
        _check(self, "> 0", "discriminator_learning_rate")


@dataclass
class CodebookArguments:
    """How the codebook begins and how its assignment changes over the run."""

    _argument_group_name = "codebook"

    codebook_start: Literal["normal", "samples", "kmeans"] = argument(
        "normal", "First codes: random, encoder features, or the centres of their clusters"
    )
    codebook_start_batches: int = argument(16, "Batches per process whose features `samples` and `kmeans` look at")
    quantization_start: int = argument(
        0, "Steps that train encoder and decoder without quantization; the codebook starts after them"
    )
    epsilon_schedule: list[float] | None = argument(
        None, "First and last value of sinkhorn_epsilon, between which it changes geometrically"
    )
    balance_schedule: list[float] | None = argument(
        None, "First and last value of sinkhorn_balance, between which it changes linearly"
    )
    reseed_dead_codes_after: int = argument(
        0, "Steps after which a code that no image uses is put on a feature of the batch; 0 for never"
    )

    def __post_init__(self) -> None:
        _check(self, ">= 1", "codebook_start_batches")
        _check(self, ">= 0", "quantization_start", "reseed_dead_codes_after")
        for name in ("epsilon_schedule", "balance_schedule"):
            values = getattr(self, name)
            if values is None:
                continue
            if len(values) != 2:
                raise ValueError(f"{name} needs two values, the first and the last, got {len(values)}")
            if name == "epsilon_schedule" and not min(values) > 0:
                raise ValueError(f"{name} must be greater than 0, got {values}")
            if name == "balance_schedule" and not 0 <= min(values) <= max(values) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {values}")


@dataclass
class RecordArguments:
    """What is recorded, and what is done about trouble."""

    _argument_group_name = "record"

    log_every: int = argument(10, "Steps between two lines of the log", may_change_on_resume=True)
    images_every: int = argument(
        200, "Steps between two pictures of reconstructions; 0 for none", may_change_on_resume=True
    )
    report_to: Literal["tensorboard", "trackio", "wandb", "none"] = argument(
        "tensorboard", "Tracker", may_change_on_resume=True
    )
    tracker_project: str = argument(
        "optvq", "Project in trackio or wandb; the run is named after its output folder", may_change_on_resume=True
    )
    max_nonfinite_steps: int = argument(
        10,
        "Steps in a row that may be skipped because loss or gradient are not finite; more end the run at the next log line",
        may_change_on_resume=True,
    )
    lower_discriminator_rate: bool = argument(
        False,
        "Halve the discriminator's learning rate whenever the alarm `discriminator_wins` begins",
        may_change_on_resume=True,
    )

    def __post_init__(self) -> None:
        _check(self, ">= 1", "log_every", "max_nonfinite_steps")
        _check(self, ">= 0", "images_every")


class Recipe(NamedTuple):
    """Everything that decides a run, besides the data and the model."""

    training: TrainingArguments
    optimization: OptimizationArguments
    objective: ObjectiveArguments
    codebook: CodebookArguments
    record: RecordArguments

    def as_flags(self) -> dict:
        return {name: value for arguments in self for name, value in asdict(arguments).items()}
