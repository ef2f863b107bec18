"""Writes the folder that is committed to a repository."""

import json
import re
import shutil
from pathlib import Path

from huggingface_hub import ModelCard
from transformers.dynamic_module_utils import custom_object_save

from ..evaluation.results import weights_digest
from ..image_processing_optvq import OptVQImageProcessor
from ..modeling_optvq import OptVQModel
from ..pipeline_optvq import ImageReconstructionPipeline, ImageTokenizationPipeline
from ..training.checkpoints import LAST_CHECKPOINT
from .card_results import check_results, eval_results_yaml, reported_eval_results_yaml
from .model_card import CARD_FILE, edited_card, make_card
from .records import RECORDS, ModelFacts, read_facts


PIPELINES = {"image-tokenization": ImageTokenizationPipeline, "image-reconstruction": ImageReconstructionPipeline}
RESULTS_FOLDER, DISCRIMINATOR_FOLDER = ".eval_results", "discriminator"


def write_repository(
    model: OptVQModel, image_processor: OptVQImageProcessor, source: Path, repo_id: str, license: str | None, out: Path
) -> None:
    """Writes model, code, pipelines, card, results, pictures and recipe.

    Args:
        model, image_processor: Of the folder.
        source: The model's folder, with what `optvq train`, `evaluate` and `convert` left in it.
        repo_id: Repository to publish to.
        license: Of the weights; by default as in [`make_card`].
        out: Folder to write to; created if it is missing.

    Raises:
        ValueError: If the results are those of other weights, or if an edited card does not state them.
    """
    facts = read_facts(source)
    if facts.metrics and facts.metrics.get("weights_sha256") != weights_digest(model):
        raise ValueError(
            f"the results in {source} are of other weights: measure again with optvq evaluate --model {source}"
        )
    card = _card(facts, source, repo_id, license)
    model.save_pretrained(out)
    image_processor.save_pretrained(out)
    add_pipelines(out)
    facts.copy_to(source, out)
    if (source / DISCRIMINATOR_FOLDER).is_dir():
        shutil.copytree(source / DISCRIMINATOR_FOLDER, out / DISCRIMINATOR_FOLDER)
    card.save(out / CARD_FILE)
    (out / RESULTS_FOLDER).mkdir()
    if facts.metrics and facts.metrics.get("dataset_id"):
        text = eval_results_yaml(facts.metrics, facts.metrics["dataset_id"])
        (out / RESULTS_FOLDER / "optvq.yaml").write_text(text)
    if facts.reported:
        (out / RESULTS_FOLDER / "reported.yaml").write_text(reported_eval_results_yaml(facts.reported))


def is_ours(name: str) -> bool:
    """Whether publishing writes files of this name; a commit removes those that it does not replace."""
    is_weights = name.startswith("model") and name.endswith((".safetensors", ".safetensors.index.json"))
    folders = (f"{RESULTS_FOLDER}/", f"{DISCRIMINATOR_FOLDER}/", f"{LAST_CHECKPOINT}/")
    return is_weights or name in RECORDS or name.startswith(folders)


def add_pipelines(folder: Path) -> None:
    """Adds the code of the pipelines to a saved model's folder, for `pipeline(..., trust_remote_code=True)`."""
    config = json.loads((folder / "config.json").read_text())
    config["custom_pipelines"] = {
        task: {"impl": f"pipeline_optvq.{kind.__name__}", "pt": ["AutoModel"], "type": "image"}
        for task, kind in PIPELINES.items()
    }
    (folder / "config.json").unlink()  # it may be a hard link to a file of a different folder
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for name in [path.name for path in folder.glob("*.py")]:
        (folder / name).unlink()
    for kind in (OptVQModel, OptVQImageProcessor, ImageTokenizationPipeline):
        custom_object_save(kind, folder)


def _card(facts: ModelFacts, source: Path, repo_id: str, license: str | None) -> ModelCard:
    written = make_card(facts, repo_id.rpartition("/")[2], repo_id, license)
    card = edited_card(source)
    if card is None:
        return written
    check_results(card, written)
    other = re.search(r'^repo_id = "(.*)"$', card.content, re.MULTILINE)
    if other and other[1] != repo_id:
        raise ValueError(f"{source / CARD_FILE} is the card of {other[1]}: write {repo_id} there, or remove it")
    if license:
        card.data["license"] = license
    return card
