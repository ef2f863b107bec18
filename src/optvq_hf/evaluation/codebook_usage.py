"""Codebook usage and perplexity, as an `evaluate` module."""

import math
from typing import Any

import datasets
import evaluate
import numpy as np
import numpy.typing as npt
import torch

from optvq_hf.codes_optvq import perplexity  # absolute: `evaluate.load` copies this file elsewhere


_DESCRIPTION = """\
codebook_usage: percentage of the codes that occur at least once, over all heads together. perplexity: exponential of the
entropy of the code frequencies, between 1 and the size of the codebook. entropy: the same entropy in bits. All three also per
head: codebook_usage_per_head, perplexity_per_head, entropy_per_head. token_entropy: entropy in bits of whole tokens, that is of
the codes of all heads jointly, as counted: at most log2 of the number of tokens seen. code_counts: how often each code occurs,
an integer array (heads, codebook_size).

bits_per_token: log2 of the codebook size, times the heads: what stored codes take. entropy_bits_per_token: the sum of
entropy_per_head, which an ideal entropy coder with fixed frequencies for each head would take. With the number of pixels also
bits_per_pixel and entropy_bits_per_pixel.

With several levels of residual quantization, whose codebooks differ, codebook_usage, perplexity and entropy are means over
levels; the first two also per level: codebook_usage_per_level, perplexity_per_level.
"""

_INPUTS = """\
predictions: integer codes (B, heads, H, W), with the heads of all levels, level by level. compute() needs codebook_size, and
num_quantizers if there are several levels.
"""

LARGEST_CODE = np.iinfo(np.int32).max


class CodebookUsage(evaluate.Metric):
    """See the description above. `add_batch(predictions=codes)`, then `compute(codebook_size=...)`."""

    def _info(self) -> evaluate.MetricInfo:
        # Bytes of int32 codes: lists of Python integers would take ten times the memory.
        features = {"codes": datasets.Value("binary"), "heads": datasets.Value("int32")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=datasets.Features(features)
        )

    def add_batch(self, *, predictions: npt.ArrayLike) -> None:
        """Counts integer codes (B, heads, H, W).

        Raises:
            ValueError: For a wrong number of dimensions, images without codes, or codes that are not integers or below 0.
        """
        codes = np.asarray(predictions)
        if codes.ndim != 4 or 0 in codes.shape[1:] or codes.dtype.kind not in "iu":
            raise ValueError(f"predictions must be integer codes (B, heads, H, W), got {codes.shape}, {codes.dtype}")
        if codes.size and not 0 <= codes.min() <= codes.max() <= LARGEST_CODE:
            raise ValueError(f"codes must lie in [0, {LARGEST_CODE}], got {codes.min()} to {codes.max()}")
        rows = [image.astype(np.int32).tobytes() for image in codes]
        super().add_batch(codes=rows, heads=[codes.shape[1]] * len(codes))

    def compute(
        self,
        *,
        codebook_size: int,
        num_pixels: int | None = None,
        num_quantizers: int = 1,
        predictions: npt.ArrayLike | None = None,
    ) -> dict[str, Any] | None:
        """The metrics of all added batches; `predictions` are added first. Of several processes, only rank 0 gets them.

        Args:
            num_pixels: Height times width of all images together, for the bits per pixel.

        Raises:
            ValueError: Without any codes, for images with different numbers of heads, a code of `codebook_size` or above, or a
                number of heads that is none of so many levels.
        """
        if predictions is not None:
            self.add_batch(predictions=predictions)
        return super().compute(codebook_size=codebook_size, num_pixels=num_pixels, num_quantizers=num_quantizers)

    def _compute(
        self, codes: list[bytes], heads: list[int], codebook_size: int, num_pixels: int | None, num_quantizers: int
    ) -> dict[str, Any]:
        if len(set(heads)) != 1:
            raise ValueError(f"images must have equally many heads and be 1 or more, got {sorted(set(heads))} heads")
        of_heads = np.concatenate(
            [np.frombuffer(image, dtype=np.int32).reshape(heads[0], -1) for image in codes], axis=1
        )
        if of_heads.max() >= codebook_size:
            raise ValueError(f"found code {of_heads.max()}, but codebook_size is {codebook_size}")
        counts = np.stack([np.bincount(row, minlength=codebook_size) for row in of_heads])
        if num_quantizers < 1 or heads[0] % num_quantizers:
            raise ValueError(f"images have {heads[0]} heads, which are not those of {num_quantizers} levels")
        levels = counts.reshape(num_quantizers, -1, codebook_size).sum(axis=1)
        per_level, per_head = ([usage_and_perplexity(row) for row in rows] for rows in (levels, counts))
        usages, perplexities = map(list, zip(*per_level))
        of_levels = {"codebook_usage_per_level": usages, "perplexity_per_level": perplexities}
        entropy_per_head = [math.log2(head[1]) for head in per_head]
        bits = {"bits_per_token": heads[0] * math.log2(codebook_size), "entropy_bits_per_token": sum(entropy_per_head)}
        if num_pixels is not None:
            tokens_per_pixel = of_heads.shape[1] / num_pixels
            bits |= {name.replace("token", "pixel"): value * tokens_per_pixel for name, value in bits.items()}
        return {
            "codebook_usage": sum(usages) / num_quantizers,
            "perplexity": sum(perplexities) / num_quantizers,
            "entropy": sum(map(math.log2, perplexities)) / num_quantizers,
            **(of_levels if num_quantizers > 1 else {}),
            "token_entropy": math.log2(_perplexity_of_tokens(of_heads)),
            "codebook_usage_per_head": [head[0] for head in per_head],
            "perplexity_per_head": [head[1] for head in per_head],
            "entropy_per_head": entropy_per_head,
            **bits,
            "code_counts": counts,
        }


def usage_and_perplexity(counts: np.ndarray) -> tuple[float, float]:
    """Codebook usage in percent, and perplexity between 1 and len(counts), of integer counts (codebook_size,)."""
    usage = 100 * int(np.count_nonzero(counts)) / len(counts)
    return usage, perplexity(torch.from_numpy(counts).double()).item()


def _perplexity_of_tokens(codes: np.ndarray) -> float:
    """Exponential of the entropy of whole tokens, from codes (heads, tokens)."""
    tokens = np.zeros(codes.shape[1], dtype=np.int64)
    for row in codes:  # the number of different tokens so far is small enough to be multiplied by the largest code
        tokens = np.unique(tokens * (int(row.max()) + 1) + row, return_inverse=True)[1]
    return usage_and_perplexity(np.bincount(tokens))[1]
