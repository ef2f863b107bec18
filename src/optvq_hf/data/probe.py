"""A look at some images of a dataset: their size and colour, to choose a model by."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from statistics import median_low

import numpy as np
from datasets import Dataset, IterableDataset
from PIL.Image import Image

from .fetching import records_of
from .loading import UnreadableImageError, decode_image


NUM_IMAGES = 64


@dataclass
class ImageFacts:
    """What some images of a dataset are like.

    Attributes:
        num_images: Images looked at.
        size: Median of their shorter edges, in pixels.
        num_colour: How many of them have colour; one of mode RGB whose channels are equal has none.
        total: Images of the dataset; None for a stream.
    """

    num_images: int
    size: int
    num_colour: int
    total: int | None

    @property
    def num_channels(self) -> int:
        return 3 if self.num_colour else 1

    def __str__(self) -> str:
        kind = "colour" if self.num_colour else "grayscale"
        return f"{kind} images of about {self.size} pixels"


def look_at(images: Dataset | IterableDataset) -> ImageFacts:
    """Looks at up to 64 images: rows spread evenly over a dataset, which may be sorted, or the first of a stream.

    Raises:
        ValueError: If none of them can be read.
    """
    reasons: list[str] = []
    read = list(_readable(images, reasons))
    if not read:
        if not reasons:
            raise ValueError("the dataset has no images")
        raise ValueError(f"none of {len(reasons)} images looked at can be read; the last: {reasons[-1]}")
    total = len(images) if isinstance(images, Dataset) else None
    return ImageFacts(len(read), median_low(min(image.size) for image in read), sum(map(has_colour, read)), total)


def warn_of_lost_colour(images: Dataset | IterableDataset, num_channels: int) -> None:
    """Prints one line if images with colour go into a grayscale model."""
    if num_channels == 1:
        facts = look_at(images)
        if facts.num_colour:
            print(
                f"warning: {facts.num_colour} of {facts.num_images} images looked at have colour, and the model is grayscale "
                "(num_channels 1): it sees their luminance"
            )


def has_colour(image: Image) -> bool:
    """Whether an image of mode "RGB" or "L" has a pixel that is not grey."""
    if image.mode == "L":
        return False
    red, green, blue = (np.asarray(channel) for channel in image.split())
    return bool((red != green).any() or (green != blue).any())


def _readable(images: Dataset | IterableDataset, reasons: list[str]) -> Iterator[Image]:
    """Those that can be read; adds to `reasons` why others cannot."""
    if isinstance(images, Dataset):
        rows = np.linspace(0, len(images) - 1, min(NUM_IMAGES, len(images))).astype(int)
        records = (images[int(row)] for row in rows)
    else:
        records = islice(records_of(images), NUM_IMAGES)
    for record in records:
        try:
            yield decode_image(record["image"])
        except UnreadableImageError as error:
            reasons.append(str(error))
