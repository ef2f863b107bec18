"""Evaluates codecs on the same images: a model with one or several assignments, or any other tokenizer."""

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data.batches import EvaluationBatches
from ..image_processing_optvq import psnr
from ..modeling_optvq import OptVQModel
from .codebook_usage import CodebookUsage
from .codecs import Codec, optvq_codec
from .feature_networks import load_network
from .frechet import FeatureSums, frechet_distance
from .gallery import Gallery, Shown
from .image_digest import image_digests, images_sha256
from .image_metrics import ImageScorer
from .protocols import BASIC, check_images, check_metrics, is_frechet
from .reconstruction_quality import ReconstructionQuality


@dataclass
class Evaluation:
    """Result of [`evaluate_codecs`] for one codec.

    Attributes:
        metrics: See [`ReconstructionQuality`] and [`CodebookUsage`]; Frechet distances by their names. With several levels also
            `mse_per_level` and `psnr_per_level`: of reconstructions from the first levels alone, from 1 to all.
        conventions: Of every metric, what a reader must know to compare its values with those of others.
        images_digest: SHA-256 of the images in 8 bits, in their order.
        code_counts: (num_quantizers, heads, codebook_size) int64, how often each code was used.
        originals, reconstructions: (n, C, H, W) float, the first images of the dataset, in [-1, 1].
        examples: Originals and reconstructions of the best, the median and the worst images by MSE, as many of each.
    """

    metrics: dict
    conventions: dict[str, str]
    images_digest: str
    code_counts: torch.Tensor
    originals: torch.Tensor
    reconstructions: torch.Tensor
    examples: tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Processes:
    """The processes that share the batches of an evaluation: each has every `count`-th, from its index on."""

    index: int = 0
    count: int = 1

    def numbered(self, batches: Iterable[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
        """The batches of this process, each with its number among those of all."""
        return ((number * self.count + self.index, batch) for number, batch in enumerate(batches))

    def gather(self, entry: Any) -> list[Any]:
        """The entries of all processes, on each of them."""
        if self.count == 1:
            return [entry]
        from accelerate.utils import gather_object

        return gather_object([entry])


@dataclass
class _Measured:
    """What a process has measured of one codec; by the number of the batch where it is of single images."""

    gallery: Gallery
    scores: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    coarse: dict[int, list[torch.Tensor]] = field(default_factory=dict)  # MSE of the first levels alone
    codes: dict[int, np.ndarray] = field(default_factory=dict)
    features: dict[str, FeatureSums] = field(default_factory=dict)

    def extend(self, other: "_Measured") -> None:
        self.gallery.extend(other.gallery)
        self.scores |= other.scores
        self.coarse |= other.coarse
        self.codes |= other.codes
        _add(self.features, other.features)


@dataclass
class _Originals:
    """What a process has measured of the images themselves."""

    digests: dict[int, list[bytes]] = field(default_factory=dict)
    features: dict[str, FeatureSums] = field(default_factory=dict)
    num_pixels: int = 0

    def extend(self, other: "_Originals") -> None:
        self.digests |= other.digests
        self.num_pixels += other.num_pixels
        _add(self.features, other.features)


@torch.inference_mode()
def evaluate_codecs(
    codecs: Mapping[str, Codec],
    batches: Iterable[torch.Tensor],
    metrics: Sequence[str] = BASIC,
    num_shown: int = 16,
    device: torch.device | str = "cpu",
    processes: Processes | None = None,
) -> dict[str, Evaluation]:
    """Encodes every image once with each codec, and decodes it once, or once per level.

    Args:
        codecs: By a name of yours.
        batches: (B, C, H, W) float in [-1, 1]; of several processes, those of this one.
        metrics: Of `IMAGE_METRICS`, "fid" or "fd-...". MSE, PSNR and SSIM are always among them.
        num_shown: Number of first images to return for the picture; 0 for no image and no examples.
        device: Where codecs and networks compute.
        processes: The processes that share the batches. Only the first gets results, the others an empty dict.

    Raises:
        ValueError: If there are no images, a metric is unknown or not of such images, or a codec gives no codes.
        IndexError: If a codec gives codes that are not in its codebook.
        UnreadableImageError: If too many images of [`EvaluationBatches`] cannot be read.
        ImportError, OSError: If a network of a metric is not at hand.
    """
    check_metrics(metrics)
    processes = processes or Processes()
    image_metrics = list(dict.fromkeys([*BASIC, *(name for name in metrics if not is_frechet(name))]))
    scorer, scorer_of_levels = ImageScorer(image_metrics, device), ImageScorer(["mse"], device)
    networks = {name: load_network(name, device) for name in metrics if is_frechet(name)}
    measured, of_originals = {name: _Measured(Gallery(num_shown)) for name in codecs}, _Originals()

    numbered = batches.numbered() if isinstance(batches, EvaluationBatches) else processes.numbered(batches)
    if processes.index == 0:
        numbered = tqdm(numbered, desc="evaluating", unit="batch", total=operator.length_hint(batches) or None)
    for batch, pixel_values in numbered:
        check_images([*image_metrics, *networks], *pixel_values.shape[1:])
        pixel_values = pixel_values.to(device)
        of_originals.extend(
            _Originals(
                {batch: image_digests(pixel_values)},
                {name: FeatureSums.of(network(pixel_values)) for name, network in networks.items()},
                pixel_values[:, 0].numel(),
            )
        )
        for name, codec in codecs.items():
            codes = codec.codes_of(pixel_values)
            reconstructions = codec.decode(codes).float()
            scores = scorer(reconstructions, pixel_values)
            measured[name].scores[batch] = scores
            measured[name].coarse[batch] = [
                scorer_of_levels(codec.decode(of_levels).float(), pixel_values)["mse"]
                for of_levels in codec.first_levels(codes)
            ]
            measured[name].codes[batch] = codes.cpu().numpy().astype(np.int32)
            measured[name].gallery.add(batch, scores["mse"], pixel_values, reconstructions)
            for of, network in networks.items():
                _add(measured[name].features, {of: FeatureSums.of(network(reconstructions))})

    if isinstance(batches, EvaluationBatches) and processes.count > 1:
        batches.count_all(processes.gather(batches.counts))
    first, *others = processes.gather((of_originals, measured))
    if processes.index > 0:
        return {}
    of_originals, measured = first
    for their_originals, their_measured in others:
        of_originals.extend(their_originals)
        for name in codecs:
            measured[name].extend(their_measured[name])
    conventions = {name: network.convention for name, network in networks.items()}
    return {
        name: _evaluation(measured[name], of_originals, codec, scorer, conventions) for name, codec in codecs.items()
    }


def evaluate_model(
    model: OptVQModel,
    batches: Iterable[torch.Tensor],
    assignments: Sequence[str],
    num_shown: int = 16,
    metrics: Sequence[str] = BASIC,
    processes: Processes | None = None,
    tile_size: int | None = None,
) -> dict[str, Evaluation]:
    """The same of a model, for each of its assignments.

    Args:
        model: In evaluation mode.
        batches: (B, num_channels, H, W) float in [-1, 1].
        assignments: Of "nearest", "potentials", "sinkhorn". The codes of the last depend on how images are batched.
        num_shown, metrics, processes: As in [`evaluate_codecs`].
        tile_size: Side in pixels of the tiles that large images are encoded and decoded in.
    """
    codecs = {name: optvq_codec(model, name, tile_size) for name in assignments}
    return evaluate_codecs(codecs, batches, metrics, num_shown, model.device, processes)


def reconstruction_error(model: OptVQModel, batches: Iterable[torch.Tensor]) -> float:
    """Mean squared error of reconstructions on [-1, 1], with the model's own assignment at inference.

    Args:
        model, batches: As in [`evaluate_model`].
    """
    [evaluation] = evaluate_model(model, batches, [model.config.inference_assignment], num_shown=0).values()
    return evaluation.metrics["mse"]


def _evaluation(
    measured: _Measured, of_originals: _Originals, codec: Codec, scorer: ImageScorer, conventions: dict[str, str]
) -> Evaluation:
    quality = ReconstructionQuality(scorer=scorer, keep_in_memory=True)
    usage = CodebookUsage(keep_in_memory=True)
    if not measured.scores:
        raise ValueError("there are no images to evaluate on")
    for batch in sorted(measured.scores):
        quality.add_scores(measured.scores[batch])
        usage.add_batch(predictions=measured.codes[batch])
    of_pixels = quality.compute(intervals=True)
    sizes = {"codebook_size": codec.codebook_size, "num_quantizers": codec.num_quantizers}
    of_codes = usage.compute(**sizes, num_pixels=of_originals.num_pixels)
    assert of_codes is not None and of_pixels is not None  # None only on ranks other than 0
    intervals = of_pixels.pop("intervals")
    distances = {
        name: frechet_distance(of_originals.features[name], features) for name, features in measured.features.items()
    }
    counts = torch.from_numpy(of_codes.pop("code_counts")).unflatten(0, (codec.num_quantizers, -1))
    digests = [digest for batch in sorted(of_originals.digests) for digest in of_originals.digests[batch]]
    metrics = {"num_images": len(digests), **of_pixels, **distances, **of_codes, "intervals": intervals}
    if codec.num_quantizers > 1:
        coarse = [torch.cat(of_level) for of_level in zip(*measured.coarse.values(), strict=True)]
        metrics["mse_per_level"] = [*(mse.mean().item() for mse in coarse), metrics["mse"]]
        metrics["psnr_per_level"] = [*(psnr(mse).mean().item() for mse in coarse), metrics["psnr"]]
    median = torch.cat([scores["mse"] for scores in measured.scores.values()]).median().item()
    return Evaluation(
        metrics,
        {**scorer.conventions, **conventions},
        images_sha256(digests),
        counts,
        *_stacked(measured.gallery.first()),
        _stacked(measured.gallery.examples(median)),
    )


def _stacked(images: list[Shown]) -> tuple[torch.Tensor, torch.Tensor]:
    if not images:
        return torch.empty(0), torch.empty(0)
    return torch.stack([image.original for image in images]), torch.stack([image.reconstruction for image in images])


def _add(sums: dict[str, FeatureSums], others: dict[str, FeatureSums]) -> None:
    for name, other in others.items():
        other = other.to("cpu")
        sums[name] = sums[name] + other if name in sums else other
