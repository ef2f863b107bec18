"""The digest of a model's weights, which every record of a run carries: it ties records to the weights beside them."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from operator import itemgetter
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError, safe_open

from ..modeling_optvq import OptVQModel
from ..parsing import parse_json


DIGEST = "weights_sha256"  # its name in every record
EMA_OF = "trained_weights_sha256"  # in the summary of the EMA of weights: the digest of these weights
RECIPE_DIGEST = re.compile(rf"^# {DIGEST}: (\w+)$", re.MULTILINE)


def weights_digest(model: OptVQModel) -> str:
    """SHA-256 of the names and values of a model's tensors."""
    return _digest(sorted(model.state_dict().items()))


def encoder_digest(model: OptVQModel | Path) -> str:
    """The same of the encoder alone, as float32, of a model or a folder: models that share it may differ in their quantizers.

    Raises:
        OSError, ValueError: As [`folder_digest`].
    """
    named = _tensors_of(model) if isinstance(model, Path) else sorted(model.state_dict().items())
    return _digest((name, tensor.float()) for name, tensor in named if name.startswith("encoder."))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the model in a folder: one, or the shards that its index names.

    Raises:
        OSError: If it has none.
    """
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{folder} has no weights: neither model.safetensors nor {index.name}")
    places = parse_json(index.read_text()).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index} is broken: it lacks the places of the weights")
    return sorted({folder / name for name in places.values()})


def folder_digest(folder: Path) -> str:
    """The same of the weights in a folder, read tensor by tensor.

    Raises:
        OSError: If it has none.
        ValueError: If a file is broken.
    """
    return _digest(_tensors_of(folder))


def _tensors_of(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors in a folder, sorted and read one by one. Errors as of [`folder_digest`]."""
    try:
        files = [safe_open(path, "pt") for path in weight_files(folder)]
        named = sorted(((name, file) for file in files for name in file.keys()), key=itemgetter(0))  # noqa: SIM118
        yield from ((name, file.get_tensor(name)) for name, file in named)
    except (SafetensorError, LookupError, TypeError) as error:
        raise ValueError(f"the weights in {folder} are broken: {error}") from error


def _digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.view(-1).view(torch.uint8).numpy().data if values.numel() else b"")
    return digest.hexdigest()


def recipe_of(settings: dict, digest: str | None) -> str:
    """A recipe as YAML that `--config` reads, with the digest in its first line, which is a comment."""
    return (f"# {DIGEST}: {digest}\n" if digest else "") + yaml.safe_dump(settings, sort_keys=False)


def log_of(entries: list[dict], digest: str | None) -> list[dict]:
    """The entries of a log, the last one with the digest."""
    return [*entries[:-1], {**entries[-1], DIGEST: digest}] if entries else []


def recipe_digest(text: str) -> str | None:
    """The digest in a recipe; None before its run has finished."""
    found = RECIPE_DIGEST.search(text)
    return found[1] if found else None
