"""Settings of a training run. Those of the model are in OptVQConfig."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from ..data.arguments import LARGEST_COUNT, LARGEST_SEED, argument, check_most


def _check(arguments: Any, lower: str, *names: str) -> None:
    """Raises ValueError unless each of these fields is None or a finite number `> 0`, `>= 0`, `>= 1`, or in `[0, 1)`.

    Integers may be at most [`LARGEST_COUNT`].
    """
    tests = {
        "> 0": ("be greater than 0", lambda value: value > 0),
        ">= 0": ("be 0 or greater", lambda value: value >= 0),
        ">= 1": ("be at least 1", lambda value: value >= 1),
        "[0, 1)": ("lie in [0, 1)", lambda value: 0 <= value < 1),
    }
    must, test = tests[lower]
    for name in names:
        value = getattr(arguments, name)
        if isinstance(value, int):
            check_most(arguments, **{name: LARGEST_COUNT})
        if value is not None and not (test(value) and math.isfinite(value)):
            raise ValueError(f"{name} must {must}{'' if math.isfinite(value) else ' and be finite'}, got {value}")


@dataclass
class TrainingArguments:
    """Length, precision, checkpoints and output of a run."""

    _argument_group_name = "training"

    output_dir: str = argument(
        "runs/optvq", "Folder for the model, checkpoints, metrics, pictures and logs", may_change_on_resume=True
    )
    model: str | None = argument(
        None, "Hub id or folder of a model to start from; by default a new model", may_change_on_resume=True
    )
    model_revision: str | None = argument(
        None, "Branch, tag or commit of a model on the Hub", may_change_on_resume=True
    )
    resume: str | None = argument(
        None,
        "Checkpoint to resume from: its folder, the Hub id that a run was pushed to, or `auto` for the newest intact one in "
        "OUTPUT_DIR, if there is one; of a finished run, `auto` does only what is missing",
        may_change_on_resume=True,
    )
    overwrite: bool = argument(
        False,
        "Remove the earlier run in OUTPUT_DIR, with its model and checkpoints, and start anew",
        may_change_on_resume=True,
    )
    max_steps: int | None = argument(
        None,
        "Optimizer steps; by default --num-epochs decides. A resumed run may get more: its schedules continue as those of a "
        "run of this length",
        may_change_on_resume=True,
    )
    num_epochs: int = argument(
        1, "Passes over the training split, unless --max-steps is given", may_change_on_resume=True
    )
    batch_size: int = argument(
        64, "Images per batch and process; the transport balances the batches of all processes together"
    )
    gradient_accumulation_steps: int = argument(1, "Batches per optimizer step and process")
    mixed_precision: Literal["no", "bf16"] | None = argument(
        None,
        "Precision of encoder, decoder and discriminator; by default that of `accelerate config`. Transport and losses are "
        "always float32",
        may_change_on_resume=True,
    )
    gradient_checkpointing: bool = argument(
        False, "Recompute activations in the backward pass, to save memory", may_change_on_resume=True
    )
    compile: bool = argument(
        False, "Compile the encoder, and the stages of a VQGAN's decoder, with torch.compile", may_change_on_resume=True
    )
    channels_last: bool = argument(
        False,
        "Use channels-last memory format for images and convolutions; faster on GPUs with bf16",
        may_change_on_resume=True,
    )
    solver: Literal["auto", "torch", "fused"] = argument(
        "auto",
        "Solver of the transport: `fused` for Triton kernels (GPUs), `torch`, or `auto` for kernels on GPUs on which they pass "
        "a check",
        may_change_on_resume=True,
    )
    freeze_encoder: bool = argument(
        False, "Do not train the encoder; with --freeze-codebook the codes of a model stay as they are"
    )
    freeze_decoder: bool = argument(False, "Do not train the decoder")
    check_memory: bool = argument(
        True, "Refuse a run that needs more memory than the device has free", may_change_on_resume=True
    )
    seed: int = argument(0, "Seed of the first weights, the data order and all randomness in training")
    save_every: int = argument(
        0,
        "Steps between two checkpoints (OUTPUT_DIR/checkpoint-STEP); 0 writes one only if the run is stopped",
        may_change_on_resume=True,
    )
    keep_checkpoints: int = argument(
        2, "Number of newest checkpoints to keep; the best one is always kept", may_change_on_resume=True
    )
    push_to_hub: str | None = argument(
        None,
        "Hub id to push every checkpoint and the finished model to; --resume takes the same id",
        may_change_on_resume=True,
    )
    hub_private: bool = argument(False, "Make the repository of --push-to-hub private", may_change_on_resume=True)
    eval_images: int = argument(
        500,
        "Number of images of the evaluation split, a random sample (of a stream, the first), that score checkpoints to find "
        "the best; 0 scores none",
        may_change_on_resume=True,
    )

    def __post_init__(self) -> None:
        _check(self, "> 0", "batch_size", "num_epochs", "gradient_accumulation_steps")
        _check(self, ">= 1", "max_steps", "keep_checkpoints")
        _check(self, ">= 0", "save_every", "eval_images", "seed")
        check_most(self, batch_size=10**6, gradient_accumulation_steps=10**4, seed=LARGEST_SEED)


@dataclass
class OptimizationArguments:
    """Optimizers, learning rate schedules and the EMA of the weights."""

    _argument_group_name = "optimization"

    learning_rate: float = argument(1e-3, "Peak learning rate of the one-cycle schedule")
    change_learning_rate: bool = argument(
        False,
        "Let --learning-rate and --discriminator-learning-rate differ from those of the run that --resume continues: the rest "
        "of their schedules is multiplied by new / old",
        may_change_on_resume=True,
    )
    codebook_learning_rate_multiplier: float = argument(
        1.0, "Learning rate of codebook and projection, as a multiple of --learning-rate"
    )
    warmup_ratio: float = argument(0.01, "Share of the steps in which the learning rate rises to its peak")
    adam_beta2: float = argument(
        0.99, "Decay of AdamW's second moments; short runs need a shorter memory than torch's 0.999"
    )
    weight_decay: float = argument(0.05, "Weight decay of AdamW, on convolution and linear weights only")
    max_grad_norm: float = argument(1.0, "Global norm to which the gradients of each network are clipped")
    ema_decay: float = argument(
        0.0, "Decay of the EMA of the weights, which is saved and evaluated beside the model; 0 for none"
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
    perceptual_weight: float = argument(
        0.0, "Weight of the perceptual loss LPIPS; its network is downloaded only if this is above 0"
    )
    perceptual_network: Literal["vgg", "alex", "squeeze"] = argument("vgg", "Network of LPIPS")
    adversarial_weight: float = argument(
        0.0, "Weight of the adversarial loss, multiplied by the adaptive weight; above 0, a discriminator is trained"
    )
    discriminator_start: int = argument(0, "First step (from 0) of the adversarial loss and of the discriminator")
    discriminator_ramp: int = argument(0, "Steps after the start over which the adversarial weight rises from 0")
    discriminator_loss: Literal["hinge", "vanilla"] = argument("hinge", "Loss of the discriminator")
    discriminator_weight: float = argument(1.0, "Weight of the discriminator's loss")
    discriminator_learning_rate: float | None = argument(
        None, "Peak learning rate of the discriminator; by default --learning-rate"
    )
    discriminator_channels: int = argument(64, "Channels after the discriminator's first layer")
    discriminator_layers: int = argument(3, "Strided layers of the discriminator; 3 see patches of 70 x 70 pixels")
    discriminator_weights: str | None = argument(
        None,
        "Discriminator to start from: the folder or Hub id of a model that has one (a checkpoint, or from `optvq convert "
        "--with-discriminator`), or the discriminator's own folder",
        may_change_on_resume=True,
    )
    r1_weight: float = argument(0.0, "Weight of the R1 penalty on the discriminator's gradient at real images")
    r1_every: int = argument(16, "Steps between two R1 penalties; each is multiplied by this number")
    lecam_weight: float = argument(0.0, "Weight of the LeCam regularisation of the discriminator's logits")

    def __post_init__(self) -> None:
        weights = (name for name in self.__dataclass_fields__ if name.endswith("_weight"))
        _check(self, ">= 0", *weights, "discriminator_start", "discriminator_ramp")
        _check(self, ">= 1", "discriminator_channels", "discriminator_layers", "r1_every")
        check_most(self, discriminator_channels=4096, discriminator_layers=16)
        _check(self, "> 0", "discriminator_learning_rate")


@dataclass
class CodebookArguments:
    """First codes, schedules of the assignment, and dead codes."""

    _argument_group_name = "codebook"

    codebook_start: Literal["normal", "samples", "kmeans"] = argument(
        "normal", "First codes: random (normal), encoder features (samples), or the centres of their clusters (kmeans)"
    )
    codebook_start_batches: int = argument(16, "Batches per process whose features `samples` and `kmeans` use")
    whiten_latents: bool = argument(
        False,
        "Before the first step, give every channel of the latents mean 0 and standard deviation 1, by the convolutions around "
        "the quantizer; needs --codebook-start",
    )
    quantization_start: int = argument(
        0, "Steps in which encoder and decoder train without quantization; the codebook starts after them"
    )
    epsilon_schedule: list[float] | None = argument(
        None, "First and last value of sinkhorn_epsilon, with geometric interpolation"
    )
    balance_schedule: list[float] | None = argument(
        None, "First and last value of sinkhorn_balance, with linear interpolation"
    )
    reseed_dead_codes_after: int = argument(
        0, "Steps without use after which a dead code is moved onto a feature of the batch; 0 for never"
    )

    def __post_init__(self) -> None:
        _check(self, ">= 1", "codebook_start_batches")
        if self.whiten_latents and self.codebook_start == "normal":
            raise ValueError(
                "--whiten-latents moves the latents away from the codes: it needs --codebook-start samples or kmeans"
            )
        check_most(self, codebook_start_batches=10**4)
        _check(self, ">= 0", "quantization_start", "reseed_dead_codes_after")
        for name in ("epsilon_schedule", "balance_schedule"):
            values = getattr(self, name)
            if values is None:
                continue
            if len(values) != 2:
                raise ValueError(f"{name} needs two values, the first and the last, got {len(values)}")
            if name == "epsilon_schedule" and not all(0 < value < math.inf for value in values):
                raise ValueError(f"{name} must be finite and greater than 0, got {values}")
            if name == "balance_schedule" and not all(0 <= value <= 1 for value in values):
                raise ValueError(f"{name} must lie in [0, 1], got {values}")


@dataclass
class RecordArguments:
    """Log, pictures and tracker, and what the run does about problems."""

    _argument_group_name = "record"

    log_every: int = argument(10, "Steps between two lines of the log", may_change_on_resume=True)
    images_every: int = argument(
        200, "Steps between two pictures of reconstructions; 0 for none", may_change_on_resume=True
    )
    report_to: Literal["tensorboard", "trackio", "wandb", "none"] = argument(
        "tensorboard", "Tracker that gets the log", may_change_on_resume=True
    )
    tracker_project: str = argument(
        "optvq", "Project in trackio or wandb; the run is named after the output folder", may_change_on_resume=True
    )
    max_nonfinite_steps: int = argument(
        10,
        "Skipped steps in a row (loss or gradient not finite) that end the run; counted at every line of the log",
        may_change_on_resume=True,
    )
    lower_discriminator_rate: bool = argument(
        False,
        "Halve the discriminator's learning rate whenever the alarm `discriminator_wins` is raised",
        may_change_on_resume=True,
    )

    def __post_init__(self) -> None:
        _check(self, ">= 1", "log_every", "max_nonfinite_steps")
        _check(self, ">= 0", "images_every")


class Recipe(NamedTuple):
    """All settings of a run but those of the data and the model."""

    training: TrainingArguments
    optimization: OptimizationArguments
    objective: ObjectiveArguments
    codebook: CodebookArguments
    record: RecordArguments

    def as_flags(self) -> dict:
        return {name: value for arguments in self for name, value in asdict(arguments).items()}
