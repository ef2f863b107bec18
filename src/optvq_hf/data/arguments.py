"""Settings of the data."""

from dataclasses import dataclass, field, fields
from typing import Any


def argument(default: Any, help: str, may_change_on_resume: bool = False) -> Any:
    """A dataclass field that is a flag of the command line.

    Args:
        help: Text of `--help`.
        may_change_on_resume: Whether the flag may change on resume, because it does not decide what the run computes.
    """
    return field(default=default, metadata={"help": help, "may_change_on_resume": may_change_on_resume})


def check_most(arguments: Any, **most: int) -> None:
    """Raises ValueError if one of these fields is larger than can be meant, and would overflow or never end."""
    for name, largest in most.items():
        value = getattr(arguments, name)
        if value is not None and value > largest:
            raise ValueError(f"{name} may be at most {largest:,}, got {value}")


def may_change_on_resume(*arguments: type) -> set[str]:
    """Settings that may change on resume: names of fields of these dataclasses."""
    return {entry.name for one in arguments for entry in fields(one) if entry.metadata.get("may_change_on_resume")}


# Largest value of a count that has no bound of its own, and of a seed.
LARGEST_COUNT, LARGEST_SEED = 10**9, 2**32 - 1


@dataclass
class DatasetArguments:
    """A dataset, and where it is."""

    _argument_group_name = "dataset"

    dataset: str | None = argument(
        None,
        "Hub id, local folder (Parquet, Arrow, image files, what `save_to_disk` wrote, ...), file or glob (*.parquet, *.tar, "
        "*.png, ...), `imagefolder` with --data-dir, or `fashion_mnist_sample`, which ships with this package",
        may_change_on_resume=True,
    )
    dataset_config: str | None = argument(
        None, "Configuration of a Hub dataset that has several configurations", may_change_on_resume=True
    )
    data_dir: str | None = argument(
        None, "Folder inside the dataset, or the folder of `imagefolder`", may_change_on_resume=True
    )
    streaming: bool = argument(False, "Read the dataset as a stream, without downloading it first")


@dataclass
class SourceArguments(DatasetArguments):
    """A dataset of images, and how it is read."""

    _argument_group_name = "source"

    image_column: str | None = argument(None, "Image column; by default the only one")
    max_unreadable: float = argument(
        0.1,
        "Largest share of images that may be unreadable, in training, where others replace them, and elsewhere, where they "
        "are skipped; they are counted and reported",
        may_change_on_resume=True,
    )
    num_workers: int = argument(
        0, "Worker processes that decode and resize images; 0 uses the main process", may_change_on_resume=True
    )

    def __post_init__(self) -> None:
        check_most(self, num_workers=1024)
        if self.num_workers < 0:
            raise ValueError(f"num_workers must be 0 or greater, got {self.num_workers}")
        if not 0 <= self.max_unreadable <= 1:
            raise ValueError(f"max_unreadable must lie in [0, 1], got {self.max_unreadable}")


@dataclass
class DataArguments(SourceArguments):
    """Datasets, splits, augmentation and reading."""

    _argument_group_name = "data"

    train_split: str = argument(
        "train",
        "Split to train on; slices such as `train[10%%:]` work unless streaming. The files of a glob are split `train`",
    )
    eval_split: str = argument(
        "test", "Split to evaluate on; slices such as `train[:10%%]` work unless streaming", may_change_on_resume=True
    )
    eval_fraction: float = argument(
        0.0,
        "Hold out about this share of the training split, drawn at random, and evaluate on it instead of --eval-split; the "
        "same images with --streaming",
    )
    eval_fraction_seed: int = argument(0, "Seed that draws the images of --eval-fraction")
    shuffle_buffer: int = argument(
        10_000,
        "Number of images of a stream that are shuffled together; memory holds up to three times as many, undecoded",
    )
    latents: str | None = argument(
        None,
        "Folder of latents of the training split (`optvq tokenize --latents`), on which the quantizer is trained alone: with "
        "--freeze-encoder and --freeze-decoder",
        may_change_on_resume=True,
    )
    random_crop: bool = argument(False, "Crop training images at a random position instead of the centre")
    random_flip: bool = argument(False, "Mirror training images with probability 1/2")

    @property
    def evaluated_split(self) -> str:
        """Name of the images that are evaluated on."""
        if self.eval_fraction == 0:
            return self.eval_split
        return f"{self.train_split} (a random {100 * self.eval_fraction:g} %, seed {self.eval_fraction_seed})"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction must lie in [0, 1), got {self.eval_fraction}")
        if self.eval_fraction_seed < 0:
            raise ValueError(f"eval_fraction_seed must be 0 or greater, got {self.eval_fraction_seed}")
        check_most(self, eval_fraction_seed=LARGEST_SEED, shuffle_buffer=LARGEST_COUNT)
        for name in ("streaming", "random_crop", "random_flip"):
            if self.latents is not None and getattr(self, name):
                how = "" if name == "streaming" else ": `optvq tokenize --latents` has --crops and --flips"
                raise ValueError(f"--latents excludes --{name.replace('_', '-')}{how}")
        if self.shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer must be at least 1, got {self.shuffle_buffer}")
