"""The records of a model: results, recipe, summary and pictures in the files of its folder."""

import json
import reprlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..configuration_optvq import OptVQConfig
from ..evaluation.results import COLUMNS, METRICS_FILE, RECONSTRUCTIONS_FILE, USAGE_FILE
from ..parsing import parse_json, parse_yaml
from ..training.digests import DIGEST, EMA_OF, folder_digest, recipe_digest, recipe_of
from ..training.models import CONVERSION_FILE, read_config
from ..training.watching.curves import CURVES_FILE
from ..training.watching.log import LOG_FILE, RECIPE_FILE, SUMMARY_FILE
from .entries import known_entries
from .public_text import public


EMA_FOLDER = "ema"
PICTURES = (RECONSTRUCTIONS_FILE, CURVES_FILE, USAGE_FILE)
RECORDS = (METRICS_FILE, RECIPE_FILE, SUMMARY_FILE, LOG_FILE, CONVERSION_FILE, *PICTURES)
# Results that the authors reported for their published weights, by Hub id.
REPORTED = json.loads((Path(__file__).parent / "reported_results.json").read_text())

# Beyond what any count, time or error of a run can be.
LARGEST_NUMBER = 1e15
TEXT, NUMBER, COUNT = (str,), (int, float), (int,)
OPTIONAL_TEXT = (str, type(None))
# Entries that each record must have, with their types.
NEEDED: dict[str, dict[str, tuple[type, ...]]] = {
    METRICS_FILE: {
        **dict.fromkeys(("assignment", "dataset", "split", "dtype"), TEXT),
        **{name: (*NUMBER, type(None)) for name in COLUMNS},
        "num_images": COUNT,
        "batch_size": COUNT,
        "by_assignment": (dict,),
        "versions": (dict,),
    },
    RECIPE_FILE: {"dataset": TEXT, "train_split": TEXT, "learning_rate": NUMBER},
    SUMMARY_FILE: {
        **dict.fromkeys(("dataset", "device"), TEXT),
        **dict.fromkeys(("steps", "images_per_step", "processes"), COUNT),
        "seconds": NUMBER,
        "alarms": (dict,),
    },
    CONVERSION_FILE: {
        "source": TEXT,
        **dict.fromkeys(("revision", "license"), OPTIONAL_TEXT),
        **dict.fromkeys(("notes", "left_out"), (list,)),
        "has_discriminator": (bool,),
    },
}
# Entries that a record may have, with their types.
KNOWN: dict[str, dict[str, tuple[type, ...]]] = {
    METRICS_FILE: {
        **dict.fromkeys(("dataset_id", "train_split", "dataset_config", "data_dir", "image_column"), OPTIONAL_TEXT),
        **{name: (int, type(None)) for name in ("num_unreadable", "max_images", "tile_size", "eval_fraction_seed")},
        "eval_fraction": (*NUMBER, type(None)),
        **dict.fromkeys(("bits_per_token", "entropy_bits_per_token", "bits_per_pixel"), NUMBER),
    },
    RECIPE_FILE: {"model": OPTIONAL_TEXT, "dataset_id": OPTIONAL_TEXT},
    SUMMARY_FILE: {
        **dict.fromkeys(("dataset_id", "base_model_id"), OPTIONAL_TEXT),
        DIGEST: OPTIONAL_TEXT,
        EMA_OF: OPTIONAL_TEXT,
    },
    CONVERSION_FILE: dict.fromkeys(("origin", "license_name", "license_link"), OPTIONAL_TEXT),
}


