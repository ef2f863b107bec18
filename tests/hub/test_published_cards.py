"""The card of a published model tells the truth, or nothing is published."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from hub.checks import fails, move_codes
from optvq_hf.commands import evaluate, publish
from optvq_hf.training.digests import recipe_of


def test_a_card_of_ones_own_is_kept(hub, alice, run):
    publish.main([str(run), "alice/own", "--card-only", "--license", "cc-by-4.0"])
    path = run / "README.md"
    path.write_text(path.read_text().replace("## Limits and biases", "My notes.\n\n## Limits and biases"))
    publish.main([str(run), "alice/own"])
    card = hub.repository("alice/own").files()["README.md"].decode()
    assert "My notes." in card and "license: cc-by-4.0" in card


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (
            "metadata",
            "the card says mse is 0.0001 on split test[:40] of fashion_mnist_sample, the records beside it do not",
        ),
        ("second value", "the card says mse is 0.0001"),
        ("dataset", "of ILSVRC/imagenet-1k, the records beside it do not"),
        (
            "table",
            "the section Results of the model card has a row that is not on record: '| nearest | 0.0001",
        ),
        ("second row", "has a row that is not on record: '| sinkhorn | 0.0001"),
        ("results", "the card says psnr is"),
        ("no results", "the card says mse is"),
        ("no results nor metadata", "has a row that is not on record"),
    ],
)
def test_wrong_numbers_are_refused(hub, alice, run, capsys, place, message):
    publish.main([str(run), "alice/wrong", "--card-only"])
    path, metrics = run / "README.md", json.loads((run / "metrics.json").read_text())
    text = path.read_text()
    row = f"| nearest | {metrics['mse']:.4f} |"
    value = f"    - type: mse\n      value: {metrics['mse']}\n"
    assert row in text and value in text
    if place == "metadata":
        text = text.replace(str(metrics["mse"]), "0.0001")
    elif place == "second value":
        text = text.replace(value, value.replace(str(metrics["mse"]), "0.0001") + "      name: x\n" + value)
    elif place == "dataset":
        text = text.replace("type: fashion_mnist_sample", "type: ILSVRC/imagenet-1k")
    elif place == "table":
        text = text.replace(row, "| nearest | 0.0001 |")
    elif place == "second row":
        text = text.replace(row, "| sinkhorn | 0.0001 | 60 | 1 | 100 | 64 |\n" + row)
    elif place == "results":
        text += "\nMy notes.\n"
        (run / "metrics.json").write_text(json.dumps({**metrics, "psnr": 40.0}))
    else:
        text += "\nMy notes.\n"
        (run / "metrics.json").unlink()
        if "metadata" in place:
            text = re.sub(r"^model-index:.*?(?=^---$)", "", text, flags=re.MULTILINE | re.DOTALL)
    path.write_text(text)
    assert message in fails(publish, [run, "alice/wrong"], capsys)
    assert ("model", "alice/wrong") not in hub.repositories


def test_an_untouched_card_is_written_again(hub, alice, run):
    publish.main([str(run), "alice/before", "--card-only"])
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({**metrics, "psnr": 40.0}))
    publish.main([str(run), "alice/again", "--license", "cc0-1.0"])
    card = hub.repository("alice/again").files()["README.md"].decode()
    assert "value: 40.0" in card and "license: cc0-1.0" in card and "alice/before" not in card


def test_an_edited_card_of_another_place_is_refused(run, alice, capsys):
    publish.main([str(run), "alice/one", "--card-only"])
    with open(run / "README.md", "a") as file:
        file.write("My notes.\n")
    assert "is the card of alice/one: write alice/other there" in fails(publish, [run, "alice/other"], capsys)


def test_results_of_other_weights_are_refused(hub, alice, run, capsys):
    metrics = (run / "metrics.json").read_bytes()
    move_codes(run)
    (run / "metrics.json").write_bytes(metrics)
    line = fails(publish, [run, "alice/other-weights"], capsys)
    assert "are of other weights: measure again with optvq evaluate" in line
    dataset = ["--dataset", "fashion_mnist_sample", "--max-images", "24"]
    evaluate.main(["--model", str(run), *dataset, "--overwrite"])
    publish.main([str(run), "alice/other-weights"])
    card = hub.repository("alice/other-weights").files()["README.md"].decode()
    assert "24 images, split `test`" in card and "--max-images 24" in card


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.json", "[]", "metrics.json is broken: it must hold entries, got list"),
        ("recipe.yaml", "a: 1", "recipe.yaml lacks dataset, learning_rate, train_split"),
        ("training_summary.json", "{", "training_summary.json is broken"),
        ("README.md", "---\na: [\n---\n", "the metadata of"),
        ("config.json", "{", "cannot load model"),
    ],
)
def test_broken_records(alice, run, capsys, name, content, message):
    (run / name).write_text(content)
    assert message in fails(publish, [run, "alice/broken"], capsys)


def test_figures_of_another_shape(alice, run, capsys):
    metrics = json.loads((run / "metrics.json").read_text())
    for by_assignment in ([], {"nearest": 1}, {"nearest": {"mse": 0.1}}):
        (run / "metrics.json").write_text(json.dumps({**metrics, "by_assignment": by_assignment}))
        line = fails(publish, [run, "alice/broken"], capsys)
        assert (
            "metrics.json lacks figures in by_assignment" in line or "has [] as by_assignment, which cannot be" in line
        )


def test_a_card_is_written_to_folders_alone(published, capsys):
    assert "--card-only writes to a folder" in fails(publish, [published, "alice/x", "--card-only"], capsys)


def test_results_of_a_hub_dataset_are_in_both_forms(hub, alice, run):
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({**metrics, "dataset_id": "ylecun/mnist"}))
    publish.main([str(run), "alice/both"])
    files = hub.repository("alice/both").files()
    entries = yaml.safe_load(files[".eval_results/optvq.yaml"])
    assert {entry["dataset"]["task_id"]: entry["value"] for entry in entries}["reconstruction_mse"] == metrics["mse"]
    assert {entry["dataset"]["id"] for entry in entries} == {"ylecun/mnist"}
    results = {result.metric_type: result for result in ModelCard(files["README.md"].decode()).data.eval_results}
    assert results["mse"].metric_value == metrics["mse"] and results["mse"].dataset_type == "ylecun/mnist"


def test_the_licence_of_a_model_that_began_as_another(hub, alice, run):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    digest = json.loads((run / "metrics.json").read_text())["weights_sha256"]
    (run / "recipe.yaml").write_text(recipe_of({**recipe, "model": "/home/alice/secret/base"}, digest))
    publish.main([str(run), "alice/tuned"])
    card = ModelCard(hub.repository("alice/tuned").files()["README.md"].decode())
    assert card.data.license is None and "Licence of the weights: not stated" in card.text
    assert "It began with the weights of `base`" in card.text and "secret" not in card.content
    publish.main([str(run), "alice/tuned", "--license", "mit"])
    assert "license: mit" in hub.repository("alice/tuned").files()["README.md"].decode()
