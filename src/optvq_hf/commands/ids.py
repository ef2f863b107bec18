"""Turn embeddings of items into ids: a short sequence of codes for each item.

    optvq ids --dataset items.parquet --embedding-column embedding --key-column item --num-quantizers 3 --codebook-size 256 \
        --output-dir ids/items --unique
    optvq ids --dataset new_items.parquet --embedding-column embedding --key-column item --quantizer ids/items --unique \
        --output-dir ids/new_items

Writes ids.parquet with `key` and `codes`, sorted by key, the quantizer for `ResidualOptVQQuantizer.from_pretrained`, and a
report. Ids depend neither on the order of the rows nor on the number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..item_ids.arguments import EmbeddingArguments, IdArguments
from .cli import COMMANDS
from .errors import one_line_errors
from .folders import check_writable
from .parser import Parser
from .tokenize import LONGEST_WAIT


def make_parser() -> Parser:
    """Makes the parser of the command."""
    return Parser([EmbeddingArguments, IdArguments], "ids", COMMANDS["ids"])


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `optvq ids`; a user's mistake ends the process with one line."""
    parser = make_parser()
    source, arguments = parser.parse(argv)
    for name, value in (("dataset", source.dataset), ("output-dir", arguments.output_dir)):
        if not value:
            parser.error(f"--{name} is missing")
    for name in ("embedding_column", "key_column"):
        flag, value = f"--{name.replace('_', '-')}", getattr(source, name)
        if source.is_array and value is not None:
            parser.error(f"{source.dataset} has no columns: leave {flag} out")
        if not source.is_array and value is None:
            parser.error(f"{flag} is missing")
    if source.embedding_column is not None and source.embedding_column == source.key_column:
        parser.error(f"--embedding-column and --key-column are both {source.key_column}: name two columns")
    if (source.is_array or source.is_tensors) and (source.split != "train" or source.streaming):
        parser.error(f"{source.dataset} has no splits and is not streamed: leave --split and --streaming out")
    if arguments.quantizer is not None:
        chosen = [name for name in arguments.of_training() if getattr(arguments, name) is not None]
        if chosen:
            parser.error(f"--quantizer excludes --{chosen[0].replace('_', '-')}: it is trained already")
        if Path(arguments.quantizer).resolve() == Path(arguments.output_dir or "").resolve():
            parser.error("--output-dir must be another folder than --quantizer, whose ids stay")
    with one_line_errors("ids"):
        ids(arguments, source)


def ids(arguments: IdArguments, source: EmbeddingArguments) -> None:
    """Gives ids to the items of a dataset, in every process of the command.

    Raises:
        OSError: If something does not exist, cannot be reached or cannot be written.
        ValueError: As [`~job.make_ids`].
    """
    from accelerate import InitProcessGroupKwargs

    from ..item_ids.job import make_ids
    from ..training.processes import start_together
    from ..training.signals import interrupted_by_requests

    accelerator = start_together(kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)])
    check_writable(Path(arguments.output_dir or ""))
    with interrupted_by_requests():
        report = make_ids(arguments, source, accelerator.device)
    if report is None:
        return
    nearest, given = report["collisions"]["nearest codes"], report["collisions"]["ids"]
    usage = " ".join(f"{level['usage']:.1f}" for level in report["levels"])
    print(f"ids        {arguments.output_dir}: {report['items']:,} items, {given['distinct_ids']:,} different ids")
    print(
        f"collisions {given['colliding_items']:,} items share an id with another, {nearest['colliding_items']:,} by their "
        "nearest codes"
    )
    print(f"usage      {usage} % of the codes, level by level")


if __name__ == "__main__":
    main()
