"""Settings of an evaluation, and of a comparison of several quantizers."""

import math
from dataclasses import dataclass, field
from typing import Literal

from ..data.arguments import LARGEST_COUNT, argument, check_most
from .protocols import METRICS, check_metrics


EVALUATED_ASSIGNMENTS = ("nearest", "potentials", "sinkhorn")


@dataclass
class EvaluationArguments:
    """Models, metrics, assignments and images of an evaluation."""

    _argument_group_name = "evaluation"

    model: list[str] | None = argument(None, "Hub ids or folders of one or more models, compared on the same images")
    model_revision: str | None = argument(None, "Branch, tag or commit of a model on the Hub")
    output_dir: str | None = argument(
        None,
        "Folder for metrics.json and the pictures; by default the model's folder, or runs/OWNER--NAME for a Hub id. Of several "
        "models, each has a folder in it, beside the table in three formats",
    )
    protocol: Literal["rgb", "optvq"] = argument(
        "rgb",
        "Metrics by the work that reports them: rgb is mse, psnr and ssim of all channels; optvq is what the original "
        "implementation computes (psnr and ssim of luma, lpips_alex, fid), with codes by sinkhorn",
    )
    metrics: list[str] | None = argument(
        None,
        f"Metrics in place of the protocol's: {', '.join(METRICS)}",
    )
    table: Literal["text", "markdown", "latex"] = argument("text", "Format of the table that is printed")
    assignment: list[str] | None = argument(
        None,
        "One or more of nearest, potentials and sinkhorn, compared on the same images; by default that of the model",
    )
    batch_size: int = argument(64, "Images per batch; changes only the codes of sinkhorn")
    tile_size: int | None = argument(
        None, "Encode and decode in tiles with sides of so many pixels, which bounds the memory that large images take"
    )
    solver: Literal["auto", "torch", "fused"] = argument(
        "auto", "Search for codes: `fused` for Triton kernels (GPUs), `torch`, or `auto`; codes are the same"
    )
    max_images: int | None = argument(
        None, "Most images to evaluate, a random sample (of a stream, the first); by default all"
    )
    overwrite: bool = argument(
        False,
        "Replace an earlier result also if it is of other weights or another dataset, or has more images or assignments",
    )

    def __post_init__(self) -> None:
        check_metrics(self.metrics or ())
        for name in ("model", "metrics", "assignment"):
            values = getattr(self, name) or ()
            if len(set(values)) < len(values):
                raise ValueError(f"{name} names one twice: {' '.join(values)}")
        if self.model_revision and len(self.model or ()) > 1:
            raise ValueError(f"model_revision is of one model, got {len(self.model or ())} models")
        for name in self.assignment or ():
            if name not in EVALUATED_ASSIGNMENTS:
                raise ValueError(f"assignment must be of {', '.join(EVALUATED_ASSIGNMENTS)}, got {name!r}")
        check_most(self, batch_size=10**6, max_images=LARGEST_COUNT, tile_size=2**16)
        for name in ("batch_size", "max_images", "tile_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass
class ComparisonArguments:
    """Rivals, learning rates and length of a comparison."""

    _argument_group_name = "comparison"

    output_dir: str | None = argument(None, "Folder of the comparison; started again, only what is missing is run")
    rivals: list[str] | None = argument(
        None,
        "Quantizers, by default all; an unknown name is answered with their names. Settings follow after a comma: "
        "transport,epsilon=10..100,iterations=3",
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-3, 2e-3, 5e-3, 1e-2, 2e-2],
        metadata={"help": "Peak learning rates of the one-cycle schedule; each rival is trained with all of them"},
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds of the search over learning rates"})
    confirm_seeds: list[int] = field(
        default_factory=list, metadata={"help": "Further seeds, with the best learning rate of each rival alone"}
    )
    max_steps: int = argument(2000, "Steps of every run")
    batch_size: int = argument(64, "Images per step")
    image_size: int = argument(32, "Side of the images in pixels, a multiple of 4 (8 for vqgan)")
    num_channels: int = argument(3, "3 for colour, 1 for grayscale")
    codebook_size: int = argument(1024, "Number of codes; fsq and residual have about as many")
    codebook_dim: int = argument(8, "Width of the codes")
    backbone: Literal["plain_cnn", "vqgan"] = argument(
        "plain_cnn", "Networks: the paper's for small images, or a narrow VQGAN with a token for 8 x 8 pixels"
    )
    latent_scale: float = argument(
        1.0, "Multiply the first latents, then of variance 1 for all rivals, as a start with codes of another scale"
    )
    latent_shift: float = argument(0.0, "Then add this to them, as a start with codes beside the latents")
    first_dataset: str | None = argument(None, "Dataset of the first half of the steps: the domain changes midway")
    max_images: int | None = argument(
        None, "Most training images, a random sample (of a stream, the first); by default all"
    )
    parallel: int = argument(1, "Runs at a time")

    def __post_init__(self) -> None:
        if self.rivals:
            from .rivals import find_rival  # with torch, which help does without

            for name in self.rivals:
                find_rival(name)
        for name in ("rivals", "learning_rates", "seeds", "confirm_seeds"):
            values = getattr(self, name)
            may_lack = name == "confirm_seeds" or values is None
            values = values or []
            if not (values or may_lack) or len(set(values)) < len(values):
                raise ValueError(f"{name} must name at least one, and none twice, got {' '.join(map(str, values))}")
        if not all(0 < rate < math.inf for rate in self.learning_rates):
            raise ValueError(f"learning_rates must be greater than 0 and finite, got {self.learning_rates}")
        if set(self.confirm_seeds) & set(self.seeds):
            raise ValueError(f"confirm_seeds must differ from seeds, got {self.confirm_seeds} and {self.seeds}")
        for name in (
            "max_steps",
            "batch_size",
            "image_size",
            "codebook_size",
            "codebook_dim",
            "max_images",
            "parallel",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        check_most(
            self, max_steps=LARGEST_COUNT, max_images=LARGEST_COUNT, batch_size=10**6, image_size=2**16, parallel=1024
        )
        check_most(self, codebook_size=2**31 - 1, codebook_dim=2**20)
        factor = {"plain_cnn": 4, "vqgan": 8}[self.backbone]
        if self.image_size % factor:
            raise ValueError(f"image_size must be a multiple of {factor}, got {self.image_size}")
        if not (0 < self.latent_scale < math.inf and math.isfinite(self.latent_shift)):
            raise ValueError(
                f"latent_scale must be greater than 0, and latent_shift finite, got {self.latent_scale}, {self.latent_shift}"
            )
        if self.num_channels not in (1, 3):
            raise ValueError(f"num_channels must be 1 or 3, got {self.num_channels}")
