"""The cards in model_cards/ say what the results beside them say, and the weights beside them give these results."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from folders import contents
from optvq_hf import OptVQConfig, OptVQModel
from optvq_hf.commands import evaluate, publish
from optvq_hf.data.arguments import DataArguments
from optvq_hf.publishing import card_results, model_card
from optvq_hf.publishing.card_results import check_results
from optvq_hf.publishing.model_card import make_card
from optvq_hf.publishing.records import ModelFacts, read_facts


CARDS = Path(__file__).parents[2] / "model_cards"
FOLDERS = sorted(path for path in CARDS.iterdir() if path.is_dir())
TRAINED = [folder for folder in FOLDERS if (folder / "model.safetensors").is_file()]
of_each = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
of_each_trained = pytest.mark.parametrize("folder", TRAINED, ids=lambda folder: folder.name)


def repo_id(folder: Path) -> str:
    return f"optvq-hf/{'' if folder.name.startswith('optvq') else 'optvq-'}{folder.name}"


def test_all_are_there():
    assert [folder.name for folder in TRAINED] == ["fashion_mnist", "mnist", "photos32"]
    assert [folder.name for folder in FOLDERS if folder not in TRAINED] == ["optvq-16x16x4", "optvq-16x16x8"]
    page = (CARDS / "README.md").read_text()
    assert all(f"({folder.name})" in page and f"`{repo_id(folder)}` (planned)" in page for folder in FOLDERS)
    assert (CARDS / "template.md").read_text().startswith("---\n{{ card_data }}")


@of_each
def test_the_card_is_what_its_files_make(folder):
    name = repo_id(folder).partition("/")[2]
    expected = make_card(read_facts(folder), name, repo_id(folder)).content
    assert (folder / "README.md").read_text() == expected, (
        f"run: optvq publish model_cards/{folder.name} {repo_id(folder)} --card-only"
    )


def test_the_card_says_how_training_moved_the_transport():
    facts = ModelFacts(OptVQConfig(sinkhorn_epsilon=100.0))
    facts.config.training_schedules = {"sinkhorn_epsilon": [10.0, 100.0]}
    assert "| sinkhorn_epsilon | `100 (schedule in training: 10 to 100)` |" in make_card(facts, "name").content
    assert "sinkhorn_balance" not in make_card(facts, "name").content
    facts.config.sinkhorn_balance, facts.config.training_schedules = 0.5, {"sinkhorn_balance": [1.0, 0.5]}
    assert "| sinkhorn_balance | `0.5 (schedule in training: 1 to 0.5)` |" in make_card(facts, "name").content


def test_the_card_of_a_model_with_levels():
    facts = read_facts(CARDS / "mnist")
    before = make_card(facts, "name", "me/name")
    assert (
        "num_quantizers" not in before.content
        and "| levels |" not in before.content
        and "| cost |" not in before.content
    )
    facts.config.cost, facts.config.num_quantizers = "cosine", 2
    for name, values in {
        "mse": [0.5, 0.25],
        "psnr": [9, 12],
        "codebook_usage": [100, 50],
        "perplexity": [8, 4],
    }.items():
        facts.metrics[f"{name}_per_level"] = values
    card = make_card(facts, "name", "me/name")
    for row in (
        "num_quantizers | `2`",
        "cost | `cosine`",
        "1 | 0.5000 | 9.00 | 100.0 | 8",
        "2 | 0.2500 | 12.00 | 50.0 | 4",
    ):
        assert f"| {row} |" in card.content
    heads, size = facts.config.num_codebook_heads, facts.config.latent_size
    assert (
        f"{size} x {size} tokens of {2 * heads} codes each" in card.content and "on 2 levels of which" in card.content
    )
    assert (
        f"# ({2 * heads}, {size}, {size}); also lists" in card.content and f"codes=codes[:, :{heads}])" in card.content
    )
    check_results(card, card)
    with pytest.raises(ValueError, match="row that is not on record"):
        check_results(ModelCard(card.content.replace("0.2500", "0.1")), card)


@of_each
def test_metadata_and_sections(folder):
    card = ModelCard.load(folder / "README.md")
    data = card.data
    assert data.license and data.library_name == "transformers" and data.pipeline_tag and "optvq" in data.tags
    assert data.metrics and data.eval_results
    sections = ["Use", "Codes", "Training", "Results", "Limits and biases", "Compute", "Citation"]
    assert re.findall(r"^## (.*)", card.text, re.MULTILINE) == sections
    linked = set(re.findall(r"\]\(([\w.]+)\)", card.text))
    assert linked <= {path.name for path in folder.iterdir()}
    texts = [path.read_text() for path in folder.iterdir() if path.suffix in (".md", ".json", ".jsonl", ".yaml")]
    assert len(texts) >= 3 and not [text for text in texts if re.search(r"/(work|home|tmp|root)/", text)]


def test_figures_of_the_authors_are_marked(golden):
    for heads, rfid in ((4, 1.0), (8, 0.91)):
        folder = CARDS / f"optvq-16x16x{heads}"
        card, facts = ModelCard.load(folder / "README.md"), read_facts(folder)
        assert "**Reported by the authors**" in card.text and "None were measured on these weights" in card.text
        assert all(result.source_name == "reported by the authors" for result in card.data.eval_results)
        assert {r.metric_type: r.metric_value for r in card.data.eval_results}["rfid"] == rfid
        assert card.data.base_model == f"BorelTHU/optvq-16x16x{heads}" and card.data.license == "mit"
        reference = json.loads((golden / f"structure_imagenet_f16_h{heads}.json").read_text())
        with torch.device("meta"):
            counted = OptVQModel(facts.config).num_parameters()
        assert counted == reference["param_counts"]["total"] and f"{counted:,} parameters" in card.text


@pytest.mark.parametrize(("metadata", "row"), [("value: 1.0\n", "| 0.50 |"), ("value: 0.5\n", "| 1.00 |")])
def test_a_changed_figure_of_the_authors_is_noticed(metadata, row):
    card = ModelCard.load(CARDS / "optvq-16x16x4" / "README.md")
    changed = ModelCard(card.content.replace("value: 1.0\n", metadata).replace("| 1.00 |", row))
    with pytest.raises(ValueError, match="the card says rfid is 0.5|row that is not on record: .*0.5"):
        check_results(changed, card)


def test_the_weights_on_the_embedded_images(tmp_path):
    """Close to the card's figures, which are of all 10,000 test images; those are for the slow tests."""
    flags = ["--dataset", "fashion_mnist_sample", "--output-dir", str(tmp_path)]
    evaluate.main(["--model", str(CARDS / "fashion_mnist"), *flags])
    measured = json.loads((tmp_path / "metrics.json").read_text())
    expected = json.loads((CARDS / "fashion_mnist" / "metrics.json").read_text())
    for name in ("psnr", "ssim"):
        assert measured[name] == pytest.approx(expected[name], rel=0.02), name


