"""What `optvq COMMAND --help` shows: these flags, in this order, and a note. Commands that are not here show all flags."""

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
    "transplant": (
        "model", "dataset", "output_dir", "eval_fraction", "quantizer_config", "decoder_config", "crops", "flips",
        "num_workers", "overwrite",
    ),
    "ids": (
        "dataset", "embedding_column", "key_column", "output_dir", "num_quantizers", "codebook_size", "max_steps", "unique",
        "quantizer", "seed",
    ),
}  # fmt: skip

NOTES = {
    "train": "Without --config, --model and --backbone, a recipe that fits the images and the memory is proposed and used, "
    "with the flags that are given; these defaults hold otherwise.",
}
