"""The card of a model folder, written from the records in it."""

import hashlib
import re
import shlex
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData

from ..configuration_optvq import OptVQConfig
from ..data.loading import hub_id
from ..evaluation.protocols import BASIC
from ..modeling_optvq import OptVQModel
from .card_results import (
    head_rows,
    level_rows,
    measured_metrics,
    model_index,
    reported_model_index,
    reported_rows,
    results_rows,
)
from .records import REPORTED, ModelFacts
from .reference_files import OTHER_LICENSE


CARD_FILE = "README.md"
TEMPLATE = Path(__file__).parent / "model_card.md"
LICENSE = "apache-2.0"

# Fields of the configuration in the card, in this order.
SETTINGS = (
    "backbone", "image_size", "num_channels", "base_channels", "channel_multiplier", "num_res_blocks", "attn_resolutions",
    "mid_block_add_attention", "norm_num_groups", "downsample_factor", "latent_channels", "double_z", "codebook_size",
    "codebook_dim", "num_codebook_heads", "num_quantizers", "use_codebook_projection", "freeze_codebook", "use_quant_conv",
    "normalize_latents", "training_assignment", "inference_assignment", "sinkhorn_epsilon", "sinkhorn_balance",
    "sinkhorn_iterations", "cost", "cost_normalization", "gradient_estimator", "codebook_loss_type",
    "commitment_loss_weight", "codebook_loss_weight",
)  # fmt: skip
OF_THE_VQGAN = ("base_channels", "channel_multiplier", "num_res_blocks", "attn_resolutions", "latent_channels")
# Fields that are shown where they have another value than by default.
IF_CHANGED = (
    "num_quantizers", "cost", "gradient_estimator", "mid_block_add_attention", "norm_num_groups", "double_z",
    "normalize_latents",
)  # fmt: skip
OF_THE_TRANSPORT = ("sinkhorn_epsilon", "sinkhorn_balance", "sinkhorn_iterations", "cost_normalization")


def make_card(facts: ModelFacts, name: str, repo_id: str | None = None, license: str | None = None) -> ModelCard:
    """Makes the model card.

    Args:
        name: Name of the model.
        repo_id: Repository that it is published to; None for a folder.
        license: Licence of the weights. Default: that of converted weights, also for weights whose training started from them;
            not stated if it started from another model, and the project's own otherwise.
    """
    config, metrics, recipe, conversion = facts.config, facts.metrics, facts.recipe, facts.conversion
    began_with = facts.began_with
    converted = conversion or began_with or {}
    source, revision = converted.get("source"), converted.get("revision")
    reported, base = facts.reported, facts.base_model
    source_license = _license(converted)
    name_and_link = [None if license else converted.get(entry) for entry in OTHER_LICENSE]
    license = license or (converted.get("license") if converted else None if base else LICENSE)
    trained_on, evaluated_on = _dataset(facts.training or recipe), _dataset(metrics)
    results = model_index(metrics, evaluated_on["name"]) if metrics and evaluated_on else []
    results += reported_model_index(reported) if reported else []
    if reported and not recipe:
        trained_on = {"name": reported["dataset_id"], "id": reported["dataset_id"]}
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["optvq", "image-tokenizer", "vector-quantization", "optimal-transport"],
        datasets=[trained_on["id"]] if trained_on and trained_on["id"] else None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        base_model=facts.base_model_id or (source if revision or reported else None),
        model_name=name if results else None,
        eval_results=results or None,
        license_name=name_and_link[0],
        license_link=name_and_link[1],
    )
    is_transport = config.training_assignment != "nearest"
    hidden = () if config.backbone == "vqgan" else OF_THE_VQGAN
    hidden += () if is_transport else OF_THE_TRANSPORT
    hidden += tuple(field for field in IF_CHANGED if getattr(config, field) == getattr(OptVQConfig, field))
    hidden += () if "sinkhorn_balance" in (config.training_schedules or {}) else ("sinkhorn_balance",)
    with torch.device("meta"):
        num_parameters = OptVQModel(config).num_parameters()
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        repo_id=repo_id,
        license=_license({"license": license, **dict(zip(OTHER_LICENSE, name_and_link))}),
        config=config,
        settings={name: _setting(config, name) for name in SETTINGS if name not in hidden},
        num_parameters=num_parameters,
        dtype=str(config.dtype or torch.float32).removeprefix("torch."),
        is_transport=is_transport,
        pictures=facts.pictures,
        metrics=metrics,
        results_rows=results_rows(metrics) if metrics else [],
        head_rows=head_rows(metrics) if metrics else [],
        level_rows=level_rows(metrics) if metrics else [],
        evaluated_link=_dataset_link(evaluated_on) if evaluated_on else None,
        command=_evaluation_command(metrics, evaluated_on["name"], repo_id) if metrics and evaluated_on else None,
        reported=reported,
        reported_rows=reported_rows(reported) if reported else [],
        recipe=recipe,
        base=base,
        dataset_link=_dataset_link(trained_on) if trained_on else None,
        training={**facts.training, "duration": _duration(facts.training["seconds"])} if facts.training else None,
        conversion=conversion,
        origin=(conversion or {}).get("origin"),
        began_with=began_with,
        source_license=source_license,
        source_link=_source_link(source, revision) if source else None,
    )
    return ModelCard(_seal(re.sub(r"\n{3,}", "\n\n", card.content)))


