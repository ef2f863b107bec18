"""The flags that `optvq COMMAND --help` shows, in this order. Commands that are not here have few, and show all."""

USUAL_FLAGS = {
    "train": (
        "dataset", "config", "output_dir", "max_steps", "batch_size", "learning_rate", "image_size", "codebook_size",
        "save_every", "resume",
    ),
    "evaluate": (
        "model", "dataset", "eval_split", "output_dir", "protocol", "metrics", "assignment", "batch_size", "max_images",
        "overwrite",
    ),
    "compare": (
        "dataset", "output_dir", "rivals", "learning_rates", "seeds", "confirm_seeds", "max_steps", "codebook_size",
        "num_channels", "parallel",
    ),
    "tokenize": (
        "model", "dataset", "split", "output_dir", "columns", "batch_size", "shard_size", "num_workers", "max_images",
        "push_to_hub",
    ),
    "ids": (
        "dataset", "embedding_column", "key_column", "output_dir", "num_quantizers", "codebook_size", "max_steps", "unique",
        "quantizer", "seed",
    ),
}  # fmt: skip
