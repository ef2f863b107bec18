"""Reads files of the original implementation of OptVQ, and of other libraries: published folders and training checkpoints.

    a published folder      config.json, and model.safetensors or pytorch_model.bin with the prefix `model.` (a Hub id too);
                            other libraries have other names, see [`Layout`]
    a training checkpoint   one pickled file with an entry `model` or `state_dict`, and its configuration as YAML or JSON

Pickles are read only by torch's restricted reader, which builds tensors and plain values and runs no code.
"""

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from mmap import ACCESS_READ, mmap
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from huggingface_hub import RepoCard, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError
from safetensors.torch import load_file

from ..data.fetching import explain
from ..parsing import parse_json, parse_yaml
from .arguments import IDENTIFIER


CARD_FILE = "README.md"
# What the Hub's cards have beside the licence `other`.
OTHER_LICENSE = ("license_name", "license_link")
# Of a state dict, bytes of tensors per byte of its file: tensors may share memory, but not without end.
MOST_SHARING = 4
# Names of weights that are sharded, or that have another precision beside the main ones.
IN_PARTS = re.compile(r"-\d+-of-\d+\.|\.(fp16|bf16|fp32|non_ema)\.(safetensors|bin)$")
# Classes that checkpoints of PyTorch Lightning name as keys of their callbacks' state. They are read as one that does nothing.
INERT_CLASSES = ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",)


class _Inert:
    """Stands for a class that is named in a pickle, and not needed."""


class Layout(NamedTuple):
    """Names of the files in a folder; the first that is there is taken.

    Attributes:
        weights, configs: In one of `folders`.
        folders: Inside the source, which itself is "".
        needs_config: Whether a model cannot be read without a configuration.
        entries: Of a checkpoint that holds more than its weights, where these may be.
    """

    weights: tuple[str, ...] = ("model.safetensors", "pytorch_model.bin")
    configs: tuple[str, ...] = ("config.json",)
    folders: tuple[str, ...] = ("",)
    needs_config: bool = True
    entries: tuple[str, ...] = ("state_dict", "model")

    def paths(self, names: tuple[str, ...]) -> list[str]:
        """Files of these names in all folders, relative to the source."""
        return [str(Path(folder) / name) for folder in self.folders for name in names]


ORIGINAL = Layout()


class ReferenceFiles(NamedTuple):
    """The parts of one model of the original, or of another library.

    Attributes:
        source: Hub id or path, as given.
        revision: Commit of the Hub's repository; None for a path.
        config: Content of the configuration file; empty without one.
        weights: Tensors by the names that the library's model has for them, without prefixes.
        license: `license` in the source's card, with `license_name` and `license_link` where it has them; empty without one.
        entry: Of the checkpoint, from which the weights are; None where the file holds nothing else.
    """

    source: str
    revision: str | None
    config: dict
    weights: dict[str, torch.Tensor]
    license: Mapping[str, str] = MappingProxyType({})
    entry: str | None = None


def read_reference(source: str, config_file: str | None = None, layout: Layout = ORIGINAL) -> ReferenceFiles:
    """Reads a model of the original, or of another library.

    Args:
        source: Hub id, folder or checkpoint file.
        config_file: JSON or YAML file with the configuration; for a folder, it replaces the one in there.
        layout: Files of a folder; by default those of the original.

    Raises:
        OSError: If something does not exist or cannot be reached.
        ValueError: If a file is broken, holds code, or has the wrong content. The message names it.
    """
    path = Path(source)
    if path.is_file():
        if config_file is None and layout.needs_config:
            raise ValueError(
                f"{source} is a training checkpoint, which does not contain its configuration: name its YAML or JSON file with "
                "--reference-config"
            )
        config = read_config(Path(config_file)) if config_file else {}
        weights, entry = read_weights(path, layout.entries)
        return ReferenceFiles(source, None, config, strip_prefixes(weights), entry=entry)
    folder, revision = (path, None) if path.is_dir() else _download(source, layout)
    found = [(folder / part, path) for part in layout.folders if (path := _first(folder / part, layout.weights))]
    if not found:
        inside = f" in {', '.join(filter(None, layout.folders))} or itself" if len(layout.folders) > 1 else ""
        others = [
            file.name for part in layout.folders for file in (folder / part).glob("*") if IN_PARTS.search(file.name)
        ]
        hint = f"; {min(others)} is a part or a variant: save the weights as one file" if others else ""
        raise FileNotFoundError(f"{source} has no weights{inside}: neither {' nor '.join(layout.weights)}{hint}")
    part, path = found[0]
    config_path = Path(config_file) if config_file else _first(part, layout.configs)
    if config_path is None and layout.needs_config:
        config_path = part / layout.configs[-1]  # which cannot be read
    config = read_config(config_path) if config_path else {}
    weights, entry = read_weights(path, layout.entries)
    return ReferenceFiles(source, revision, config, strip_prefixes(weights), _license(folder / CARD_FILE), entry)


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _license(path: Path) -> dict[str, str]:
    """The licence in a card; empty without one, or if its metadata cannot be read."""
    try:
        data = RepoCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # of YAML, and of huggingface_hub's checks
        return {}
    texts = {name: data.get(name) for name in ("license", *OTHER_LICENSE)}
    found = {name: text for name, text in texts.items() if isinstance(text, str) and text.isprintable()}
    return found if IDENTIFIER.fullmatch(found.get("license", "")) else {}


