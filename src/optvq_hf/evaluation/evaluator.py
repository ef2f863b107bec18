"""Evaluates a model, with one or several assignments on the same images."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from ..modeling_optvq import OptVQModel
from .codebook_usage import CodebookUsage
from .reconstruction_quality import ReconstructionQuality


@dataclass
class Evaluation:
    """Result of [`evaluate_model`] for one assignment.

    Attributes:
        metrics: See [`ReconstructionQuality`] and [`CodebookUsage`].
        code_counts: (heads, codebook_size) int64, how often each code was used.
        originals, reconstructions: (n, C, H, W) float, the first images of the dataset, in [-1, 1].
    """

    metrics: dict
    code_counts: torch.Tensor
    originals: torch.Tensor
    reconstructions: torch.Tensor


@torch.inference_mode()
def evaluate_model(
    model: OptVQModel, batches: Iterable[torch.Tensor], assignments: Sequence[str], num_shown: int = 16
) -> dict[str, Evaluation]:
    """Encodes and decodes every image once per assignment.

    Args:
        model: In evaluation mode.
        batches: (B, num_channels, H, W) float in [-1, 1].
        assignments: Of "nearest", "potentials", "sinkhorn". The codes of the last depend on how images are batched.
        num_shown: Number of images to return for the picture.

    Raises:
        ValueError: If there are no images.
    """
    quality = {name: ReconstructionQuality(keep_in_memory=True) for name in assignments}
    usage = {name: CodebookUsage(keep_in_memory=True) for name in assignments}
    originals, shown, num_images = [], {name: [] for name in assignments}, 0

    for pixel_values in tqdm(batches, desc="evaluating", unit="batch"):
        pixel_values = pixel_values.to(model.device)
        missing = max(0, num_shown - num_images)
        originals.append(pixel_values[:missing].cpu())
        num_images += len(pixel_values)
        for name in assignments:
            codes = model.encode(pixel_values, assignment=name, return_loss=False).codes
            reconstructions = model.decode(codes=codes).reconstruction
            assert codes is not None and reconstructions is not None
            reconstructions = reconstructions.float()
            quality[name].add_batch(predictions=reconstructions, references=pixel_values)
            usage[name].add_batch(predictions=codes.cpu())
            shown[name].append(reconstructions[:missing].cpu())
    if num_images == 0:
        raise ValueError("there are no images to evaluate on")

    evaluations = {}
    for name in assignments:
        of_codes = usage[name].compute(codebook_size=model.config.codebook_size)
        of_pixels = quality[name].compute()
        assert of_codes is not None and of_pixels is not None  # None only on ranks other than 0
        counts = torch.from_numpy(of_codes.pop("code_counts"))
        metrics = {"num_images": num_images, **of_pixels, **of_codes}
        evaluations[name] = Evaluation(metrics, counts, torch.cat(originals), torch.cat(shown[name]))
    return evaluations


def reconstruction_error(model: OptVQModel, batches: Iterable[torch.Tensor]) -> float:
    """Mean squared error of reconstructions on [-1, 1], with the model's own assignment at inference.

    Args:
        model, batches: As in [`evaluate_model`].
    """
    [evaluation] = evaluate_model(model, batches, [model.config.inference_assignment], num_shown=0).values()
    return evaluation.metrics["mse"]