@pytest.mark.slow
@pytest.mark.parametrize("folder", [CARDS / "photos32", CARDS / "mnist"], ids=lambda folder: folder.name)
def test_the_weights_give_the_results(folder, image_data, tmp_path):
    metrics = json.loads((folder / "metrics.json").read_text())
    flags = ["--dataset", str(image_data / folder.name), "--eval-split", metrics["split"]]
    # All assignments where that is quick.
    assignments = list(metrics["by_assignment"]) if metrics["num_images"] <= 3000 else [metrics["assignment"]]
    flags += ["--assignment", *assignments, "--batch-size", str(metrics["batch_size"])]
    evaluate.main(["--model", str(folder), "--output-dir", str(tmp_path), *flags])
    again = json.loads((tmp_path / "metrics.json").read_text())
    assert list(again["by_assignment"]) == assignments
    for assignment in assignments:
        expected = metrics["by_assignment"][assignment]
        for name in ("num_images", "mse", "psnr", "ssim", "codebook_usage", "perplexity"):
            assert again["by_assignment"][assignment][name] == pytest.approx(expected[name], rel=2e-3), (
                assignment,
                name,
            )


@of_each_trained
def test_the_snippet_runs_on_the_published_model(folder, hub, monkeypatch, tmp_path, new_process):
    monkeypatch.setenv("HF_TOKEN", hub.add_user("optvq-hf"))
    publish.main([str(folder), repo_id(folder)])
    files = hub.repository(repo_id(folder)).files()
    here = contents(folder)
    assert files["README.md"] == here["README.md"] and files["model.safetensors"] == here["model.safetensors"]
    code = [{name: text for name, text in of.items() if name.endswith(".py")} for of in (files, here)]
    assert code[0] == code[1] and files["config.json"] == here["config.json"]  # the folder loads as it lies
    has_id = json.loads(here["metrics.json"])["dataset_id"] is not None
    assert (".eval_results/optvq.yaml" in files) == has_id
    [snippet] = re.findall(r"```python\n(.*?)```", here["README.md"].decode(), re.DOTALL)
    Image.effect_noise((50, 40), 80).save(tmp_path / "picture.png")
    script = "import sys; sys.modules['optvq_hf'] = None\n" + snippet + "\nassert picture.size == (32, 32)"
    done = new_process(script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert Image.open(tmp_path / "reconstruction.png").size == (32, 32)


def test_a_folder_loads_as_it_lies(tmp_path, new_process):
    """By its own code, without this package."""
    folder = CARDS / "fashion_mnist"
    assert all((folder / "modeling_optvq.py").samefile(CARDS / other.name / "modeling_optvq.py") for other in TRAINED)
    [snippet] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    snippet = snippet.replace(repo_id(folder), str(folder))
    Image.effect_noise((50, 40), 80).save(tmp_path / "picture.png")
    script = f"import sys; sys.modules['optvq_hf'] = None\n{snippet}\nassert picture.size == (32, 32)"
    done = new_process(script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_card_says_how_each_code_of_a_token_is_used():
    facts = read_facts(CARDS / "mnist")
    metrics = facts.metrics
    text = make_card(facts, "name").content
    assert f"A token takes {metrics['bits_per_token']:.1f} bits, which are 2.500 per pixel" in text
    for number, usage in enumerate(metrics["codebook_usage_per_head"], start=1):
        assert f"\n| {number} | {usage:.1f} | {metrics['perplexity_per_head'][number - 1]:.0f} | " in text
    metrics["codebook_usage_per_head"] = metrics["codebook_usage_per_head"][:1]
    assert "code of a token" not in make_card(facts, "name").content
    for name in ("bits_per_token", "codebook_usage_per_head", "perplexity_per_head", "entropy_per_head"):
        del metrics[name]
    assert "A token takes" not in make_card(facts, "name").content  # records of before


def test_further_metrics_are_in_table_metadata_and_command():
    facts = read_facts(CARDS / "mnist")
    further = {"lpips_alex": 0.0125, "fd-efficientnet-lite0": 7.5}
    for record in (facts.metrics["by_assignment"]["nearest"], facts.metrics):
        record |= {**further, "fd-transformers:/home/alice/network": 0.25}
    card = make_card(facts, "name")
    assert (
        "| assignment | MSE [-1, 1] | PSNR dB | SSIM | LPIPS alex | fd-efficientnet-lite0 | usage % |" in card.content
    )
    assert " | 0.985 | 0.0125 | 7.50 | 100.0 |" in card.content and " | 0.985 | - | - | 100.0 |" in card.content
    assert further.items() <= {result.metric_type: result.metric_value for result in card.data.eval_results}.items()
    assert {*further} <= {*card.data.metrics}
    assert f"--metrics mse psnr ssim {' '.join(further)}\n" in card.content
    written = card_results.eval_results_yaml(facts.metrics, "ylecun/mnist")
    assert all(f"reconstruction_{name}" in written for name in further)
    assert "alice" not in str(card) + written  # a network's name may be a folder


@pytest.mark.parametrize("values", [3, ["a"], [True], {}])
def test_figures_per_head_that_are_none(tmp_path, values):
    for name in ("config.json", "model.safetensors", "metrics.json"):
        shutil.copy(CARDS / "mnist" / name, tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    (tmp_path / "metrics.json").write_text(json.dumps({**metrics, "codebook_usage_per_head": values}))
    with pytest.raises(ValueError, match="metrics.json has .* as codebook_usage_per_head, which cannot be"):
        read_facts(tmp_path)


@pytest.mark.parametrize("settings", [{}, {"train_split": "train", "eval_fraction": 0.1, "eval_fraction_seed": 3}])
def test_the_command_of_a_card_evaluates_the_same_images(settings):
    """Also images that were held out at random, whose split has no name that a flag takes."""
    data = DataArguments(dataset="x", eval_split="valid", **settings)
    metrics = {"split": data.evaluated_split, "batch_size": 8, "by_assignment": {"nearest": {}}, **settings}
    words = shlex.split(model_card._evaluation_command(metrics, "x", "me/model"))
    _, parsed = evaluate.make_parser().parse(words[2:])
    assert parsed.evaluated_split == data.evaluated_split
