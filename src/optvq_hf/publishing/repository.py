"""Writes the folder that is committed to a repository."""

import json
import os
import re
from pathlib import Path

from huggingface_hub import ModelCard
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.dynamic_module_utils import custom_object_save

from ..image_processing_optvq import OptVQImageProcessor
from ..modeling_optvq import OptVQModel
from ..pipeline_optvq import ImageReconstructionPipeline, ImageTokenizationPipeline
from ..training.checkpoints import LAST_CHECKPOINT, STATE_NUMBERS, STATE_TENSORS
from ..training.losses.discriminator import PatchDiscriminator
from ..training.watching.log import LOG_FILE
from .card_results import check_results, eval_results_yaml, reported_eval_results_yaml
from .entries import CONFIG_FILE, PROCESSOR_FILE, known_entries
from .model_card import CARD_FILE, edited_card, make_card
from .public_text import private_parts, public, public_text
from .records import RECORDS, ModelFacts, read_facts


PIPELINES = {"image-tokenization": ImageTokenizationPipeline, "image-reconstruction": ImageReconstructionPipeline}
CODE = Path(__file__).resolve().parents[1]
RESULTS_FOLDER, DISCRIMINATOR_FOLDER = ".eval_results", "discriminator"

TEXT_FILES = (".json", ".jsonl", ".yaml", ".md")
# Names that may go to the Hub, besides card and records.
_WEIGHTS = r"model\.safetensors|model-\d+-of-\d+\.safetensors|model\.safetensors\.index\.json"
_MODEL = rf"config\.json|preprocessor_config\.json|{_WEIGHTS}|\w+\.py"
_DISCRIMINATOR = rf"{DISCRIMINATOR_FOLDER}/(config\.json|model\.safetensors)"
_CHECKPOINT = (
    rf"(ema/)?({_MODEL})|{_DISCRIMINATOR}|discriminator/{CARD_FILE}|{STATE_NUMBERS}|{STATE_TENSORS}|{LOG_FILE}"
)
MAY_GO = re.compile(rf"{_MODEL}|{_DISCRIMINATOR}|{RESULTS_FOLDER}/\w+\.yaml|{LAST_CHECKPOINT}/({_CHECKPOINT})")


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
    card = _card(facts, source, repo_id, license)
    model.save_pretrained(out)
    image_processor.save_pretrained(out)
    facts.copy_to(source, out)
    if (source / DISCRIMINATOR_FOLDER / "model.safetensors").is_file():
        _read_discriminator(source / DISCRIMINATOR_FOLDER).save_pretrained(out / DISCRIMINATOR_FOLDER)
    card.save(out / CARD_FILE)
    (out / RESULTS_FOLDER).mkdir()
    if facts.metrics and facts.metrics.get("dataset_id"):
        text = eval_results_yaml(facts.metrics, facts.metrics["dataset_id"])
        (out / RESULTS_FOLDER / "optvq.yaml").write_text(text)
    if facts.reported:
        (out / RESULTS_FOLDER / "reported.yaml").write_text(reported_eval_results_yaml(facts.reported))
    complete(out)


def complete(folder: Path) -> None:
    """Adds the code to a folder that is to be published, and removes everything that may not go.

    Raises:
        ValueError: If a file holds what looks like a token, a user at a host or a home folder.
    """
    for path in (folder / CONFIG_FILE, folder / PROCESSOR_FILE):
        _replace(path, public(known_entries(path.name, json.loads(path.read_text()))))
    add_pipelines(folder)
    for path in folder.rglob("*"):
        if not path.is_dir() and not may_go(path.relative_to(folder).as_posix()):
            path.unlink()
    for path in folder.rglob("*"):
        if path.suffix in TEXT_FILES and (found := private_parts(path.read_text())):
            raise ValueError(
                f"{path.relative_to(folder)} would be published with what looks like {found}: remove it from the model's folder"
            )


def may_go(name: str) -> bool:
    """Whether a file of this name may go to the Hub: a closed list."""
    return name in (CARD_FILE, *RECORDS) or MAY_GO.fullmatch(name) is not None


def refuse_links(folder: Path) -> None:
    """Raises ValueError for a link in a folder that leads out of it: what it leads to was never meant to be published.

    Links to the code of this package are no harm: publishing writes that code anew.
    """
    inside = folder.resolve()
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *files)):
            target = path.resolve()
            is_code = target.suffix == ".py" and target.parent == CODE
            if path.is_symlink() and not target.is_relative_to(inside) and not is_code:
                raise ValueError(
                    f"{path} is a link that leads out of {folder}: remove it, or put the file itself there"
                )


def _read_discriminator(folder: Path) -> PatchDiscriminator:
    """The discriminator in a folder. It is saved anew, so that nothing else of the folder goes."""
    try:
        return PatchDiscriminator.from_weights(load_file(folder / "model.safetensors"))
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(
            f"cannot publish the discriminator in {folder}: {error}; remove the folder to go without"
        ) from error


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
    _replace(folder / "config.json", config)
    for name in [path.name for path in folder.glob("*.py")]:
        (folder / name).unlink()
    for kind in (OptVQModel, OptVQImageProcessor, ImageTokenizationPipeline):
        custom_object_save(kind, folder)


def _replace(path: Path, content: dict) -> None:
    path.unlink()  # it may be a hard link to a file of a different folder
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


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
    return ModelCard(public_text(card.content))
