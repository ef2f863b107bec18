"""The records of a model: results, recipe, summary and pictures in the files of its folder."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import StrictDataclassError

from ..configuration_optvq import OptVQConfig
from ..evaluation.results import COLUMNS, METRICS_FILE, RECONSTRUCTIONS_FILE, USAGE_FILE
from ..training.watching.curves import CURVES_FILE
from ..training.watching.log import LOG_FILE, RECIPE_FILE, SUMMARY_FILE


CONVERSION_FILE = "conversion.json"
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
# Entries that may be paths, of which only the last part is published.
PATHS = ("model", "dataset", "data_dir", "output_dir", "resume", "discriminator_weights")


@dataclass
class ModelFacts:
    """The records of a model, without local paths.

    Attributes:
        config: Configuration of the model.
        metrics: metrics.json of `optvq evaluate`, if there is one.
        recipe: recipe.yaml of `optvq train`: flags by name.
        training: training_summary.json of a finished run.
        conversion: conversion.json of `optvq convert`: source, revision, license, notes, left_out, has_discriminator.
        pictures: Names of the pictures in the folder.
    """

    config: OptVQConfig
    metrics: dict | None = None
    recipe: dict | None = None
    training: dict | None = None
    conversion: dict | None = None
    pictures: list[str] = field(default_factory=list)

    @property
    def reported(self) -> dict | None:
        """Results that the authors reported for converted weights; None for other weights."""
        return REPORTED.get(self.conversion["source"]) if self.conversion else None

    @property
    def base_model(self) -> str | None:
        """Model that training started from; None for random weights."""
        return self.recipe.get("model") if self.recipe else None

    def copy_to(self, source: Path, out: Path) -> None:
        """Writes all records of the folder `source` to `out`."""
        for name, record in (
            (METRICS_FILE, self.metrics),
            (SUMMARY_FILE, self.training),
            (CONVERSION_FILE, self.conversion),
        ):
            if record:
                (out / name).write_text(json.dumps(record, indent=2) + "\n")
        if self.recipe:
            (out / RECIPE_FILE).write_text(yaml.safe_dump(self.recipe, sort_keys=False))
        for name in (*self.pictures, LOG_FILE):
            if (source / name).is_file():
                (out / name).write_bytes((source / name).read_bytes())


def read_facts(folder: Path) -> ModelFacts:
    """Reads the records of a model folder.

    Raises:
        OSError: If it has no config.json.
        ValueError: If a file is broken, or lacks an entry.
    """
    try:
        config = OptVQConfig.from_pretrained(folder, local_files_only=True)
    except StrictDataclassError as error:
        raise ValueError(f"{folder / 'config.json'} is broken: {str(error).splitlines()[-1].strip()}") from error
    return ModelFacts(
        config=config,
        metrics=_read(folder / METRICS_FILE, json.loads),
        recipe=_read(folder / RECIPE_FILE, yaml.safe_load),
        training=_read(folder / SUMMARY_FILE, json.loads),
        conversion=_read(folder / CONVERSION_FILE, json.loads),
        pictures=[name for name in PICTURES if (folder / name).is_file()],
    )


def without_paths(record: dict) -> dict:
    """The record, with paths outside the working folder cut to their last part."""
    cut = {name: Path(record[name]).name for name in PATHS if _is_outside(record.get(name))}
    return {**record, **cut}


def _is_outside(value: Any) -> bool:
    return isinstance(value, str) and (Path(value).is_absolute() or value.startswith(("~", "..")))


def _read(path: Path, parse: Callable[[str], Any]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        record = parse(path.read_text())
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is broken: {' '.join(str(error).split())}") from error
    missing = NEEDED[path.name] - record.keys() if isinstance(record, dict) else NEEDED[path.name]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}")
    if path.name == METRICS_FILE and not _is_table(record["by_assignment"]):
        raise ValueError(f"{path} lacks figures in by_assignment: each must have {', '.join(COLUMNS)}")
    return without_paths(record)


def _is_table(by_assignment: Any) -> bool:
    return isinstance(by_assignment, dict) and all(
        isinstance(values, dict) and values.keys() >= COLUMNS.keys() for values in by_assignment.values()
    )
