"""Batches of pixel values from a dataset of images."""

from collections.abc import Iterator

import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from transformers.image_utils import pil_torch_interpolation_mapping

from ..image_processing_optvq import OptVQImageProcessor
from .arguments import DataArguments
from .loading import decode_image, load_images


class ImageCollator:
    """Turns records of [`load_images`] into one (B, num_channels, H, W) float32 tensor in [-1, 1].

    Args:
        image_processor: The one that is saved with the model, so that training and use see the same pixels.
        random_crop: Crop at a random place instead of the centre.
        random_flip: Mirror every other image.
    """

    def __init__(self, image_processor: OptVQImageProcessor, random_crop: bool = False, random_flip: bool = False):
        self.image_processor = image_processor
        size, crop = image_processor.size, image_processor.crop_size
        self.options = {"do_resize": False, "do_center_crop": False} if random_crop else {}
        steps = []
        if random_crop:
            steps.append(v2.Resize(size.shortest_edge, pil_torch_interpolation_mapping[image_processor.resample]))
            steps.append(v2.RandomCrop((crop.height, crop.width)))
        if random_flip:
            steps.append(v2.RandomHorizontalFlip())
        self.augment = v2.Compose(steps) if steps else v2.Identity()

    def __call__(self, records: list[dict]) -> torch.Tensor:
        images = [self.augment(decode_image(record["image"])) for record in records]
        return self.image_processor(images, return_tensors="pt", **self.options)["pixel_values"]


def training_batches(
    arguments: DataArguments,
    image_processor: OptVQImageProcessor,
    batch_size: int,
    seed: int = 0,
    process_index: int = 0,
    num_processes: int = 1,
) -> "TrainingBatches":
    """Endless shuffled batches of the training split; every process gets its own share of the images."""
    images = split_dataset_by_node(load_images(arguments, arguments.train_split), process_index, num_processes)
    collator = ImageCollator(image_processor, arguments.random_crop, arguments.random_flip)
    return TrainingBatches(arguments, images, collator, batch_size, seed)


class TrainingBatches:
    """Endless iterator over batches, a new order in every epoch.

    Attributes:
        batches_per_epoch: None for a stream, whose length is not known.
    """

    def __init__(self, arguments: DataArguments, images, collator: ImageCollator, batch_size: int, seed: int):
        self.arguments, self.batch_size = arguments, batch_size
        self.batches_per_epoch = len(images) // batch_size if isinstance(images, Dataset) else None
        if self.batches_per_epoch == 0:
            raise ValueError(f"{self._name} has {len(images)} images per process, fewer than one batch of {batch_size}")
        if isinstance(images, IterableDataset):
            images = images.shuffle(seed=seed, buffer_size=arguments.shuffle_buffer)
        self.images = images
        self.loader = DataLoader(
            images,
            batch_size=batch_size,
            shuffle=isinstance(images, Dataset) or None,
            drop_last=True,
            collate_fn=collator,
            num_workers=arguments.num_workers,
            persistent_workers=arguments.num_workers > 0,
            generator=torch.Generator().manual_seed(seed),
        )

    @property
    def _name(self) -> str:
        return f"split {self.arguments.train_split!r} of dataset {self.arguments.dataset!r}"

    def __iter__(self) -> Iterator[torch.Tensor]:
        epoch = 0
        while True:
            if isinstance(self.images, IterableDataset):
                self.images.set_epoch(epoch)
            empty = True
            for batch in self.loader:
                empty = False
                yield batch
            if empty:
                raise ValueError(f"{self._name} has fewer images than one batch of {self.batch_size}")
            epoch += 1


def evaluation_batches(
    arguments: DataArguments, image_processor: OptVQImageProcessor, batch_size: int, max_images: int | None = None
) -> DataLoader:
    """All images of the evaluation split once, in order; the last batch may be smaller."""
    images = load_images(arguments, arguments.eval_split)
    if max_images is not None:
        images = images.take(max_images)
    return DataLoader(
        images, batch_size=batch_size, collate_fn=ImageCollator(image_processor), num_workers=arguments.num_workers
    )
