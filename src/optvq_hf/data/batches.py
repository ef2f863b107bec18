"""Batches of pixel values from a dataset of images."""

import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from PIL.Image import Image
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import v2

from ..image_processing_optvq import OptVQImageProcessor, check_crop
from .arguments import DataArguments
from .fingerprint import fingerprint
from .loading import UnreadableImageError, decode_image, load_split
from .order import Item, OnceInOrder, Position, RowOrder, StreamOrder, check_same


# Number of images from which on the share of unreadable ones is judged.
LEAST_IMAGES_TO_JUDGE = 100


class ImageCollator:
    """Collates records of [`load_split`] to one (B, num_channels, H, W) float32 tensor in [-1, 1].

    Args:
        image_processor: The one that is saved with the model, so that training and inference use the same preprocessing.
        random_crop: Crop at a random position instead of the centre.
        random_flip: Mirror images with probability 1/2.
    """

    def __init__(self, image_processor: OptVQImageProcessor, random_crop: bool = False, random_flip: bool = False):
        check_no_padding(image_processor)
        self.image_processor, self.random_crop = image_processor, random_crop
        self.options: dict[str, Any] = {"do_resize": False, "do_center_crop": False} if random_crop else {}
        crop = image_processor.crop_size
        steps = [v2.RandomCrop((crop.height, crop.width))] if random_crop else []
        steps += [v2.RandomHorizontalFlip()] if random_flip else []
        self.augmentation = v2.Compose(steps) if steps else None

    def __call__(self, records: list[dict]) -> torch.Tensor:
        return self.stack([self.augment(decode_image(record["image"])) for record in records])

    def augment(self, image: Image, seed: tuple[int, ...] | None = None) -> torch.Tensor:
        """An image as uint8 (C, H, W), augmented; with a seed deterministically, and without changing torch's generator."""
        processor = self.image_processor
        pixels = processor.process_image(image)
        if self.random_crop:  # resized as without it, but before the crop
            if processor.do_resize:
                pixels = processor.resize(pixels, processor.size, processor.resample)
            check_crop(pixels, processor.crop_size)
        if self.augmentation is None:
            return pixels
        if seed is None:
            return self.augmentation(pixels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
            return self.augmentation(pixels)

    def stack(self, images: Sequence[torch.Tensor | Image]) -> torch.Tensor:
        """Pixel values (B, num_channels, H, W) of images (C, H, W), or of opened ones.

        Images of one size are resized together: the same values in a quarter of the time for small images, where transformers
        5.23 would resize one by one on CPUs.
        """
        options = {**self.options, "input_data_format": "channels_first", "return_tensors": "pt"}
        options["disable_grouping"] = False
        mixed: Any = list(images)
        return self.image_processor(mixed, **options)["pixel_values"]


def check_no_padding(image_processor: OptVQImageProcessor) -> None:
    """Raises ValueError for an image processor that pads: padding would count as image, and sizes would differ in a batch."""
    if image_processor.pad_to_multiple_of is not None:
        raise ValueError(
            f"the image processor pads pictures (pad_to_multiple_of={image_processor.pad_to_multiple_of}), which is for "
            "pipelines; datasets are cropped: set it to null in preprocessor_config.json"
        )


class Batch(NamedTuple):
    """One batch, as a worker reads it.

    Attributes:
        pixel_values: (B, num_channels, H, W) float32 in [-1, 1]; None if no image of the batch can be read. Of latents,
            (B, C, H/f, W/f).
        position: The position in the data after this batch.
        unreadable: Reasons why images could not be read.
    """

    pixel_values: torch.Tensor | None
    position: Position
    unreadable: list[str]


class ImageReader(TorchDataset[Batch]):
    """Reads the items of an order into a [`Batch`]; runs in the workers of a DataLoader.

    Args:
        images: Result of [`load_split`]; the items of a stream hold their records.
        replaces: Whether a readable image of the batch replaces each unreadable one, so that batches keep their size; otherwise
            those are skipped.
    """

    def __init__(self, images: Dataset | IterableDataset, collator: ImageCollator, replaces: bool = True):
        self.images, self.collator, self.replaces = images, collator, replaces

    def __getitems__(self, items_and_position: tuple[list[Item], Position]) -> Batch:
        items, position = items_and_position
        sources: Any = [item.source for item in items]
        of_rows = isinstance(self.images, Dataset)
        records = self.images[sources]["image"] if of_rows else [record["image"] for record in sources]
        images, unreadable = [], []
        for record, item in zip(records, items):
            try:
                images.append(self.collator.augment(decode_image(record), item.seed))
            except UnreadableImageError as error:
                unreadable.append(str(error))
        if not images:
            return Batch(None, position, unreadable)
        if self.replaces:
            images += [images[number % len(images)] for number in range(len(unreadable))]
        return Batch(self.collator.stack(images), position, unreadable)


class CountedBatches:
    """Counts the images that cannot be read.

    Args:
        max_unreadable: Largest share of images that may be unreadable.
        num_expected: Images that there are at least, of which the share is then: broken ones may all come first.

    Attributes:
        num_images: Images read so far, with the unreadable ones.
        num_unreadable: Number of them that could not be read.
        last_unreadable: Reason why the latest of them could not be read.
    """

    def __init__(self, max_unreadable: float, num_expected: int = 0):
        self.max_unreadable, self.num_expected = max_unreadable, num_expected
        self.num_images = self.num_unreadable = 0
        self.last_unreadable: str | None = None

    def count(self, num_images: int, unreadable: list[str]) -> None:
        """Adds the images of a batch.

        Raises:
            UnreadableImageError: If too many of all images so far cannot be read, or none of many can.
        """
        self.num_images += num_images
        if not unreadable:
            return
        self.num_unreadable += len(unreadable)
        self.last_unreadable = unreadable[-1]
        enough = max(self.num_expected, LEAST_IMAGES_TO_JUDGE)
        allowed = self.max_unreadable * max(self.num_images, enough)
        all_of_them = self.num_unreadable == self.num_images >= enough
        if self.num_unreadable > allowed or all_of_them:
            raise UnreadableImageError(
                f"{self.num_unreadable} of {self.num_images} images cannot be read, --max-unreadable is "
                f"{self.max_unreadable:g}; the last: {self.last_unreadable}"
            )

    @property
    def report(self) -> str:
        """One line for people; empty if all images could be read."""
        if self.num_unreadable == 0:
            return ""
        return f"unreadable {self.num_unreadable} of {self.num_images} images, the last: {self.last_unreadable}"


@runtime_checkable
class Resumable(Protocol):
    """Batches that know their position in the data, as JSON."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


class TrainingBatches(CountedBatches):
    """Endless iterator over batches, (B, num_channels, H, W) float32 in [-1, 1], that knows its position in the data.

    Args:
        order: The order of the images.
        reader: Reads them into batches, as [`ImageReader`].
        num_workers: Worker processes; 0 reads in this process.
        max_unreadable: Largest share of images that may be unreadable. They are replaced by others of their batch.

    Attributes:
        batches_per_epoch: None for a stream, whose length is not known.

    Raises:
        UnreadableImageError: While iterating, if too many images cannot be read.
    """

    def __init__(
        self,
        order: RowOrder | StreamOrder,
        reader: TorchDataset[Batch],
        num_workers: int = 0,
        max_unreadable: float = 0.0,
    ):
        super().__init__(max_unreadable)
        self.order, self.reader, self.num_workers = order, reader, num_workers
        self.batches_per_epoch = order.batches_per_epoch
        self.position: Position | None = None

    def __iter__(self) -> Iterator[torch.Tensor]:
        for batch in read_batches(self.reader, _FromPosition(self.order, self.position), self.num_workers):
            self.position = batch.position
            self.count(self.order.batch_size, batch.unreadable)
            if batch.pixel_values is not None:
                yield batch.pixel_values

    def state_dict(self) -> dict:
        """The position in the data after the last yielded batch, and the counts, as plain JSON."""
        return {"position": self.position, "num_images": self.num_images, "num_unreadable": self.num_unreadable}

    def load_state_dict(self, state: dict) -> None:
        """Restores what [`state_dict`] returned: the next iterator starts with the following batch.

        Raises:
            ValueError: If the position is for other images, or another order of them.
        """
        check_same(state["position"], self.order.identity)
        self.position, self.num_images, self.num_unreadable = (
            state[name] for name in ("position", "num_images", "num_unreadable")
        )


def training_batches(
    arguments: DataArguments,
    image_processor: OptVQImageProcessor,
    batch_size: int,
    seed: int = 0,
    process_index: int = 0,
    num_processes: int = 1,
) -> TrainingBatches:
    """Endless shuffled batches of the training split; every process gets its own share of the images.

    Raises:
        ValueError: If a process's share is smaller than one batch.
    """
    images = load_split(arguments, held_out=False)
    share, content = (batch_size, seed, process_index, num_processes), fingerprint(images)
    if isinstance(images, IterableDataset):
        order = StreamOrder(images, *share, block_size=arguments.shuffle_buffer, content=content)
    else:
        try:
            order = RowOrder(len(images), *share, content=content)
        except ValueError as error:
            raise ValueError(f"split {arguments.train_split!r} of dataset {arguments.dataset!r} has {error}") from None
    collator = ImageCollator(image_processor, arguments.random_crop, arguments.random_flip)
    return TrainingBatches(order, ImageReader(images, collator), arguments.num_workers, arguments.max_unreadable)


class EvaluationBatches(CountedBatches):
    """Iterates, any number of times, over batches (B, num_channels, H, W) float32 in [-1, 1], each image once.

    Which images, and in what order, depends on the dataset and its length alone, not on the workers. Images that cannot be read
    are skipped; the counts are those of the latest iteration.

    Args:
        split: Name of the images in messages.

    Attributes:
        counts: By the number of a batch, its images and the reasons why some of them could not be read. Of several processes,
            each has those of its own batches until [`count_all`] counts them.

    Raises:
        UnreadableImageError: While iterating, if too many images cannot be read; of several processes, in [`count_all`].
        ValueError: While iterating, if there is no image.
    """

    def __init__(
        self,
        order: OnceInOrder,
        reader: ImageReader,
        num_workers: int = 0,
        max_unreadable: float = 0.0,
        split: str = "",
    ):
        num_images = len(order.images) if isinstance(order.images, Dataset) else 0
        super().__init__(max_unreadable, min(num_images, order.max_images or num_images))
        self.order, self.reader, self.num_workers, self.split = order, reader, num_workers, split
        self.counts: dict[int, tuple[int, list[str]]] = {}

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (pixel_values for _, pixel_values in self.numbered())

    def numbered(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The same batches, each with its number in the dataset: one without a readable image is not among them."""
        super().__init__(self.max_unreadable, self.num_expected)
        self.counts = {}
        for batch in read_batches(self.reader, self.order, self.num_workers):
            number, read = batch.position["batch"], 0 if batch.pixel_values is None else len(batch.pixel_values)
            self.counts[number] = read + len(batch.unreadable), batch.unreadable
            if self.order.num_processes == 1:
                self.count(*self.counts[number])
            if batch.pixel_values is not None:
                yield number, batch.pixel_values
        if not self.counts and self.order.process_index == 0:  # the first batch is that of process 0
            raise ValueError(f"split {self.split!r} has no images to evaluate on")

    def count_all(self, counts: Iterable[dict[int, tuple[int, list[str]]]]) -> None:
        """Counts the batches of several processes, in the order of one process.

        Args:
            counts: Those of all processes.

        Raises:
            UnreadableImageError: If too many images cannot be read, as it would in one process.
        """
        super().__init__(self.max_unreadable, self.num_expected)
        of_all = {number: of_batch for of_process in counts for number, of_batch in of_process.items()}
        for number in sorted(of_all):
            self.count(*of_all[number])

    def __len__(self) -> int:
        """Number of batches; TypeError for a stream, whose length is not known."""
        return len(self.order)


def evaluation_batches(
    arguments: DataArguments,
    image_processor: OptVQImageProcessor,
    batch_size: int,
    max_images: int | None = None,
    process_index: int = 0,
    num_processes: int = 1,
) -> EvaluationBatches:
    """Batches of the images to evaluate on, in order; the last may be smaller. Processes share them batch by batch.

    Args:
        max_images: Take only as many, a random sample (of a stream, the first).
    """
    images = load_split(arguments, held_out=True)
    reader = ImageReader(images, ImageCollator(image_processor), replaces=False)
    order = OnceInOrder(images, batch_size, max_images, process_index, num_processes)
    return EvaluationBatches(order, reader, arguments.num_workers, arguments.max_unreadable, arguments.evaluated_split)


def read_batches(
    reader: TorchDataset[Any], batches: Iterable[tuple[list[Item], Position]], num_workers: int
) -> DataLoader[Any]:
    """Reads batches of items: this process chooses the items, and reads the records of a stream; the workers decode them."""
    return DataLoader(
        reader,
        batch_sampler=batches,  # pyright: ignore[reportArgumentType]  # any iterable of batches
        collate_fn=_as_it_is,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator(),  # the loader draws a seed for its workers, not from the training's generator
    )


class _FromPosition:
    """An order, from a position in the data on."""

    def __init__(self, order: RowOrder | StreamOrder, position: Position | None):
        self.order, self.position = order, position

    def __iter__(self) -> Iterator[Any]:
        return self.order.batches(self.position)


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals_to_the_parent(worker: int) -> None:
    """Makes workers ignore signals: a run that is asked to stop needs them to finish its step."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), signal.SIG_IGN)
