"""Turn a dataset of images into a dataset of tokens.

    optvq tokenize --model runs/mnist --dataset ylecun/mnist --columns label --output-dir tokens/mnist
    torchrun --nproc_per_node 8 -m optvq_hf.commands.tokenize --model ... --dataset ... --output-dir ... --num-workers 8

Writes Parquet shards that `load_dataset` reads, a manifest and a dataset card. Started again, it keeps what is finished. The
processes share the shards; they need one file system.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from ..data.arguments import SourceArguments
from ..tokenization.arguments import TokenizationArguments
from .cli import COMMANDS
from .errors import one_line_errors
from .folders import check_writable
from .parser import Parser
from .publish import check_repo_id


# Processes wait for the slowest of them; torch would give up after minutes.
LONGEST_WAIT = timedelta(days=30)


def make_parser() -> Parser:
    """Makes the parser of the command: flags of tokenizing and of the source."""
    return Parser([TokenizationArguments, SourceArguments], "tokenize", COMMANDS["tokenize"])


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `optvq tokenize`; a user's mistake ends the process with one line."""
    parser = make_parser()
    arguments, source = parser.parse(argv)
    for name, value in (("model", arguments.model), ("dataset", source.dataset), ("output-dir", arguments.output_dir)):
        if not value:
            parser.error(f"--{name} is missing")
    if arguments.push_to_hub:
        check_repo_id(parser, "--push-to-hub", arguments.push_to_hub)
    if arguments.engine == "ray" and source.streaming:
        parser.error("--engine ray excludes --streaming: actors read rows by number")
    with one_line_errors("tokenize"):
        tokenize(arguments, source)


def tokenize(arguments: TokenizationArguments, source: SourceArguments) -> None:
    """Tokenizes a split, in every process of the command.

    Raises:
        OSError: If something does not exist, cannot be reached or cannot be written.
        ValueError: If model, dataset or columns are wrong, or the folder holds tokens that other settings made.
    """
    from accelerate import InitProcessGroupKwargs

    from ..tokenization.job import TokenizationJob, tokenize_locally
    from ..training.lock import locked
    from ..training.processes import gather_objects, is_first, start_together, world_size
    from ..training.signals import interrupted_by_requests

    accelerator = start_together(kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)])
    folder = Path(arguments.output_dir or "")
    check_writable(folder)
    if arguments.push_to_hub and is_first():
        from ..publishing.token_pusher import prepare

        prepare(arguments.push_to_hub, arguments.private)
    with interrupted_by_requests():
        job = TokenizationJob(arguments, source, device=None if arguments.engine == "ray" else accelerator.device)
        writer = job.writer()
        writer.batch_size = min(gather_objects(writer.batch_size))
        settings = job.settings(writer)
        job.check_same(gather_objects(settings))
        with locked(folder):
            if is_first():
                job.folder.begin(settings, arguments.overwrite)
            accelerator.wait_for_everyone()
            if arguments.engine == "ray":
                from ..tokenization.ray_engine import tokenize_with_ray

                tokenize_with_ray(job, writer, settings)
            else:
                tokenize_locally(job, writer, accelerator.process_index, world_size())
            accelerator.wait_for_everyone()
            if not is_first():
                return
            manifest = job.finish(writer, settings)
    split = manifest["splits"][job.folder.split]
    print(f"tokens     {folder}: {split['rows']:,} rows of {split['images']:,} images in {len(split['shards'])} shards")
    if split["num_unreadable"]:
        print(f"unreadable {split['num_unreadable']} images, which manifest.json lists")
    if arguments.push_to_hub:
        from ..publishing.token_pusher import push_tokens

        print(f"published  {push_tokens(folder, arguments.push_to_hub)}")


if __name__ == "__main__":
    main()
