"""Turn a dataset of tokens back into pictures.

    optvq detokenize --tokens tokens/mnist --output-dir pictures

Writes PNG pictures whose names end in the `index` of their row, and metadata.jsonl with the other columns, so that
`load_dataset` reads the folder, which may hold the pictures of one split alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..tokenization.arguments import DetokenizationArguments
from .cli import COMMANDS
from .errors import one_line_errors
from .folders import check_writable
from .parser import Parser


def make_parser() -> Parser:
    """Makes the parser of the command."""
    return Parser([DetokenizationArguments], "detokenize", COMMANDS["detokenize"])


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `optvq detokenize`; a user's mistake ends the process with one line."""
    parser = make_parser()
    [arguments] = parser.parse(argv)
    for name, value in (("tokens", arguments.tokens), ("output-dir", arguments.output_dir)):
        if not value:
            parser.error(f"--{name} is missing")
    with one_line_errors("detokenize"):
        detokenize(arguments)


def detokenize(arguments: DetokenizationArguments) -> None:
    """Decodes one split.

    Raises:
        OSError: If something does not exist, cannot be reached or cannot be written.
        ValueError: If the tokens are broken, other weights made them, or the output folder holds something else.
    """
    from accelerate import PartialState

    from ..data.fetching import find_folder
    from ..tokenization.detokenizing import METADATA_FILE, begin, columns_to_skip, write_pictures
    from ..tokenization.manifest import read_manifest
    from ..tokenization.reading import identity, load_tokens, model_of
    from ..training.lock import locked
    from ..training.models import load_model
    from ..training.signals import interrupted_by_requests

    folder = Path(arguments.output_dir or "")
    check_writable(folder)
    tokens_folder = find_folder(arguments.tokens or "", revision=arguments.tokens_revision, kind="dataset")
    manifest = read_manifest(tokens_folder)
    name, revision = arguments.model, arguments.model_revision
    if name is None:
        name, revision = model_of(manifest, arguments.tokens or ""), revision or manifest["model"].get("revision")
    with interrupted_by_requests():
        tokens = load_tokens(tokens_folder, name, arguments.split, model_revision=revision)
        if arguments.max_images is not None:
            tokens = tokens.select(range(min(arguments.max_images, len(tokens))))
        if skipped := columns_to_skip(tokens.remove_columns("codes").features):
            print(f"skipped    columns that {METADATA_FILE} cannot hold: {', '.join(skipped)}")
        tokens = tokens.remove_columns(skipped)
        model, image_processor = load_model(name, revision=revision)
        model.check_tile_size(arguments.tile_size)
        model.to(PartialState().device or "cpu")  # pyright: ignore[reportArgumentType]
        with locked(folder):
            begin(folder, {**identity(manifest, str(tokens.split)), "rows": len(tokens)}, arguments.overwrite)
            number = write_pictures(tokens, model, image_processor, folder, arguments.batch_size, arguments.tile_size)
    print(f"pictures   {folder}: {number:,}")


if __name__ == "__main__":
    main()
