"""Batches of pixel values from a dataset of images."""

import itertools
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
        random_flip: Mirror images with probability 1/2.
    """

    def __init__(self, image_processor: OptVQImageProcessor, random_crop: bool = False, random_flip: bool = False):
        self.image_processor = image_processor
        size, crop = image_processor.size, image_processor.crop_size
        self.options = {"do_resize": False, "do_center_crop": False} if random_crop else {}
        steps = []
        if random_crop:
            target = size.shortest_edge or (size.height, size.width)
            steps.append(v2.Resize(target, pil_torch_interpolation_mapping[image_processor.resample]))
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
    """Endless shuffled batches of the training split; every process gets its own share of the images.

    Raises:
        ValueError: If a process's share is smaller than one batch.
    """
    images = load_images(arguments, arguments.train_split)
    batches_per_epoch = None
    if isinstance(images, Dataset):  # counted before the images are shared out, so that all processes agree
        batches_per_epoch = len(images) // num_processes // batch_size
        if batches_per_epoch == 0:
            raise ValueError(
                f"split {arguments.train_split!r} of dataset {arguments.dataset!r} has {len(images)} images, "
                f"fewer than one batch of {batch_size} for each of {num_processes} processes"
            )
    else:
        images = images.shuffle(seed=seed, buffer_size=arguments.shuffle_buffer)
    images = split_dataset_by_node(images, process_index, num_processes)
    loader = DataLoader(
        images,
        batch_size=batch_size,
        shuffle=isinstance(images, Dataset) or None,
        drop_last=True,
        collate_fn=ImageCollator(image_processor, arguments.random_crop, arguments.random_flip),
        num_workers=arguments.num_workers,
        persistent_workers=arguments.num_workers > 0,
        generator=torch.Generator().manual_seed(seed + process_index),
    )
    return TrainingBatches(loader, batches_per_epoch)


class TrainingBatches:
    """Endless iterator over the batches of a loader, a new order in every epoch.

    Attributes:
        batches_per_epoch: None for a stream, whose length is not known.
    """

    def __init__(self, loader: DataLoader, batches_per_epoch: int | None):
        self.loader, self.batches_per_epoch = loader, batches_per_epoch

    def __iter__(self) -> Iterator[torch.Tensor]:
        for epoch in itertools.count():
            if isinstance(self.loader.dataset, IterableDataset):
                self.loader.dataset.set_epoch(epoch)
            empty = True
            for batch in self.loader:
                empty = False
                yield batch
            if empty:
                raise ValueError(f"the training stream has fewer images than one batch of {self.loader.batch_size}")


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
