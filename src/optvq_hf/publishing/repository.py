"""What a published repository holds, as a folder."""

import json
import re
import shutil
from pathlib import Path

from huggingface_hub import ModelCard
from transformers.dynamic_module_utils import custom_object_save

from ..evaluation.results import METRICS_FILE
from ..image_processing_optvq import OptVQImageProcessor
from ..modeling_optvq import OptVQModel
from ..pipeline_optvq import ImageReconstructionPipeline, ImageTokenizationPipeline
from ..training.history import LOG_FILE, RECIPE_FILE, SUMMARY_FILE
from .model_card import CARD_FILE, CONVERSION_FILE, hub_dataset, make_card, read_facts
from .results import check_results, eval_results_yaml, reported_eval_results_yaml


RECORDS = (METRICS_FILE, RECIPE_FILE, SUMMARY_FILE, LOG_FILE, CONVERSION_FILE)
PIPELINES = {"image-tokenization": ImageTokenizationPipeline, "image-reconstruction": ImageReconstructionPipeline}


def write_repository(
    model: OptVQModel, image_processor: OptVQImageProcessor, source: Path, repo_id: str, license: str | None, out: Path
):
    """Writes model, code, pipelines, card, results, pictures and recipe.

    Args:
        model, image_processor: Of the folder.
        source: The model's folder, with what `optvq train`, `evaluate` and `convert` left in it.
        repo_id: Where it will be published.
        license: Of the weights; by default that of the conversion, or the project's own.
        out: Written to; made if missing.

    Raises:
        ValueError: If a card in `source` does not state the results that are there.
    """
    save_with_pipelines(model, image_processor, out)
    facts = read_facts(source)
    for path in (*(source / name for name in RECORDS), *(source / name for name in facts.pictures)):
        if path.is_file():
            shutil.copy(path, out)
    if (source / "discriminator").is_dir():
        shutil.copytree(source / "discriminator", out / "discriminator")
    name = repo_id.rpartition("/")[2]
    card = edited_card(source, license) or make_card(facts, name, repo_id, license)
    check_results(card, facts.metrics, facts.reported)
    card.save(out / CARD_FILE)
    dataset = hub_dataset(facts.metrics["dataset"]) if facts.metrics else None
    (out / ".eval_results").mkdir()
    if dataset:
        (out / ".eval_results" / "optvq.yaml").write_text(eval_results_yaml(facts.metrics, dataset))
    if facts.reported:
        (out / ".eval_results" / "reported.yaml").write_text(reported_eval_results_yaml(facts.reported))


def edited_card(source: Path, license: str | None = None) -> ModelCard | None:
    """The folder's card, unless it has none or one as `optvq convert` and `--card-only` write it."""
    path = source / CARD_FILE
    if not path.is_file():
        return None
    card = ModelCard.load(path)
    title = re.search(r"^# (.+)$", card.text, re.MULTILINE)
    is_as_written = title and card.content == make_card(read_facts(source), title[1], license=license).content
    return None if is_as_written else card


def save_with_pipelines(model: OptVQModel, image_processor: OptVQImageProcessor, out: Path):
    """As `save_pretrained`, and such that `pipeline(task, model=..., trust_remote_code=True)` finds the code of its task."""
    model.save_pretrained(out)
    image_processor.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    config["custom_pipelines"] = {
        task: {"impl": f"pipeline_optvq.{kind.__name__}", "pt": ["AutoModel"], "type": "image"}
        for task, kind in PIPELINES.items()
    }
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    custom_object_save(ImageTokenizationPipeline, out)
