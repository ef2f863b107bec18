"""Settings of an evaluation."""

from dataclasses import dataclass
from typing import Literal

from ..data.arguments import argument


EVALUATED_ASSIGNMENTS = ("nearest", "potentials", "sinkhorn")


@dataclass
class EvaluationArguments:
    """Model, assignments and images of an evaluation."""

    _argument_group_name = "evaluation"

    model: str | None = argument(None, "Hub id or folder of the model")
    model_revision: str | None = argument(None, "Branch, tag or commit of a model on the Hub")
    output_dir: str | None = argument(
        None, "Folder for metrics.json and the pictures; by default the model's folder, or runs/NAME for a Hub id"
    )
    assignment: list[str] | None = argument(
        None,
        "One or more of nearest, potentials and sinkhorn, compared on the same images; by default that of the model",
    )
    batch_size: int = argument(64, "Images per batch; changes only the codes of sinkhorn")
    solver: Literal["auto", "torch", "fused"] = argument(
        "auto", "Search for codes: `fused` for Triton kernels (GPUs), `torch`, or `auto`; codes are the same"
    )
    max_images: int | None = argument(None, "Most images to evaluate; by default all")
    overwrite: bool = argument(
        False,
        "Replace an earlier result of the same weights also if it has more images, assignments or another dataset",
    )

    def __post_init__(self) -> None:
        for name in self.assignment or ():
            if name not in EVALUATED_ASSIGNMENTS:
                raise ValueError(f"assignment must be of {', '.join(EVALUATED_ASSIGNMENTS)}, got {name!r}")
        if len(set(self.assignment or ())) < len(self.assignment or ()):
            raise ValueError(f"assignment names one twice: {' '.join(self.assignment or ())}")
        for name in ("batch_size", "max_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