def read_config(path: Path) -> dict:
    """Reads a JSON or YAML file that holds a mapping."""
    try:
        text = path.read_text()
        return parse_json(text) if path.suffix == ".json" else parse_yaml(text)
    except OSError as error:
        raise FileNotFoundError(f"cannot read the configuration {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"the configuration {path} is broken: {_reason(error)}") from error


def read_weights(path: Path, entries: tuple[str, ...] = ORIGINAL.entries) -> tuple[dict[str, torch.Tensor], str | None]:
    """Reads tensors by name from a safetensors file, or from a pickle, which may hold more than the weights.

    Args:
        entries: Of a pickle; the first that it has is read.

    Returns:
        The tensors, and the entry that they are from, if any.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path), None
        except Exception as error:  # as with pickles, a changed byte may raise anything
            raise ValueError(f"the weights {path} are broken or cut short: {_reason(error)}") from error
    _check_size(path)
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in INERT_CLASSES]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the protocol of a pickle, which the error says too
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for {asked[1]}" if asked else "it holds more than tensors and plain values"
        raise ValueError(
            f"the checkpoint {path} is refused: {what}, and files that run code when they are read are not read; save only "
            "its state dict"
        ) from error
    except Exception as error:  # a changed byte may raise anything
        raise ValueError(f"the checkpoint {path} is broken or cut short: {_reason(error)}") from error
    found = None
    if isinstance(content, dict):
        found = next((entry for entry in entries if isinstance(content.get(entry), dict)), None)
        content = content if found is None else content[found]
    if not isinstance(content, dict) or not content or not all(map(_is_weight, content.keys(), content.values())):
        named = " or ".join(f"`{entry}`" for entry in entries)
        raise ValueError(f"the checkpoint {path} has no entry {named} that holds tensors by name")
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in content.items()}
    for name, size in sizes.items():  # a tensor may repeat its values by strides of 0, or share them with others
        if size > content[name].untyped_storage().nbytes() or sum(sizes.values()) > MOST_SHARING * path.stat().st_size:
            raise ValueError(f"the checkpoint {path} is refused: its tensors, as {name}, are larger than the file")
    return content, found


def _check_size(path: Path) -> None:
    """Raises ValueError for a checkpoint that would take far more memory than its file is large.

    torch never compresses its archives, and restricted pickles make bytes of any length only as a `bytearray`.
    """
    refused = f"the checkpoint {path} is refused: "
    with open(path, "rb") as file:
        if file.read(4) == b"PK\x03\x04":  # by which torch knows an archive
            try:
                entries = zipfile.ZipFile(file).infolist()
            except (zipfile.BadZipFile, NotImplementedError) as error:
                raise ValueError(f"the checkpoint {path} is broken or cut short: {error}") from error
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError(f"{refused}it is a compressed archive, which torch does not write")
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise ValueError(f"{refused}the files in this archive are larger than the archive")
        if path.stat().st_size:
            with mmap(file.fileno(), 0, access=ACCESS_READ) as content:
                if content.find(b"bytearray") >= 0:
                    raise ValueError(f"{refused}it asks for a bytearray; save only its state dict")


def _is_weight(name: object, value: object) -> bool:
    return (
        isinstance(name, str)
        and isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and not value.is_meta
    )


def strip_prefixes(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Removes prefixes that all names share: those of torch.compile, DDP and the published files."""
    for prefix in ("_orig_mod.", "module.", "_orig_mod.", "model."):
        if weights and all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return weights


def _download(source: str, layout: Layout) -> tuple[Path, str]:
    if (
        source.startswith((".", "/", "~"))
        or source.count("/") > 1
        or Path(source).suffix in (".pth", ".ckpt", ".pt", ".bin", ".safetensors")
    ):
        raise FileNotFoundError(f"there is no file or folder {source}")
    try:
        folder = Path(snapshot_download(source, allow_patterns=[CARD_FILE, *layout.paths(layout.configs)]))
        for weights in layout.paths(layout.weights):  # many repositories have the same weights in several formats
            snapshot_download(source, revision=folder.name, allow_patterns=[weights])
            if (folder / weights).is_file():
                break
    except HFValidationError as error:
        raise FileNotFoundError(f"{source} is neither a file, nor a folder, nor a Hub id") from error
    except (HTTPError, OSError) as error:
        raise OSError(f"cannot download {source} from the Hub: {explain(error, source)}") from error
    return folder, folder.name


def _reason(error: Exception) -> str:
    """The first line of an error's message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
