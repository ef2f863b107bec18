"""The records of a model: results, recipe, summary and pictures in the files of its folder."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from PIL import Image

from ..configuration_optvq import OptVQConfig
from ..data.arguments import DataArguments
from ..evaluation.results import COLUMNS, METRICS_FILE, RECONSTRUCTIONS_FILE, USAGE_FILE
from ..training.arguments import Recipe
from ..training.digests import DIGEST, EMA_OF, folder_digest, recipe_digest, recipe_of
from ..training.models import read_config
from ..training.watching.curves import CURVES_FILE
from ..training.watching.log import LOG_FILE, RECIPE_FILE, SUMMARY_FILE
from .public_text import public


CONVERSION_FILE, EMA_FOLDER = "conversion.json", "ema"
PICTURES = (RECONSTRUCTIONS_FILE, CURVES_FILE, USAGE_FILE)
RECORDS = (METRICS_FILE, RECIPE_FILE, SUMMARY_FILE, LOG_FILE, CONVERSION_FILE, *PICTURES)
# Results that the authors reported for their published weights, by Hub id.
REPORTED = json.loads((Path(__file__).parent / "reported_results.json").read_text())

# Entries that each record must have.
NEEDED = {
    METRICS_FILE: {
        "by_assignment",
        "assignment",
        "num_images",
        "dataset",
        "split",
        "batch_size",
        "dtype",
        "versions",
        *COLUMNS,
    },
    RECIPE_FILE: {"dataset", "train_split", "learning_rate"},
    SUMMARY_FILE: {"dataset", "steps", "images_per_step", "seconds", "device", "processes", "alarms"},
    CONVERSION_FILE: {"source", "revision", "license", "notes", "left_out", "has_discriminator"},
}
# Entries of a recipe: the flags of `optvq train`.
FLAGS = {entry.name for one in (*get_type_hints(Recipe).values(), DataArguments) for entry in fields(one)}
FLAGS |= OptVQConfig.__annotations__.keys() & OptVQConfig.__dataclass_fields__.keys()


@dataclass
class ModelFacts:
    """The records of a model, as everybody may read them.

    Attributes:
        config: Configuration of the model.
        metrics: metrics.json of `optvq evaluate`, if there is one.
        recipe: recipe.yaml of `optvq train`: flags by name.
        training: training_summary.json of a finished run.
        conversion: conversion.json of `optvq convert`: source, revision, license, notes, left_out, has_discriminator.
        log: Entries of the training log.
        pictures: Names of the pictures in the folder.
        digest: Of the weights in the folder, to which all records belong; None for a folder without weights.
    """

    config: OptVQConfig
    metrics: dict | None = None
    recipe: dict | None = None
    training: dict | None = None
    conversion: dict | None = None
    log: list[dict] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    digest: str | None = None

    @property
    def reported(self) -> dict | None:
        """Results that the authors reported for converted weights; None for other weights."""
        return REPORTED.get(self.conversion["source"]) if self.conversion else None

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
    ema, trained = (_read(path / SUMMARY_FILE, json.loads, {}) or {} for path in (folder / EMA_FOLDER, folder))
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
    return public({name: value for name, value in settings.items() if name in FLAGS})


def _read_recipe(text: str) -> Any:
    recipe = yaml.safe_load(text)
    return {**recipe, DIGEST: recipe_digest(text)} if isinstance(recipe, dict) else recipe


PARSERS = {
    METRICS_FILE: json.loads, SUMMARY_FILE: json.loads, CONVERSION_FILE: json.loads, RECIPE_FILE: _read_recipe,
}  # fmt: skip


def _read(path: Path, parse: Callable[[str], Any], digests: dict[str, str | None]) -> dict[str, Any] | None:
    """Reads a record, and notes the digest of weights in it; None if there is none."""
    if not path.is_file():
        return None
    try:
        record = parse(path.read_text())
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is broken: {' '.join(str(error).split())}") from error
    missing = NEEDED[path.name] - record.keys() if isinstance(record, dict) else NEEDED[path.name]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}")
    if path.name == METRICS_FILE and not _is_table(record["by_assignment"]):
        raise ValueError(f"{path} lacks figures in by_assignment: each must have {', '.join(COLUMNS)}")
    digests[path.name] = record.get(DIGEST)
    return known_flags(record) if path.name == RECIPE_FILE else public(record)


def read_log(path: Path) -> list[dict]:
    """The entries of a training log, without lines that a killed run left unfinished; none without a log."""
    entries = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with suppress(ValueError, RecursionError):
            entries.append(public(json.loads(line)))
    return [entry for entry in entries if isinstance(entry, dict)]


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


def _is_table(by_assignment: Any) -> bool:
    return isinstance(by_assignment, dict) and all(
        isinstance(values, dict) and values.keys() >= COLUMNS.keys() for values in by_assignment.values()
    )
