"""Reads tokens, checked against their manifest and the model that is to use them."""

import hashlib
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from ..data.fetching import dataset_errors, find_folder
from ..modeling_optvq import OptVQModel
from ..training.digests import DIGEST, folder_digest, weights_digest
from ..training.models import MODEL_FILES
from .manifest import read_manifest, shards_of


def load_tokens(
    tokens: str | Path,
    model: str | Path | OptVQModel | None = None,
    split: str | None = None,
    revision: str | None = None,
    model_revision: str | None = None,
    latents: bool = False,
) -> Dataset:
    """The tokens of one split, every shard of which is checked by its digest.

    Args:
        tokens: Folder that `optvq tokenize` wrote, or Hub id of a dataset that it pushed.
        model: Also check that this model made them: a model in the precision of its file, a folder, or a Hub id.
        split: By default the only one.
        revision: Branch, tag or commit of a dataset on the Hub.
        model_revision: Branch, tag or commit of a model on the Hub.
        latents: Of a folder that `optvq tokenize --latents` wrote.

    Returns:
        A dataset with `index`, `codes` (codes_per_token, H/f, W/f), or `latents` (encoder_channels, H/f, W/f), and the columns
        that were asked for. Plain `datasets.load_dataset` reads the same, also as a stream, and checks nothing.

    Raises:
        FileNotFoundError, OSError: If tokens or model do not exist or cannot be reached, or tokenizing has not finished.
        ValueError: If a shard is missing or not what was written, the manifest is broken, there is no such split, other
            weights made the tokens, or the folder holds latents where codes are asked for, or codes where latents are.
    """
    folder = find_folder(str(tokens), revision=revision, kind="dataset")
    manifest = read_manifest(folder)
    split = only_split(manifest, split, str(tokens))
    asked, found = ("latents", "codes") if latents else ("codes", "latents")
    if found in manifest["splits"][split]:
        how = "with" if latents else "without"
        raise ValueError(f"{tokens} holds {found}, not {asked}: make {asked} by `optvq tokenize` {how} --latents")
    if model is not None:
        check_model(manifest, model, str(tokens), model_revision)
    shards = list(shards_of(manifest, split))
    for shard in shards:
        if fault := shard.fault(folder):
            raise ValueError(
                f"the tokens in {tokens} are broken: {fault}; `optvq tokenize` again makes what is missing"
            )
    with dataset_errors(f"cannot load the tokens in {tokens}", str(tokens)):
        files = [str(folder / shard.file) for shard in shards]
        return load_dataset("parquet", data_files={split: files}, split=split)


def only_split(manifest: dict[str, Any], split: str | None, tokens: str) -> str:
    """The split that is asked for, or the only one. Raises ValueError if there is none such."""
    splits = list(manifest["splits"])
    if split is None and len(splits) == 1:
        return splits[0]
    if split is None or split not in splits:
        asked = "no split is named" if split is None else f"there is no split {split!r}"
        raise ValueError(f"{tokens}: {asked}; its splits are {', '.join(splits)}")
    return split


def identity(manifest: dict[str, Any], split: str) -> dict[str, Any]:
    """What tells the tokens of one split from all others: its name, the model, and the content of its shards; JSON."""
    digests = "".join(shard.sha256 for shard in shards_of(manifest, split))
    return {
        "split": split,
        DIGEST: manifest["model"][DIGEST],
        "tokens_sha256": hashlib.sha256(digests.encode()).hexdigest(),
    }


def model_of(manifest: dict[str, Any], tokens: str) -> str:
    """Hub id or folder of the model that made the tokens.

    Raises:
        FileNotFoundError: If it was in a folder that is not here. Models of the Hub alone have a revision.
    """
    made_by = manifest["model"]
    if made_by.get("revision") is None and not Path(made_by["id"]).is_dir():
        raise FileNotFoundError(
            f"the tokens in {tokens} were made by the model of a folder, {made_by['id']}, which is not here: pass --model"
        )
    return made_by["id"]


def check_model(
    manifest: dict[str, Any], model: str | Path | OptVQModel, tokens: str, revision: str | None = None
) -> None:
    """Raises ValueError if other weights made the tokens: their codes would mean other pictures."""
    if isinstance(model, OptVQModel):
        name, digest = "this model", weights_digest(model)
    else:
        name, digest = str(model), folder_digest(find_folder(str(model), MODEL_FILES, revision))
    made_by = manifest["model"]
    if digest != made_by[DIGEST]:
        at = f" at revision {made_by['revision']}" if made_by.get("revision") else ""
        raise ValueError(
            f"the tokens in {tokens} were made by {made_by['id']}{at} with weights {made_by[DIGEST][:12]}, but {name} has "
            f"weights {digest[:12]}: load that model and revision, or tokenize again"
        )