# ---- cards that were edited ------------------------------------------------------------------------------------------

SEAL = re.compile(r"\n<!-- as written by optvq: (\w+) -->\n$")


def _seal(content: str) -> str:
    content = content.rstrip() + "\n"
    return f"{content}\n<!-- as written by optvq: {_digest(content)} -->\n"


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def edited_card(folder: Path) -> ModelCard | None:
    """The folder's card, if somebody wrote or changed it; None for one that this library wrote, which may be rewritten.

    Raises:
        ValueError: If its metadata is broken.
    """
    path = folder / CARD_FILE
    content = path.read_text() if path.is_file() else ""
    seal = SEAL.search(content)
    if not content or (seal and seal[1] == _digest(content[: seal.start()])):
        return None
    try:
        return ModelCard(content)
    except Exception as error:  # errors of YAML, and of huggingface_hub's checks
        raise ValueError(f"the metadata of {path} is broken: {' '.join(str(error).split())}") from error


# ---- parts -----------------------------------------------------------------------------------------------------------


def _setting(config: OptVQConfig, name: str) -> Any:
    """The value of a field; with a schedule, also the first and last value."""
    schedule = (config.training_schedules or {}).get(name)
    value = getattr(config, name)
    return f"{value:g} (schedule in training: {schedule[0]:g} to {schedule[1]:g})" if schedule else value


def _license(record: dict) -> str:
    """The licence in a record, with its name and link."""
    return ", ".join([record.get("license") or "not stated", *filter(None, map(record.get, OTHER_LICENSE))])


def _dataset(record: dict | None) -> dict | None:
    """Name of a record's dataset, and its Hub id, which may be None."""
    if record is None:
        return None
    id = record["dataset_id"] if "dataset_id" in record else hub_id(record["dataset"])
    return {"name": id or Path(record["dataset"]).name, "id": id}


def _dataset_link(dataset: dict) -> str:
    name = dataset["name"]
    return f"[{name}](https://huggingface.co/datasets/{name})" if dataset["id"] else f"`{name}` (not on the Hub)"


def _source_link(source: str, revision: str | None) -> str:
    if revision is None and source not in REPORTED:
        return f"`{source}`"
    return f"[{source}](https://huggingface.co/{source})" + (f", revision `{revision}`" if revision else "")


def _evaluation_command(metrics: dict, dataset: str, repo_id: str | None) -> str:
    words = ["optvq", "evaluate", "--model", repo_id or ".", "--dataset", dataset]
    held_out = ("train_split", "eval_fraction", "eval_fraction_seed")
    if not metrics.get("eval_fraction"):
        words += ["--eval-split", metrics["split"]]
        held_out = ()
    for name in (*held_out, "dataset_config", "data_dir", "image_column", "batch_size", "tile_size", "max_images"):
        if metrics.get(name):
            words += [f"--{name.replace('_', '-')}", str(metrics[name])]
    words += ["--assignment", *metrics["by_assignment"]]
    measured = measured_metrics(metrics)
    return shlex.join(words if set(measured) <= {*BASIC} else [*words, "--metrics", *measured])


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
