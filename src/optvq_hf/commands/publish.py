"""Put a model on the Hub, with its code, pipelines, card and results.

    optvq publish runs/mnist your-name/optvq-mnist --dry-run
    optvq publish runs/mnist your-name/optvq-mnist --private

FOLDER is what `optvq train` or `optvq convert` wrote. One commit holds everything, or nothing is committed. An
interrupted call can be repeated; it sends only what is missing. The token is that of `hf auth login` or HF_TOKEN.
"""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from ..publishing.arguments import PublishingArguments
from .cli import COMMANDS
from .errors import one_line_errors
from .folders import check_writable
from .parser import Parser


def make_parser() -> Parser:
    """Makes the parser of the command: folder, repository and flags of publishing."""
    positionals = {"folder": "Folder of the model, or its Hub id", "repo": "Hub id to publish to, NAMESPACE/NAME"}
    return Parser([PublishingArguments], "publish", COMMANDS["publish"], positionals)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `optvq publish`; a user's mistake ends the process with one line."""
    parser = make_parser()
    arguments, source, repo_id = parser.parse(argv)
    check_repo_id(parser, "REPO", repo_id)
    with one_line_errors("publish"):
        publish(source, repo_id, arguments)


def check_repo_id(parser: Parser, name: str, repo_id: str) -> None:
    """Ends the process with one line unless this is a Hub id with a namespace."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        repo_id = ""
    if "/" not in repo_id:
        parser.error(f"{name} must be a Hub id, NAMESPACE/NAME")


def publish(source: str, repo_id: str, arguments: PublishingArguments) -> None:
    """Publishes a model and prints its address.

    Raises:
        OSError: If something does not exist, or the Hub cannot be reached or refuses.
        ValueError: If the model is broken, its records are of other weights, a link leads out of the folder, or an edited
            card does not state the results on record.
    """
    from ..data.fetching import explain, find_folder
    from ..publishing.commits import make_repository, push_folder
    from ..publishing.model_card import CARD_FILE, make_card
    from ..publishing.records import read_facts
    from ..publishing.repository import is_ours, refuse_links, write_repository
    from ..training.models import load_model

    if arguments.card_only and not Path(source).is_dir():
        raise ValueError(f"--card-only writes to a folder, but {source} is not a folder")
    folder = find_folder(source)
    if Path(source).is_dir():  # the cache of the Hub consists of links
        refuse_links(folder)
    if arguments.card_only:
        check_writable(folder)
        card = make_card(read_facts(folder), repo_id.rpartition("/")[2], repo_id, arguments.license)
        card.save(folder / CARD_FILE)
        print(f"card       {folder / CARD_FILE}")
        return
    model, image_processor = load_model(str(folder))
    with TemporaryDirectory() as temporary:
        out = Path(temporary) / "repository"
        write_repository(model, image_processor, folder, repo_id, arguments.license, out)
        files = {
            path.relative_to(out).as_posix(): path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()
        }
        if arguments.dry_run:
            for name, size in files.items():
                print(f"{size:12,}  {name}")
            print(
                f"{sum(files.values()):12,}  bytes in {len(files)} files would be committed to {repo_id}; nothing was sent"
            )
            return
        message = arguments.message or f"Publish {repo_id.rpartition('/')[2]}"
        try:
            make_repository(repo_id, arguments.private, arguments.revision, arguments.create_pr)
            address = push_folder(out, repo_id, message, is_ours, arguments.revision, arguments.create_pr)
        except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: a failed upload
            raise OSError(f"cannot publish to {repo_id}: {explain(error, repo_id)}") from error
    print(f"published  {address}  ({len(files)} files)")
    if (folder / "ema").is_dir():
        print(f"The EMA of the weights was not published: optvq publish {folder / 'ema'} REPO publishes it")


if __name__ == "__main__":
    main()
