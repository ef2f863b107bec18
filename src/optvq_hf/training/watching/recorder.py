"""The figures of the log: measured on the device at every step, read once per log line."""

import time
from typing import TYPE_CHECKING

import torch

from ...codes_optvq import perplexity
from ...configuration_optvq import OptVQConfig
from ...image_processing_optvq import psnr
from ...sinkhorn import nearest_assign
from ..codebook import split_heads
from ..processes import mean_over_processes


if TYPE_CHECKING:
    from ..trainer import StepResult


# Number of features of the last batch that are compared with their nearest codes, and whose norms are logged.
SAMPLE_SIZE = 1024
# A code that no image has used for this many steps is dead.
DEAD_AFTER = 100


class Recorder:
    """Collects the figures of `log_every` steps and returns them as one entry of the log.

    | figure | meaning |
    | - | - |
    | loss and its parts, logits, gradient norms | means over the steps since the last entry that had them |
    | quantizer_share | % of the loss (without its adversarial part) that is the quantizer's |
    | psnr | dB, of the mean squared error, at most 100; not of latents, whose errors l1 and l2 then are |
    | codebook_usage | % of codes used since the last entry, over all processes |
    | expected_usage | usage of the same number of tokens drawn uniformly at random |
    | perplexity | of the code frequencies since the last entry, in [1, codebook_size] |
    | dead_codes | % of codes that were not used for 100 steps or more |
    | oldest_code | steps since the least recently used code was used |
    | nearest_disagreement | % of features whose assigned code is not the nearest |
    | marginal_error | sum over codes of the distance between mass and even share, in [0, 2] |
    | latent_norm, codebook_norm | mean Euclidean norms of heads' features and of codes |
    | codebook_offset | distance of the codes' mean to the origin or the features' mean (the nearer), in standard deviations |
    | codebook_distance | root mean square distance of features to their codes, in units of the features' standard deviation |
    | nonfinite_steps | skipped steps of both networks since the last entry |
    | unreadable_images | % of the images so far |
    | data_wait | % of time spent waiting for data since the last entry |
    | peak_memory | GiB that were allocated at most since the last entry; on CUDA alone, of rank 0 |

    Args:
        config: Of the model. Usage and age are of all codes of all levels, perplexity is the mean over levels, and what is said
            of single codes and the codebook is of the first level, but `codebook_distance` of all. Codes are near by its cost.
        device: Device of the run.
        of_latents: Whether latents are reconstructed instead of images.
    """

    def __init__(self, config: OptVQConfig, device: torch.device, of_latents: bool = False):
        self.of_latents = of_latents
        self.config, self.num_quantizers = config, config.num_quantizers
        self.counts = torch.zeros(config.num_quantizers * config.codebook_size, dtype=torch.int64, device=device)
        self.age = torch.zeros_like(self.counts)  # steps since a code was used
        self.skipped = torch.zeros((), device=device)  # steps skipped up to the last entry
        self.sums: dict[str, torch.Tensor] = {}
        self.numbers: dict[str, int] = {}  # number of steps in each sum
        self.images = 0
        self.waited, self.since = 0.0, time.perf_counter()  # seconds waited for data, and the time, at the last entry

    def count(self, result: "StepResult", num_images: int) -> None:
        """Adds the figures of a step, without waiting for the device."""
        self.counts += result.code_counts
        self.age.add_(1).mul_(result.code_counts == 0)
        for name, value in result.values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.numbers[name] = self.numbers.get(name, 0) + 1
        self.images += num_images

    def entry(
        self, result: "StepResult", skipped: torch.Tensor, unreadable_images: float, waited: float
    ) -> dict[str, float]:
        """Returns the figures since the last entry, over all processes, and resets them.

        Args:
            result: Of the last step, with its codebook.
            skipped: Steps skipped so far, 0-dim.
            unreadable_images: % of the images so far.
            waited: Seconds waited for data so far.
        """
        figures = {name: total / self.numbers[name] for name, total in self.sums.items()}
        figures |= self._codes(result) | {"unreadable_images": unreadable_images}
        if result.output.marginal_error is not None:
            figures["marginal_error"] = result.output.marginal_error
        figures["nonfinite_steps"] = skipped - self.skipped
        stacked = torch.stack([torch.as_tensor(value, device=self.age.device).float() for value in figures.values()])
        figures = dict(zip(figures, mean_over_processes(stacked).tolist()))  # only here the host waits for the device

        elapsed = time.perf_counter() - self.since
        if not self.of_latents:
            figures["psnr"] = psnr(torch.tensor(figures["l2"])).item()
        figures["images_per_second"] = self.images / elapsed
        figures["data_wait"] = 100 * (waited - self.waited) / elapsed
        if self.age.device.type == "cuda":
            figures["peak_memory"] = torch.cuda.max_memory_allocated(self.age.device) / 2**30
            torch.cuda.reset_peak_memory_stats(self.age.device)
        self.skipped = skipped.clone()
        self.counts.zero_()
        self.sums, self.numbers, self.images = {}, {}, 0
        self.waited, self.since = waited, time.perf_counter()
        return figures

    @torch.no_grad()
    def _codes(self, result: "StepResult") -> dict[str, torch.Tensor]:
        codebook, codes, latents = result.codebook, result.output.codes, result.output.latents
        assert codebook is not None and codes is not None and latents is not None  # of a logged step
        features, codebooks = split_heads(latents, codebook.shape[1]), codebook.chunk(self.num_quantizers)
        codes_of_levels = [part.movedim(1, -1).flatten() for part in codes.chunk(self.num_quantizers, dim=1)]
        stride = max(1, len(features) // SAMPLE_SIZE)  # from all over the batch
        features, *codes_of_levels = (x[::stride][:SAMPLE_SIZE] for x in (features, *codes_of_levels))
        rest = features
        for of_level, codes in zip(codebooks, codes_of_levels):
            rest = rest - of_level[codes]
        distance = rest.square().sum(dim=1).mean()
        codebook, codes = codebooks[0], codes_of_levels[0]
        centre, spread = codebook.mean(dim=0), codebook.var(dim=0, correction=0).sum().clamp_min(1e-12).sqrt()
        nearest = nearest_assign(features, codebook, cost=self.config.cost)
        return {
            "codebook_usage": 100 * (self.counts > 0).float().mean(),
            "expected_usage": 100 * -torch.expm1(-self.counts.sum() / len(self.counts)),
            "perplexity": torch.stack([perplexity(counts) for counts in self.counts.chunk(self.num_quantizers)]).mean(),
            "dead_codes": 100 * (self.age >= DEAD_AFTER).float().mean(),
            "oldest_code": self.age.max(),
            "nearest_disagreement": 100 * (nearest != codes).float().mean(),
            "latent_norm": features.norm(dim=1).mean(),
            "codebook_norm": codebook.norm(dim=1).mean(),
            "codebook_offset": torch.minimum(centre.norm(), (centre - features.mean(dim=0)).norm()) / spread,
            "codebook_distance": (distance / features.var(dim=0).sum().clamp_min(1e-12)).sqrt(),
        }

    def state_dict(self) -> dict:
        """The figures since the last entry as JSON, over all processes; all processes must call it."""
        return {
            "counts": self.counts.tolist(),
            "age": self.age.tolist(),
            "skipped": self.skipped.item(),
            "sums": {name: mean_over_processes(total).item() for name, total in self.sums.items()},
            "numbers": self.numbers,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restores what [`state_dict`] returned."""
        self.counts.copy_(torch.tensor(state["counts"]))
        self.age.copy_(torch.tensor(state["age"]))
        self.skipped.fill_(state["skipped"])
        self.sums = {name: torch.tensor(total, device=self.age.device) for name, total in state["sums"].items()}
        self.numbers = dict(state["numbers"])