@dataclass
class ModelFacts:
    """The records of a model, as everybody may read them.

    Attributes:
        config: Configuration of the model.
        metrics: metrics.json of `optvq evaluate`, if there is one.
        recipe: recipe.yaml of `optvq train`: flags by name.
        training: training_summary.json of a finished run.
        conversion: conversion.json of `optvq convert`: source, revision, license, notes, left_out, has_discriminator, and the
            origin of an autoencoder of another library.
        log: Entries of the training log.
        pictures: Names of the pictures in the folder.
        base_model_id: Hub id of the model that training started from; None for random weights and those of a folder.
        digest: Of the weights in the folder, to which all records belong; None for a folder without weights.
    """

    config: OptVQConfig
    metrics: dict | None = None
    recipe: dict | None = None
    training: dict | None = None
    conversion: dict | None = None
    log: list[dict] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    base_model_id: str | None = None
    digest: str | None = None

    @property
    def reported(self) -> dict | None:
        """Results that the authors reported for converted weights; None for other weights."""
        return REPORTED.get(self.conversion["source"]) if self.conversion else None

    @property
    def began_with(self) -> dict | None:
        """Source and licence of the converted weights that training began with; None for other weights, and for these."""
        note = self.config.converted_from
        return public(known_entries(CONVERSION_FILE, note)) if note and not self.conversion else None

    @property
    def base_model(self) -> str | None:
        """Model that training started from; None for random weights."""
        return self.recipe.get("model") if self.recipe else None

    def copy_to(self, source: Path, out: Path) -> None:
        """Writes the records and pictures of the folder `source` to `out`."""
        for name, record in (
            (METRICS_FILE, self.metrics),
            (SUMMARY_FILE, self.training),
            (CONVERSION_FILE, self.conversion),
        ):
            if record:
                (out / name).write_text(json.dumps(record, indent=2) + "\n")
        if self.recipe:
            (out / RECIPE_FILE).write_text(recipe_of(self.recipe, self.digest))
        if self.log:
            (out / LOG_FILE).write_text("".join(json.dumps(entry) + "\n" for entry in self.log))
        for name in self.pictures:
            copy_pixels(source / name, out / name)


def read_facts(folder: Path) -> ModelFacts:
    """Reads the records of a model folder, as everybody may read them.

    Raises:
        OSError: If it has no config.json.
        ValueError: If a file is broken, lacks an entry, or is not of the weights in the folder.
    """
    digests: dict[str, str | None] = {}
    records = {name: _read(folder / name, parse, digests) for name, parse in PARSERS.items()}
    facts = ModelFacts(
        config=read_config(folder),
        metrics=records[METRICS_FILE],
        recipe=records[RECIPE_FILE],
        training=records[SUMMARY_FILE],
        conversion=records[CONVERSION_FILE],
        log=read_log(folder / LOG_FILE),
        digest=folder_digest(folder) if list(folder.glob("model*.safetensors*")) else None,
    )
    facts.base_model_id = (facts.training or {}).get("base_model_id")
    if facts.log:
        digests[LOG_FILE] = facts.log[-1].get(DIGEST)
    if facts.digest:
        for name, digest in digests.items():
            _check_digest(folder / name, digest, facts.digest)
    check_ema(folder.parent if folder.name == EMA_FOLDER else folder)
    with_record = {CURVES_FILE: facts.log, RECONSTRUCTIONS_FILE: facts.metrics, USAGE_FILE: facts.metrics}
    facts.pictures = [name for name in PICTURES if with_record[name] and (folder / name).is_file()]
    return facts


def check_ema(folder: Path) -> None:
    """Raises ValueError if the folder `ema` of a run is that of another run."""
    ema, trained = (_read(path / SUMMARY_FILE, parse_json, {}) or {} for path in (folder / EMA_FOLDER, folder))
    if (folder / EMA_FOLDER).is_dir() and ema.get(EMA_OF) != trained.get(DIGEST):
        raise ValueError(
            f"the EMA of weights in {folder / EMA_FOLDER} is of another run than {folder}: move or remove it, or finish its run"
        )


