"""Settings of tokenizing a dataset, and of the way back."""

from dataclasses import dataclass
from typing import Any, Literal

from ..data.arguments import LARGEST_COUNT, LARGEST_SEED, argument, check_most


# Columns that shards have of their own.
OWN_COLUMNS = ("index", "codes", "latents", "crop", "flipped", "image")


@dataclass
class TokenizationArguments:
    """Model, images and shards of tokens."""

    _argument_group_name = "tokenization"

    model: str | None = argument(None, "Hub id or folder of the model")
    model_revision: str | None = argument(None, "Branch, tag or commit of a model on the Hub")
    output_dir: str | None = argument(None, "Folder for the tokens; started again, only what is missing is tokenized")
    split: str = argument(
        "train",
        "Split to tokenize; slices such as `train[10%%:]` work unless streaming. Splits may share an output folder",
    )
    columns: list[str] | None = argument(None, "Columns of the dataset to keep beside the codes, such as `label`")
    batch_size: int | None = argument(
        None, "Images per batch; by default as many as fit, at most 256. It does not change nearest codes"
    )
    shard_size: int = argument(10_000, "Images of the dataset per shard, which is one Parquet file")
    max_images: int | None = argument(
        None, "Most images to tokenize, a random sample (of a stream, the first); by default all"
    )
    flips: bool = argument(False, "Add rows with every image mirrored, marked by the column `flipped`")
    crops: int = argument(0, "Add so many rows per image with random crops of it, numbered from 1 by the column `crop`")
    seed: int = argument(0, "Seed of --crops; a crop depends on it and on the image alone")
    assignment: Literal["nearest", "potentials", "sinkhorn"] | None = argument(
        None, "Assignment of codes; by default that of the model. Only with sinkhorn do codes depend on the batch"
    )
    tile_size: int | None = argument(
        None, "Encode in tiles with sides of so many pixels, which bounds the memory that large images take"
    )
    latents: bool = argument(
        False,
        "Write what the encoder gives instead of codes, for `optvq train --latents`: as float32, 4 bytes a number",
    )
    dtype: Literal["float32", "bfloat16"] = argument("float32", "Precision of the encoder")
    engine: Literal["local", "ray"] = argument(
        "local", "`local` for this command's processes, `ray` for the actors of a Ray Data pipeline (extra `ray`)"
    )
    num_actors: int = argument(1, "Actors of --engine ray that tokenize, each with a GPU where there are GPUs")
    push_to_hub: str | None = argument(
        None, "Push the tokens to this dataset of the Hub, NAMESPACE/NAME; only what is missing there is sent"
    )
    private: bool = argument(False, "Make a new dataset of --push-to-hub private")
    overwrite: bool = argument(False, "Remove tokens of this split that other settings made")

    def __post_init__(self) -> None:
        _check_positive(self, "batch_size", "shard_size", "max_images", "num_actors", "tile_size")
        check_most(self, batch_size=10**6, shard_size=LARGEST_COUNT, max_images=LARGEST_COUNT, crops=1000)
        check_most(self, seed=LARGEST_SEED, num_actors=10**6, tile_size=2**16)
        for name in ("crops", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or greater, got {getattr(self, name)}")
        if "+" in self.split:
            raise ValueError(
                f"split {self.split!r} is of several splits: tokenize one after the other into the same folder"
            )
        if self.latents and self.assignment is not None:
            raise ValueError("--latents excludes --assignment: latents are what codes are assigned to")
        columns = self.columns or []
        for name in columns:
            if name in OWN_COLUMNS or columns.count(name) > 1:
                reason = "is one that the shards have of their own" if name in OWN_COLUMNS else "is named twice"
                raise ValueError(f"columns: {name!r} {reason}; got {' '.join(columns)}")


@dataclass
class DetokenizationArguments:
    """Tokens, model and pictures."""

    _argument_group_name = "detokenization"

    tokens: str | None = argument(None, "Folder that `optvq tokenize` wrote, or Hub id of such a dataset")
    tokens_revision: str | None = argument(None, "Branch, tag or commit of a dataset on the Hub")
    output_dir: str | None = argument(None, "Folder for the pictures, which `load_dataset` reads as an image folder")
    split: str | None = argument(None, "Split to decode; by default the only one")
    model: str | None = argument(None, "Hub id or folder of the model; by default the one that made the tokens")
    model_revision: str | None = argument(None, "Branch, tag or commit of a model on the Hub")
    batch_size: int = argument(32, "Images per batch")
    tile_size: int | None = argument(
        None, "Decode in tiles with sides of so many pixels, which bounds the memory that large images take"
    )
    max_images: int | None = argument(None, "Most rows to decode, the first; by default all")
    overwrite: bool = argument(False, "Remove pictures of other tokens from the output folder")

    def __post_init__(self) -> None:
        _check_positive(self, "batch_size", "max_images", "tile_size")
        check_most(self, batch_size=10**6, max_images=LARGEST_COUNT, tile_size=2**16)


def _check_positive(arguments: Any, *names: str) -> None:
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
