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
        metrics: See [`ReconstructionQuality`] and [`CodebookUsage`]. With several levels also `mse_per_level` and
            `psnr_per_level`: of reconstructions from the first levels alone, from 1 to all.
        code_counts: (num_quantizers, heads, codebook_size) int64, how often each code was used.
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
    """Encodes every image once per assignment, and decodes it once per level.

    Args:
        model: In evaluation mode.
        batches: (B, num_channels, H, W) float in [-1, 1].
        assignments: Of "nearest", "potentials", "sinkhorn". The codes of the last depend on how images are batched.
        num_shown: Number of images to return for the picture.

    Raises:
        ValueError: If there are no images.
    """
    num_levels, num_heads = model.config.num_quantizers, model.config.num_codebook_heads
    quality = {name: [ReconstructionQuality(keep_in_memory=True) for _ in range(num_levels)] for name in assignments}
    usage = {name: CodebookUsage(keep_in_memory=True) for name in assignments}
    originals, shown, num_images = [], {name: [] for name in assignments}, 0

    for pixel_values in tqdm(batches, desc="evaluating", unit="batch"):
        pixel_values = pixel_values.to(model.device)
        missing = max(0, num_shown - num_images)
        originals.append(pixel_values[:missing].cpu())
        num_images += len(pixel_values)
        for name in assignments:
            codes = model.encode(pixel_values, assignment=name, return_loss=False).codes
            assert codes is not None
            for level, of_level in enumerate(quality[name], start=1):
                reconstructions = model.decode(codes=codes[:, : level * num_heads]).reconstruction
                assert reconstructions is not None
                reconstructions = reconstructions.float()
                of_level.add_batch(predictions=reconstructions, references=pixel_values)
            usage[name].add_batch(predictions=codes.cpu())
            shown[name].append(reconstructions[:missing].cpu())
    if num_images == 0:
        raise ValueError("there are no images to evaluate on")

    evaluations = {}
    for name in assignments:
        of_codes = usage[name].compute(codebook_size=model.config.codebook_size, num_quantizers=num_levels)
        of_pixels = [scores for of_level in quality[name] if (scores := of_level.compute()) is not None]
        assert of_codes is not None and len(of_pixels) == num_levels  # less only on ranks other than 0
        counts = torch.from_numpy(of_codes.pop("code_counts")).unflatten(0, (num_levels, num_heads))
        metrics = {"num_images": num_images, **of_pixels[-1], **of_codes}
        for key in ("mse", "psnr") if num_levels > 1 else ():
            metrics[f"{key}_per_level"] = [of_level[key] for of_level in of_pixels]
        evaluations[name] = Evaluation(metrics, counts, torch.cat(originals), torch.cat(shown[name]))
    return evaluations


def reconstruction_error(model: OptVQModel, batches: Iterable[torch.Tensor]) -> float:
    """Mean squared error of reconstructions on [-1, 1], with the model's own assignment at inference.

    Args:
        model, batches: As in [`evaluate_model`].
    """
    [evaluation] = evaluate_model(model, batches, [model.config.inference_assignment], num_shown=0).values()
    return evaluation.metrics["mse"]
