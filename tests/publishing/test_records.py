"""Records belong to the weights beside them, or no card is written from them."""

import json
import shutil

import pytest
import torch
import yaml

from hub.checks import fails
from optvq_hf import OptVQModel
from optvq_hf.commands import evaluate, publish, train
from optvq_hf.publishing.entries import known_entries
from optvq_hf.publishing.model_card import make_card
from optvq_hf.publishing.records import read_facts
from optvq_hf.training.digests import folder_digest, recipe_digest, weights_digest
from optvq_hf.training.models import load_model
from optvq_hf.training.trainer import TrainingRun
from training.runs import flags, read_log


SHORT = {"max_steps": 4, "save_every": 0, "adversarial_weight": 0, "lecam_weight": 0, "eval_split": "test[:8]"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What a run with an EMA of its weights leaves."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train.main(flags(folder, **SHORT))
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The same of another run, without an EMA."""
    folder = tmp_path_factory.mktemp("other") / "run"
    train.main(flags(folder, **SHORT, seed=1, ema_decay=0))
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def refused(folder, capsys) -> str:
    with pytest.raises(ValueError, match="weights"):
        read_facts(folder)
    assert "weights" in fails(publish, [folder, "alice/x", "--dry-run"], capsys)
    return fails(publish, [folder, "alice/x", "--card-only"], capsys)


def test_every_record_has_the_digest_of_its_weights(finished):
    for folder in (finished, finished / "ema"):
        digest = weights_digest(load_model(str(folder))[0])
        assert folder_digest(folder) == digest and recipe_digest((folder / "recipe.yaml").read_text()) == digest
        for name in ("training_summary.json", "metrics.json"):
            assert json.loads((folder / name).read_text())["weights_sha256"] == digest
    assert read_log(finished)[-1]["weights_sha256"] == folder_digest(finished)
    assert folder_digest(finished) != folder_digest(finished / "ema")


def test_the_digest_is_that_of_shards_too(finished, tmp_path):
    model = OptVQModel.from_pretrained(finished)
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1 and folder_digest(tmp_path) == weights_digest(model)


def test_a_recipe_with_a_digest_is_still_a_recipe(finished, tmp_path):
    train.main(["--config", str(finished / "recipe.yaml"), "--output-dir", str(tmp_path / "again")])
    assert folder_digest(tmp_path / "again") == folder_digest(finished)


def test_a_second_run_that_was_killed(run, tmp_path, monkeypatch, capsys):
    """Its recipe and log are beside the weights of the first."""

    def killed(*_, **__):
        raise KeyboardInterrupt

    second = tmp_path / "second"
    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "take_step", killed)
        with pytest.raises(SystemExit):
            train.main(flags(second, **SHORT, seed=1, learning_rate=1e-4))
    for name in ("recipe.yaml", "training_log.jsonl"):
        shutil.copy(second / name, run / name)
    assert "recipe.yaml does not say of which weights it is" in refused(run, capsys)
    (run / "recipe.yaml").unlink()
    read_facts(run)  # its empty log says nothing
    train.main(flags(second, **SHORT, seed=1, learning_rate=1e-4))
    assert read_facts(second).recipe["learning_rate"] == 1e-4


@pytest.mark.parametrize("name", ["recipe.yaml", "training_summary.json", "training_log.jsonl", "metrics.json"])
def test_records_of_another_run(run, other, capsys, name):
    shutil.copy(other / name, run / name)
    line = refused(run, capsys)
    assert ("are of other weights" if name == "metrics.json" else f"{name} is of other weights") in line


def test_records_without_a_digest_say_what_to_write(run, capsys):
    """As earlier versions wrote them."""
    path, digest = run / "recipe.yaml", folder_digest(run)
    first, rest = path.read_text().split("\n", 1)
    path.write_text(rest)
    assert f"write # weights_sha256: {digest} in its first line" in refused(run, capsys)
    path.write_text(f"{first}\n{rest}")
    read_facts(run)


def test_changed_weights(run, capsys):
    model = OptVQModel.from_pretrained(run)
    with torch.no_grad():
        model.quantizer.embedding.weight.add_(1)
    model.save_pretrained(run)
    assert "other weights" in refused(run, capsys)


def test_an_ema_of_another_run(run, other, capsys):
    read_facts(run / "ema")
    for path in other.iterdir():
        if path.is_file():
            shutil.copy(path, run / path.name)
    for folder in (run, run / "ema"):
        assert f"{run / 'ema'} is of another run than {run}: move or remove it" in refused(folder, capsys)
    shutil.rmtree(run / "ema")
    read_facts(run)


def test_pictures_go_with_their_records(run):
    assert len(read_facts(run).pictures) == 3
    (run / "metrics.json").unlink()
    assert read_facts(run).pictures == ["training_curves.png"]


def test_what_our_commands_write_is_published(tmp_path):
    """The closed lists of entries have everything but what says where a run was."""
    folder = tmp_path / "run"
    settings = {"discriminator_start": 1, "perceptual_weight": 0, "balance_schedule": (1, 0.5), "eval_fraction": 0.02}
    train.main(flags(folder, max_steps=6, save_every=0, **settings))
    words = ["--model", str(folder), "--dataset", "fashion_mnist_sample", "--max-images", "20", "--overwrite"]
    evaluate.main([*words, "--image-column", "image", "--assignment", "nearest", "potentials", "sinkhorn"])
    for name in ("metrics.json", "training_summary.json", "config.json", "preprocessor_config.json"):
        for path in (folder / name, folder / "ema" / name):
            record = json.loads(path.read_text())
            assert known_entries(name, record) == record, path
    entries = read_log(folder)
    assert len(entries) == 6 and "r1" in entries[-1] and "weights_sha256" in entries[-1]
    assert [known_entries("training_log.jsonl", entry) for entry in entries] == entries
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    known = known_entries("recipe.yaml", recipe)
    assert recipe.keys() - known.keys() == {"output_dir", "push_to_hub", "tracker_project"}
    assert known.items() <= recipe.items()


def test_entries_that_are_not_ours_are_dropped():
    deep = {
        "by_assignment": {"nearest": {"mse": 1, "note": "x"}, "x": {"mse": 1}},
        "versions": {"torch": "2", "note": "x"},
    }
    assert known_entries("metrics.json", {**deep, "note": "x", "mse": {"note": "x"}, "split": [["x"]]}) == {
        "by_assignment": {"nearest": {"mse": 1}},
        "versions": {"torch": "2"},
    }


def test_a_base_model_in_a_folder_is_not_taken_for_one_of_the_hub(finished, tmp_path, monkeypatch):
    """Its relative name looks like a Hub id, and where the model is published there is no such folder."""
    shutil.copytree(finished, tmp_path / "runs" / "base")
    monkeypatch.chdir(tmp_path)
    data = ["--dataset", "fashion_mnist_sample", "--eval-split", "test[:8]", "--max-steps", "1", "--report-to", "none"]
    train.main(["--model", "runs/base", *data, "--output-dir", "runs/new"])
    monkeypatch.chdir("/")
    facts = read_facts(tmp_path / "runs" / "new")
    card = make_card(facts, "new")
    assert facts.base_model == "runs/base" and card.data.base_model is None
    facts.base_model_id = "alice/base"
    assert make_card(facts, "new").data.base_model == "alice/base"
