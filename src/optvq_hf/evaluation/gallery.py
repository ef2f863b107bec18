"""The images that an evaluation shows: the first, and the best, the median and the worst."""

import random
from dataclasses import dataclass, field
from typing import NamedTuple

import torch


NUM_EXAMPLES, NUM_SAMPLED = 8, 32


class Shown(NamedTuple):
    """An image and its reconstruction, (C, H, W) float in [-1, 1], with its place in the dataset and its error."""

    place: tuple[int, int]
    error: float
    original: torch.Tensor
    reconstruction: torch.Tensor


@dataclass
class Gallery:
    """Keeps few of many images: the first, the eight best and worst by mean squared error, and a sample of 32 for the median.

    Which images are kept depends on their places and errors alone, so galleries of parts can be added up.

    Args:
        num_first: Number of first images to keep; 0 keeps no image at all.
    """

    num_first: int = 16
    kept: list[Shown] = field(default_factory=list)

    def add(self, batch: int, errors: torch.Tensor, originals: torch.Tensor, reconstructions: torch.Tensor) -> None:
        """Adds images (B, C, H, W) of a batch with its number, and their errors (B,)."""
        if self.num_first:
            images = zip(errors.tolist(), originals, reconstructions)
            shown = [Shown((batch, number), *image) for number, image in enumerate(images)]
            self.kept = [
                image._replace(original=image.original.cpu().clone(), reconstruction=image.reconstruction.cpu().clone())
                if image.place[0] == batch
                else image
                for image in self._chosen(self.kept + shown)
            ]

    def extend(self, other: "Gallery") -> None:
        """Adds the images of another gallery."""
        self.kept = self._chosen(self.kept + other.kept)

    def first(self) -> list[Shown]:
        """The first images of the dataset."""
        return sorted(self.kept, key=lambda image: image.place)[: self.num_first]

    def examples(self, median: float) -> list[Shown]:
        """The best images, then those of the sample that are nearest to the median error, then the worst; eight of each."""
        by_error = sorted(self.kept, key=_by_error)
        number = min(NUM_EXAMPLES, len(by_error))
        sample = sorted(self.kept, key=_at_random)[:NUM_SAMPLED]
        middle = sorted(sample, key=lambda image: (abs(image.error - median), image.place))[:number]
        return [*by_error[:number], *sorted(middle, key=_by_error), *by_error[-number:]]

    def _chosen(self, images: list[Shown]) -> list[Shown]:
        by_error = sorted(images, key=_by_error)
        chosen = sorted(images, key=lambda image: image.place)[: self.num_first]
        chosen += by_error[:NUM_EXAMPLES] + by_error[-NUM_EXAMPLES:] + sorted(images, key=_at_random)[:NUM_SAMPLED]
        return list({image.place: image for image in chosen}.values())


def _by_error(image: Shown) -> tuple[float, tuple[int, int]]:
    return image.error, image.place


def _at_random(image: Shown) -> float:
    return random.Random(f"{image.place}").random()
