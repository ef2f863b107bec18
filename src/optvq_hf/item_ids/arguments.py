"""Settings of item ids."""

import math
from dataclasses import dataclass

from ..data.arguments import LARGEST_COUNT, LARGEST_SEED, DatasetArguments, argument, check_most


# Files of arrays, which the `datasets` library does not read.
ARRAYS, TENSORS = ".npy", ".safetensors"


@dataclass
class EmbeddingArguments(DatasetArguments):
    """Embeddings, and the keys of their items."""

    _argument_group_name = "embeddings"

    dataset: str | None = argument(
        None,
        "Hub id, local folder or file of Parquet, Arrow, ..., with a column of embeddings and one of keys; or a .safetensors "
        "file with tensors of these names; or a .npy file of (N, d), whose keys are the numbers of its rows",
    )
    split: str = argument("train", "Split of the dataset; slices such as `train[10%%:]` work unless streaming")
    embedding_column: str | None = argument(None, "Column of the embeddings, lists of equally many numbers")
    key_column: str | None = argument(None, "Column of the items' keys, integers or text, each once")

    @property
    def is_array(self) -> bool:
        """Whether it is a file of one array, without columns."""
        return (self.dataset or "").lower().endswith(ARRAYS)

    @property
    def is_tensors(self) -> bool:
        """Whether it is a file of named tensors."""
        return (self.dataset or "").lower().endswith(TENSORS)


@dataclass
class IdArguments:
    """Levels, their training, and what is written."""

    _argument_group_name = "item ids"

    output_dir: str | None = argument(None, "Folder for the ids, the quantizer and the report")
    num_quantizers: int | None = argument(None, "Number of levels, which is the length of an id; 3 by default")
    codebook_size: int | None = argument(None, "Codes of every level; 256 by default")
    max_steps: int | None = argument(None, "Training steps; 100 by default")
    batch_size: int | None = argument(None, "Embeddings of a training step, drawn at random; 8192 by default")
    epsilon: float | None = argument(
        None, "Inverse strength of the transport's regularisation; 10 by default. Larger is closer to unregularised"
    )
    seed: int | None = argument(None, "Seed of the training; 0 by default")
    unique: bool = argument(
        False,
        "Give every item an id of its own: items that share all codes but the last share its codes out among them",
    )
    quantizer: str | None = argument(
        None,
        "Folder that `optvq ids` wrote, or Hub id of one: give ids by its quantizer, without training; ids in it stay",
    )
    overwrite: bool = argument(False, "Replace the ids that an earlier run wrote to the output folder")

    def __post_init__(self) -> None:
        counts = {"num_quantizers": 64, "codebook_size": 2**24, "max_steps": LARGEST_COUNT, "batch_size": LARGEST_COUNT}
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        check_most(self, **counts, seed=LARGEST_SEED)
        if self.seed is not None and self.seed < 0:
            raise ValueError(f"seed must be 0 or greater, got {self.seed}")
        if self.epsilon is not None and not 0 < self.epsilon < math.inf:
            raise ValueError(f"epsilon must be finite and above 0, got {self.epsilon}")

    def of_training(self) -> dict[str, int | float]:
        """The settings that a given quantizer has already, with their defaults."""
        defaults = {
            "num_quantizers": 3,
            "codebook_size": 256,
            "max_steps": 100,
            "batch_size": 8192,
            "epsilon": 10.0,
            "seed": 0,
        }
        chosen = {name: getattr(self, name) for name in defaults}
        return {name: defaults[name] if value is None else value for name, value in chosen.items()}
