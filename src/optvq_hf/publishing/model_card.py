"""The card of a model folder, written from the files that are in it."""

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData

from ..configuration_optvq import OptVQConfig
from ..evaluation.results import METRICS_FILE
from ..modeling_optvq import OptVQModel
from ..training.history import RECIPE_FILE, SUMMARY_FILE
from .results import REPORTED_NAMES, model_index, reported_model_index, results_rows


CARD_FILE, CONVERSION_FILE = "README.md", "conversion.json"
TEMPLATE = Path(__file__).parent / "model_card.md"
# What the authors reported of the weights that they published, by Hub id.
REPORTED = json.loads((Path(__file__).parent / "reported_results.json").read_text())
LICENSE = "apache-2.0"

# What the card says of the model, in this order.
SETTINGS = (
    "backbone", "image_size", "num_channels", "base_channels", "channel_multiplier", "num_res_blocks", "attn_resolutions",
    "downsample_factor", "latent_channels", "codebook_size", "codebook_dim", "num_codebook_heads", "use_codebook_projection",
    "freeze_codebook", "use_quant_conv", "training_assignment", "inference_assignment", "sinkhorn_epsilon",
    "sinkhorn_iterations", "cost_normalization", "codebook_loss_type", "commitment_loss_weight", "codebook_loss_weight",
)  # fmt: skip
OF_THE_VQGAN = ("base_channels", "channel_multiplier", "num_res_blocks", "attn_resolutions", "latent_channels")
OF_THE_TRANSPORT = ("sinkhorn_epsilon", "sinkhorn_iterations", "cost_normalization")


@dataclass
class ModelFacts:
    """What is on record about a model.

    Attributes:
        config: The model's.
        metrics: metrics.json of `optvq evaluate`, if there is one.
        recipe: recipe.yaml of `optvq train`: flags by name.
        training: training_summary.json of a finished run.
        conversion: conversion.json of `optvq convert`: source, revision, license, notes, left_out, has_discriminator.
        pictures: Names of the pictures that are there.
    """

    config: OptVQConfig
    metrics: dict | None = None
    recipe: dict | None = None
    training: dict | None = None
    conversion: dict | None = None
    pictures: list[str] = field(default_factory=list)

    @property
    def reported(self) -> dict | None:
        """What the authors of converted weights reported of them."""
        return REPORTED.get(self.conversion["source"]) if self.conversion else None


def read_facts(folder: Path) -> ModelFacts:
    """The facts that a model folder holds.

    Raises:
        OSError: If it has no config.json.
        ValueError: If a file is broken.
    """
    return ModelFacts(
        config=OptVQConfig.from_pretrained(folder, local_files_only=True),
        metrics=_read(folder / METRICS_FILE, json.loads),
        recipe=_read(folder / RECIPE_FILE, yaml.safe_load),
        training=_read(folder / SUMMARY_FILE, json.loads),
        conversion=_read(folder / CONVERSION_FILE, json.loads),
        pictures=[path.name for path in sorted(folder.glob("*.png"))],
    )


def make_card(facts: ModelFacts, name: str, repo_id: str | None = None, license: str | None = None) -> ModelCard:
    """The model card.

    Args:
        name: Of the model.
        repo_id: Where it is published; None for a folder.
        license: Of the weights; by default that of the conversion, or the project's own.
    """
    config, metrics, recipe, conversion = facts.config, facts.metrics, facts.recipe, facts.conversion
    source, revision = (conversion["source"], conversion["revision"]) if conversion else (None, None)
    reported = facts.reported
    license = license or (conversion["license"] if conversion else LICENSE)
    trained_on = hub_dataset(recipe["dataset"]) if recipe else reported["dataset_id"] if reported else None
    results = model_index(metrics, dataset_name(metrics["dataset"])) if metrics else []
    results += reported_model_index(reported) if reported else []
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["optvq", "image-tokenizer", "vector-quantization", "optimal-transport"],
        datasets=[trained_on] if trained_on else None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        base_model=source if revision or reported else _base_model(recipe),
        model_name=name if results else None,
        eval_results=results or None,
    )
    is_transport = config.training_assignment != "nearest"
    hidden = () if config.backbone == "vqgan" else OF_THE_VQGAN
    hidden += () if is_transport else OF_THE_TRANSPORT
    with torch.device("meta"):
        num_parameters = OptVQModel(config).num_parameters()
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        repo_id=repo_id,
        license=license,
        config=config,
        settings={name: getattr(config, name) for name in SETTINGS if name not in hidden},
        num_parameters=num_parameters,
        dtype=str(config.dtype or torch.float32).removeprefix("torch."),
        is_transport=is_transport,
        pictures=facts.pictures,
        metrics=metrics,
        results_rows=results_rows(metrics) if metrics else None,
        evaluated_link=_dataset_link(metrics["dataset"]) if metrics else None,
        command=_evaluation_command(metrics, repo_id) if metrics else None,
        reported=reported,
        reported_names=REPORTED_NAMES,
        recipe=recipe,
        dataset_link=_dataset_link(recipe["dataset"] if recipe else trained_on) if recipe or trained_on else None,
        training={**facts.training, "duration": _duration(facts.training["seconds"])} if facts.training else None,
        conversion=conversion,
        source_link=_source_link(source, revision) if conversion else None,
    )


def _base_model(recipe: dict | None) -> str | None:
    """The Hub id of the model that training began with."""
    model = recipe.get("model") if recipe else None
    return model if model and not Path(model).exists() and hub_dataset(model) else None


def hub_dataset(dataset: str) -> str | None:
    """The dataset's Hub id, if it is one and not the path of local files."""
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", dataset) and not dataset.endswith(".parquet")
    return dataset if is_id else None


def dataset_name(dataset: str) -> str:
    """The Hub id, or the last part of a path."""
    return hub_dataset(dataset) or Path(dataset).name


def _dataset_link(dataset: str) -> str:
    name = hub_dataset(dataset)
    return (
        f"[{name}](https://huggingface.co/datasets/{name})" if name else f"`{dataset_name(dataset)}` (not on the Hub)"
    )


def _source_link(source: str, revision: str | None) -> str:
    if revision is None and source not in REPORTED:
        return f"`{Path(source).resolve().name}`"
    return f"[{source}](https://huggingface.co/{source})" + (f", revision `{revision}`" if revision else "")


def _evaluation_command(metrics: dict, repo_id: str | None) -> str:
    words = ["optvq", "evaluate", "--model", repo_id or ".", "--dataset", dataset_name(metrics["dataset"])]
    words += ["--eval-split", metrics["split"], "--batch-size", str(metrics["batch_size"])]
    return shlex.join([*words, "--assignment", *metrics["by_assignment"]])


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _read(path: Path, parse):
    if not path.is_file():
        return None
    try:
        return parse(path.read_text())
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is broken: {' '.join(str(error).split())}") from error
