"""The numbers of a training run. The model's own are in OptVQConfig."""

from dataclasses import dataclass
from typing import Literal

from ..data.arguments import argument


@dataclass
class TrainingArguments:
    """One training run."""

    _argument_group_name = "training"

    output_dir: str = argument("runs/optvq", "Folder for the model, metrics, pictures and logs")
    model: str | None = argument(None, "Hub id or folder of a model to go on from; by default a new one is made")
    max_steps: int | None = argument(None, "Optimizer steps; by default --num-epochs decides")
    num_epochs: int = argument(1, "Passes over the training split, unless --max-steps is given")
    batch_size: int = argument(64, "Images per step and process")
    learning_rate: float = argument(1e-3, "Peak of the one-cycle schedule")
    warmup_ratio: float = argument(0.01, "Share of the steps in which the learning rate rises to its peak")
    adam_beta2: float = argument(
        0.99, "Decay of AdamW's second moments; a short run wants less memory than torch's 0.999"
    )
    weight_decay: float = argument(0.05, "AdamW's weight decay, on convolution and linear weights only")
    max_grad_norm: float = argument(1.0, "Global gradient norm to clip to")
    l1_weight: float = argument(1.0, "Weight of the mean absolute pixel error in the loss")
    l2_weight: float = argument(1.0, "Weight of the mean squared pixel error in the loss")
    quantizer_weight: float = argument(1.0, "Weight of the quantizer's loss in the loss")
    mixed_precision: Literal["no", "bf16"] | None = argument(
        None,
        "Precision of encoder and decoder, by default that of `accelerate config`; the transport is always float32",
    )
    seed: int = argument(0, "Seed of weights, data order and sampling")
    log_every: int = argument(10, "Steps between two lines of the log")
    images_every: int = argument(200, "Steps between two pictures of reconstructions; 0 for none")
    save_every: int = argument(0, "Steps between two saved models, in OUTPUT_DIR/checkpoint-STEP; 0 for the last alone")
    report_to: Literal["tensorboard", "none"] = argument("tensorboard", "Tracker")

    def __post_init__(self):
        for name in ("batch_size", "num_epochs", "log_every", "learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0, got {getattr(self, name)}")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {self.max_steps}")
        for name in ("warmup_ratio", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        for name in ("weight_decay", "l1_weight", "l2_weight", "quantizer_weight", "images_every", "save_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or greater, got {getattr(self, name)}")
