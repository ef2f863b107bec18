"""Pushes a folder of tokens to a dataset repository of the Hub."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HTTPError

from ..data.fetching import explain
from ..tokenization.card import make_card
from ..tokenization.manifest import CARD_FILE, DATA_FOLDER, MANIFEST_FILE, read_manifest, shards_of
from .commits import latest_commit, make_repository, persist, push_files
from .public_text import private_parts, public


def prepare(repo_id: str, private: bool) -> None:
    """Creates the repository, or checks write access, before any work is done.

    Raises:
        OSError: If the Hub refuses or cannot be reached.
    """
    with _plain_errors(repo_id):
        make_repository(repo_id, private, kind="dataset")


def push_tokens(folder: Path, repo_id: str) -> str:
    """Commits shards, manifest and card, and removes shards of the same splits that are no longer part of them.

    Shards are uploaded one by one, each only if the Hub does not have it; so an interrupted call can be repeated. Then one
    commit makes them visible together. Manifest and card go as everybody may read them, without paths of this machine. Other
    splits of the repository stay, and are in manifest and card.

    Returns:
        Address of the commit.

    Raises:
        OSError: If the Hub refuses or cannot be reached.
        ValueError: If a shard is broken, the manifest holds what nobody else may read, another model made other splits of the
            repository, or somebody else commits in the meantime.
    """
    manifest = read_manifest(folder)
    shards = [shard for split in manifest["splits"] for shard in shards_of(manifest, split)]
    for shard in shards:
        if fault := shard.fault(folder):
            raise ValueError(f"the tokens in {folder} are broken: {fault}; run the command again")
    shown = public(manifest)
    if manifest["model"].get("revision") is None:  # of a folder: it must not look like a Hub id
        shown["model"]["id"] = Path(manifest["model"]["id"]).resolve().name
    for split, entry in shown["splits"].items():
        entry["shards"] = manifest["splits"][split]["shards"]  # names of files and digests, and what is read below
        for shard in entry["shards"]:
            shard["unreadable"] = public(shard["unreadable"])
    with _plain_errors(repo_id):
        head = latest_commit(HfApi(), repo_id, "main", "dataset")
        there = _manifest_there(repo_id, head)
    shown["splits"] = dict(sorted({**_other_splits(shown, there, repo_id), **shown["splits"]}.items()))
    texts = {MANIFEST_FILE: json.dumps(shown, indent=1) + "\n", CARD_FILE: make_card(shown, repo_id)}
    for name, text in texts.items():
        if found := private_parts(text):
            raise ValueError(f"{name} would be published with what looks like {found}: tokenize from another path")
    files: dict[str, Any] = {shard.file: folder / shard.file for shard in shards}
    files |= {name: text.encode() for name, text in texts.items()}
    splits = "|".join(map(re.escape, manifest["splits"]))
    ours = re.compile(rf"{DATA_FOLDER}/({splits})-\d+-of-(\d+|unknown)\.parquet")
    with _plain_errors(repo_id):
        return push_files(
            files,
            repo_id,
            f"Tokens of {', '.join(manifest['splits'])}",
            lambda name: bool(ours.fullmatch(name)),
            kind="dataset",
            parent=head.sha,
        )


def _manifest_there(repo_id: str, head: Any) -> dict[str, Any] | None:
    """The manifest in a commit of the repository; None if there is none."""
    if all(file.rfilename != MANIFEST_FILE for file in head.siblings or ()):
        return None
    path = persist(lambda: hf_hub_download(repo_id, MANIFEST_FILE, revision=head.sha, repo_type="dataset"))
    return read_manifest(Path(path).parent)


def _other_splits(shown: dict[str, Any], there: dict[str, Any] | None, repo_id: str) -> dict[str, dict]:
    """The splits of the repository that this folder does not have. Raises ValueError if another model made them."""
    others = {name: entry for name, entry in (there or {}).get("splits", {}).items() if name not in shown["splits"]}
    if there is not None and others:
        names = sorted((shown["model"].keys() | there["model"].keys()) - {"id", "revision"})
        differing = [name for name in names if shown["model"].get(name) != there["model"].get(name)]
        if differing:
            raise ValueError(
                f"{repo_id} holds tokens of split {next(iter(others))!r} by {there['model']['id']}, another model: "
                f"{', '.join(differing)} differ; push to another dataset"
            )
    return others


@contextmanager
def _plain_errors(repo_id: str) -> Iterator[None]:
    try:
        yield
    except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: a failed upload
        raise OSError(f"cannot push to {repo_id}: {explain(error, repo_id, 'dataset')}") from error
