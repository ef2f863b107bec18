"""Tokenizing one split of a dataset: its settings, and the engine of this command's processes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .. import __version__
from ..configuration_fields_optvq import OptVQFields
from ..data.arguments import SourceArguments
from ..data.batches import CountedBatches
from ..data.fetching import find_folder
from ..data.fingerprint import commit_of, full_fingerprint
from ..data.loading import UnreadableImageError, hub_id, load_images
from ..training.digests import DIGEST, encoder_digest, folder_digest
from ..training.models import MODEL_FILES
from .arguments import TokenizationArguments
from .card import make_card
from .manifest import Shard, TokenFolder, difference
from .shards import ShardWriter, Source, Wanted
from .tokenizer import OptVQTokenizer


# Packages, beside this one, whose versions may change pixels or codes.
DECIDING = ("pillow", "torch", "torchvision", "transformers")


@dataclass
class TokenizationJob:
    """What is tokenized, how, and where to. Can be pickled: the actors of Ray make their own writers of it.

    Args:
        arguments, source: Settings of the command.
        model_commit: Commit of a model of the Hub.
        device: Of this process; by default a GPU where there is one.
    """

    arguments: TokenizationArguments
    source: SourceArguments
    model_commit: str | None = None
    device: torch.device | None = None

    def __post_init__(self) -> None:
        assert self.arguments.model is not None and self.arguments.output_dir is not None  # the parser has checked this
        folder = find_folder(self.arguments.model, MODEL_FILES, self.arguments.model_revision)
        if not Path(
            self.arguments.model
        ).is_dir():  # then it is in the cache of the Hub; every process loads this very commit
            self.model_commit = self.model_commit or folder.name

    @property
    def folder(self) -> TokenFolder:
        """Where the shards go. A slice of a split has the name of the split."""
        return TokenFolder(Path(self.arguments.output_dir or ""), self.arguments.split.partition("[")[0])

    def tokenizer(self) -> OptVQTokenizer:
        """The tokenizer that the settings ask for."""
        arguments = self.arguments
        return OptVQTokenizer(
            arguments.model or "",
            self.model_commit,
            assignment=arguments.assignment,
            dtype=arguments.dtype,
            flips=arguments.flips,
            crops=arguments.crops,
            seed=arguments.seed,
            skip_unreadable=True,
            device=self.device,
            tile_size=arguments.tile_size,
            latents=arguments.latents,
        )

    def writer(self) -> ShardWriter:
        """Loads model and images. Errors as of [`load_images`] and [`load_model`]."""
        images = load_images(self.source, self.arguments.split, self.arguments.columns or ())
        source = Source(images, self.arguments.shard_size, self.arguments.max_images)
        tokenizer = self.tokenizer()
        tokenizer.model.check_tile_size(self.arguments.tile_size)
        batch_size = self.arguments.batch_size or tokenizer.find_batch_size()
        return ShardWriter(
            tokenizer, source, self.folder, batch_size, self.source.num_workers, self.source.max_unreadable
        )

    def settings(self, writer: ShardWriter) -> dict[str, Any]:
        """All that decides the shards, for the manifest; JSON."""
        arguments, source, tokenizer = self.arguments, self.source, writer.tokenizer
        config = tokenizer.model.config
        assignment = arguments.assignment or config.inference_assignment
        processing = tokenizer.image_processor.to_dict()
        folder = find_folder(arguments.model or "", MODEL_FILES, self.model_commit)
        return {
            "model": {
                "id": arguments.model,
                "revision": self.model_commit,
                DIGEST: folder_digest(folder),
                "dtype": arguments.dtype,
                "assignment": assignment,
                "config": {name: getattr(config, name) for name in sorted(OptVQFields.__dataclass_fields__)},
                "preprocessing": {name: processing[name] for name in sorted(processing) if name != "auto_map"},
            },
            "versions": {name: version(name) for name in DECIDING} | {"optvq_hf": __version__},
            "columns": list(arguments.columns or ()),
            "flips": arguments.flips,
            "crops": arguments.crops,
            "seed": arguments.seed if arguments.crops else None,
            # Tiles change no more than rounding, or with attention a little more; folders without them have no such entry.
            **({"tile_size": arguments.tile_size} if arguments.tile_size else {}),
            **({"latents_of": encoder_digest(folder)} if arguments.latents else {}),
            "shard_size": arguments.shard_size,
            "batch_size": writer.batch_size
            if assignment == "sinkhorn"
            else None,  # the codes of others do not depend on it
            "dataset": {
                "id": hub_id(source.dataset or ""),
                "name": source.dataset,
                "config": source.dataset_config,
                "data_dir": source.data_dir,
                "split": arguments.split,
                "image_column": source.image_column,
                "streaming": source.streaming,
                "max_images": arguments.max_images,
                "commit": commit_of(writer.source.images),
                "fingerprint": full_fingerprint(writer.source.images),
            },
        }

    def check_same(self, settings: Sequence[dict[str, Any]]) -> None:
        """Raises ValueError if processes, whose settings these are by rank, would make different shards."""
        for rank, of_rank in enumerate(settings):
            if wrong := difference(settings[0], of_rank):
                raise ValueError(
                    f"process 0 tokenizes with {wrong} of process {rank}: all machines need the same files and versions"
                )

    def finish(self, writer: ShardWriter, settings: dict[str, Any]) -> dict[str, Any]:
        """Writes manifest and card, once every shard is written; returns the manifest.

        Raises:
            UnreadableImageError: If too many images of all shards together could not be read.
            ValueError: If a shard is missing or broken, or there are no rows.
        """
        folder, shards = self.folder, []
        for number in range(writer.source.num_found):
            shard = folder.finished(number, writer.source.num_shards, is_new=True)
            if shard is None:
                name = folder.name(number, writer.source.num_shards)
                raise ValueError(f"{folder.folder} lacks {name}, or it is broken: run the command again")
            shards.append(shard)
        if not shards:
            raise ValueError("the stream has no images to tokenize")
        reasons = [entry["reason"] for shard in shards for entry in shard.unreadable]
        images = sum(shard.images for shard in shards)
        CountedBatches(self.source.max_unreadable, images).count(images, reasons)
        if not any(shard.rows for shard in shards):
            raise UnreadableImageError(f"none of the {images} images can be read; the last: {reasons[-1]}")
        column = writer.tokenizer.column
        values = writer.features[column]
        facts = {column: {"dtype": values.dtype, "shape": list(values.shape)}, "columns": list(writer.features)}
        return folder.finish(settings, facts, shards, make_card)


def tokenize_locally(
    job: TokenizationJob,
    writer: ShardWriter,
    process_index: int,
    num_processes: int,
    report: Callable[[int, Shard], None] = lambda number, shard: None,
) -> None:
    """Makes this process's share of the shards: every `num_processes`-th. Finished ones stay.

    Args:
        report: Called for every shard that was made.
    """
    wanted = Wanted(job.folder, writer.source.num_shards, process_index, num_processes)
    kept, rows, size = sum(shard.images for shard in wanted.kept.values()), writer.source.rows, writer.source.shard_size
    total = None
    if rows is not None:
        mine = range(process_index, writer.source.num_shards or 0, num_processes)
        total = sum(min(size, len(rows) - shard * size) for shard in mine)
    if kept:
        print(f"process {process_index}: {len(wanted.kept)} finished shards are as they were written, and stay")
    with tqdm(total=total, initial=kept, desc="tokenizing", unit="img", disable=process_index > 0 or None) as bar:
        for number, images, shard in writer.write(wanted):
            bar.update(images)
            if shard is not None:
                report(number, shard)
