"""Records belong to the weights beside them, or no card is written from them."""

import json
import shutil

import pytest
import torch

from hub.checks import fails
from optvq_hf import OptVQModel
from optvq_hf.commands import publish, train
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
