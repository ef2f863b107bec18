"""What to evaluate and how."""

from dataclasses import dataclass

from ..data.arguments import argument


EVALUATED_ASSIGNMENTS = ("nearest", "potentials", "sinkhorn")


@dataclass
class EvaluationArguments:
    """One evaluation."""

    _argument_group_name = "evaluation"

    model: str | None = argument(None, "Hub id or folder of the model")
    model_revision: str | None = argument(None, "Branch, tag or commit of a model on the Hub")
    output_dir: str | None = argument(None, "Folder for metrics.json and the pictures; by default that of the model")
    assignment: list[str] | None = argument(
        None, "One or more of nearest, potentials and sinkhorn, compared on the same images; by default the model's own"
    )
    batch_size: int = argument(64, "Images at a time; matters to the codes of sinkhorn alone")
    max_images: int | None = argument(None, "Stop after this many images")

    def __post_init__(self) -> None:
        for name in self.assignment or ():
            if name not in EVALUATED_ASSIGNMENTS:
                raise ValueError(f"assignment must be of {', '.join(EVALUATED_ASSIGNMENTS)}, got {name!r}")
        for name in ("batch_size", "max_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