def _check_digest(path: Path, found: str | None, digest: str) -> None:
    if found == digest:
        return
    if path.name == METRICS_FILE:
        raise ValueError(
            f"the results in {path.parent} are of other weights: measure again with optvq evaluate --model {path.parent}"
        )
    if found:
        problem = "is of other weights than those beside it: finish the run of these weights, or remove the file"
    else:
        entry = f"# {DIGEST}: {digest}" if path.name == RECIPE_FILE else f'"{DIGEST}": "{digest}"'
        where = {RECIPE_FILE: "its first line", LOG_FILE: "its last line"}.get(path.name, "it")
        problem = (
            "does not say of which weights it is, as before its run has finished: finish that run, or remove the file; if it "
            f"is of the weights beside it, write {entry} in {where}"
        )
    raise ValueError(f"{path} {problem}")


def known_flags(settings: dict) -> dict:
    """The settings of a run as everybody may read them: its flags, and nothing else that a file may hold."""
    return public(known_entries(RECIPE_FILE, settings))


def _read_recipe(text: str) -> dict[str, Any]:
    return {**parse_yaml(text), DIGEST: recipe_digest(text)}


PARSERS = {
    METRICS_FILE: parse_json, SUMMARY_FILE: parse_json, CONVERSION_FILE: parse_json, RECIPE_FILE: _read_recipe,
}  # fmt: skip


def _read(path: Path, parse: Callable[[str], dict[str, Any]], digests: dict[str, str | None]) -> dict[str, Any] | None:
    """Reads a record, and notes the digest of weights in it; None if there is none."""
    if not path.is_file():
        return None
    try:
        record = parse(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is broken: {error}") from error
    missing = NEEDED[path.name].keys() - record.keys()
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}")
    _check_types(path, record, NEEDED[path.name] | KNOWN[path.name])
    if path.name == METRICS_FILE:
        _check_table(path, record)
    digests[path.name] = record.get(DIGEST)
    return public(known_entries(path.name, record))


def read_log(path: Path) -> list[dict]:
    """The entries of a training log, without lines that a killed run left unfinished; none without a log."""
    entries = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with suppress(ValueError):
            entries.append(public(known_entries(LOG_FILE, parse_json(line))))
    return entries


def copy_pixels(source: Path, target: Path) -> None:
    """Copies a PNG without anything but its pixels: comments in it may tell of the machine.

    Raises:
        ValueError: If it is none.
    """
    try:
        with Image.open(source, formats=["PNG"]) as picture:
            pixels = picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{source} is not a PNG: {error}") from error
    pixels.info.clear()
    pixels.save(target, format="PNG")


def _check_types(path: Path, record: dict[str, Any], types: dict[str, tuple[type, ...]], where: str = "") -> None:
    for name in types.keys() & record.keys():
        value = record[name]
        is_number = type(value) in NUMBER
        if type(value) not in types[name] or (is_number and not abs(value) < LARGEST_NUMBER):  # also nan
            raise ValueError(f"{path} has {reprlib.repr(value)} as {where}{name}, which cannot be")


def _check_table(path: Path, metrics: dict[str, Any]) -> None:
    for name, values in metrics.items():
        is_of_parts = name.endswith(("_per_head", "_per_level"))
        if is_of_parts and not (isinstance(values, list) and all(type(value) in NUMBER for value in values)):
            raise ValueError(f"{path} has {reprlib.repr(values)} as {name}, which cannot be")
    for assignment, values in metrics["by_assignment"].items():
        if not isinstance(values, dict) or not values.keys() >= COLUMNS.keys():
            raise ValueError(f"{path} lacks figures in by_assignment: each must have {', '.join(COLUMNS)}")
        figures = {name: NEEDED[METRICS_FILE][name] for name in COLUMNS}
        _check_types(path, values, figures, f"by_assignment.{assignment}.")
    _check_types(path, metrics["versions"], {"torch": TEXT}, "versions.")
    if "torch" not in metrics["versions"]:
        raise ValueError(f"{path} lacks torch in versions")
