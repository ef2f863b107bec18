"""Codebook usage and perplexity, as an `evaluate` module."""

from typing import Any

import datasets
import evaluate
import numpy as np
import numpy.typing as npt
import torch

from optvq_hf.codes_optvq import perplexity  # absolute: `evaluate.load` copies this file elsewhere


_DESCRIPTION = """\
codebook_usage: percentage of the codes that occur at least once, over all heads together. perplexity: exponential of the
entropy of the code frequencies, between 1 and the size of the codebook. Both also per head: codebook_usage_per_head,
perplexity_per_head. code_counts: how often each code occurs, an integer array (heads, codebook_size). With several levels of
residual quantization, whose codebooks differ, the first two are means over levels; both also per level:
codebook_usage_per_level, perplexity_per_level.
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
        self, *, codebook_size: int, num_quantizers: int = 1, predictions: npt.ArrayLike | None = None
    ) -> dict[str, Any] | None:
        """The metrics of all added batches; `predictions` are added first. Of several processes, only rank 0 gets them.

        Raises:
            ValueError: Without any codes, for images with different numbers of heads, a code of `codebook_size` or above, or a
                number of heads that is none of so many levels.
        """
        if predictions is not None:
            self.add_batch(predictions=predictions)
        return super().compute(codebook_size=codebook_size, num_quantizers=num_quantizers)

    def _compute(self, codes: list[bytes], heads: list[int], codebook_size: int, num_quantizers: int) -> dict[str, Any]:
        if len(set(heads)) != 1:
            raise ValueError(f"images must have equally many heads and be 1 or more, got {sorted(set(heads))} heads")
        counts = np.zeros((heads[0], codebook_size), dtype=np.int64)
        for image in codes:
            for head, row in enumerate(np.frombuffer(image, dtype=np.int32).reshape(heads[0], -1)):
                if row.max() >= codebook_size:
                    raise ValueError(f"found code {row.max()}, but codebook_size is {codebook_size}")
                counts[head] += np.bincount(row, minlength=codebook_size)
        if num_quantizers < 1 or heads[0] % num_quantizers:
            raise ValueError(f"images have {heads[0]} heads, which are not those of {num_quantizers} levels")
        levels = counts.reshape(num_quantizers, -1, codebook_size).sum(axis=1)
        per_level, per_head = ([usage_and_perplexity(row) for row in rows] for rows in (levels, counts))
        usages, perplexities = map(list, zip(*per_level))
        of_levels = {"codebook_usage_per_level": usages, "perplexity_per_level": perplexities}
        return {
            "codebook_usage": sum(usages) / num_quantizers,
            "perplexity": sum(perplexities) / num_quantizers,
            **(of_levels if num_quantizers > 1 else {}),
            "codebook_usage_per_head": [head[0] for head in per_head],
            "perplexity_per_head": [head[1] for head in per_head],
            "code_counts": counts,
        }


def usage_and_perplexity(counts: np.ndarray) -> tuple[float, float]:
    """Codebook usage in percent, and perplexity between 1 and len(counts), of integer counts (codebook_size,)."""
    usage = 100 * int(np.count_nonzero(counts)) / len(counts)
    return usage, perplexity(torch.from_numpy(counts).double()).item()
