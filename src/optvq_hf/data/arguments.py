"""What to read images from."""

from dataclasses import dataclass, field
from typing import Any


def argument(default: Any, help: str) -> Any:
    """A dataclass field with the help text that the command line shows."""
    return field(default=default, metadata={"help": help})


@dataclass
class DataArguments:
    """Where images come from and how they reach the model."""

    _argument_group_name = "data"

    dataset: str | None = argument(
        None,
        "Hub id, local folder (Parquet, Arrow, image files, ...), Parquet file or glob, `imagefolder` with --data-dir, or "
        "`fashion_mnist_sample`, which ships with this package",
    )
    dataset_config: str | None = argument(None, "Configuration of a Hub dataset that has several")
    data_dir: str | None = argument(None, "Folder inside the dataset, or the folder of `imagefolder`")
    image_column: str | None = argument(None, "Column with the images; by default the only image column")
    train_split: str = argument(
        "train",
        "Split to train on; slices such as `train[10%%:]` work unless streaming. The files of a Parquet glob are split `train`",
    )
    eval_split: str = argument("test", "Split to evaluate on; slices such as `train[:10%%]` work unless streaming")
    streaming: bool = argument(False, "Read the dataset as a stream instead of downloading it first")
    shuffle_buffer: int = argument(
        10_000, "Images of a stream that are shuffled together; up to three times as many are in memory, undecoded"
    )
    max_unreadable: float = argument(
        0.1, "Share of training images that may be unreadable; they are replaced, counted and reported"
    )
    random_crop: bool = argument(False, "In training, crop at a random place instead of the centre")
    random_flip: bool = argument(False, "In training, mirror images with probability 1/2")
    num_workers: int = argument(0, "Processes that decode and resize images; 0 does it in the training process")

    def __post_init__(self) -> None:
        if self.shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer must be at least 1, got {self.shuffle_buffer}")
        if self.num_workers < 0:
            raise ValueError(f"num_workers must be 0 or greater, got {self.num_workers}")
        if not 0 <= self.max_unreadable <= 1:
            raise ValueError(f"max_unreadable must lie in [0, 1], got {self.max_unreadable}")
