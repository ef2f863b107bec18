"""What `optvq publish` commits, and that it commits it once or not at all."""

import json
import os
import shutil
from pathlib import Path
from secrets import token_hex

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_session
from transformers import AutoModel

from folders import contents
from hub.checks import fails, move_codes, sent
from optvq_hf import OptVQModel
from optvq_hf.commands import evaluate, publish
from optvq_hf.publishing import commits as publishing_hub
from optvq_hf.publishing.checkpoint_pusher import CheckpointPusher
from optvq_hf.training.arguments import ObjectiveArguments
from optvq_hf.training.checkpoints import RunState, write_state
from optvq_hf.training.integrity import checksums
from optvq_hf.training.losses.discriminator import PatchDiscriminator
from optvq_hf.training.losses.objective import make_objective


# ---- what is published -----------------------------------------------------------------------------------------------


def test_one_commit_with_everything(hub, run, published, capsys):
    repository = hub.repository(published)
    assert [commit.message for commit in repository.commits[1:]] == [f"Publish {published.partition('/')[2]}"]
    files = repository.files()
    code = ["configuration", "modeling", "backbone", "quantizer", "image_processing", "pipeline"]
    expected = {f"{name}_optvq.py" for name in code} | {"model.safetensors", "config.json", "preprocessor_config.json"}
    expected |= {"README.md", "metrics.json", "recipe.yaml", "training_summary.json", "training_log.jsonl"}
    expected |= {"reconstructions.png", "codebook_usage.png", "training_curves.png"}
    assert expected < files.keys() and not [name for name in files if "checkpoint" in name]
    here = contents(run)
    assert files["model.safetensors"] == here["model.safetensors"]
    measured, told = json.loads(here["metrics.json"]), json.loads(files["metrics.json"])
    assert told == {**measured, "model": run.name if Path(measured["model"]).is_absolute() else measured["model"]}
    for name in set(files) - {"training_log.jsonl"}:
        assert str(run.parent).encode() not in files[name], name  # nothing of this machine
    config = json.loads(files["config.json"])
    assert config["custom_pipelines"].keys() == {"image-tokenization", "image-reconstruction"}

    before = len(repository.commits)
    publish.main([str(run), published])  # nothing to do
    assert len(repository.commits) == before and "published" in capsys.readouterr().out


def test_what_is_loaded_is_saved_without_the_repositorys_pipelines(published, tmp_path):
    model = OptVQModel.from_pretrained(published)
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "custom_pipelines" not in config
    assert set(config["auto_map"].values()) == {"configuration_optvq.OptVQConfig", "modeling_optvq.OptVQModel"}


def test_dry_run_sends_nothing(hub, alice, run, capsys):
    publish.main([str(run), "alice/dry", "--dry-run"])
    shown = capsys.readouterr().out
    assert "model.safetensors" in shown and "would be committed to alice/dry; nothing was sent" in shown
    assert ("model", "alice/dry") not in hub.repositories and not sent(hub, "POST", "")


def test_private_repositories(hub, alice, bob_reads, run, published, capsys):
    publish.main([str(run), "alice/secret", "--private"])
    assert hub.repository("alice/secret").private
    with bob_reads:
        assert "there is no model alice/secret on the Hub, or it is private" in fails(
            evaluate, ["--model", "alice/secret", "--dataset", "fashion_mnist_sample"], capsys
        )
    assert "exists already, and is public" in fails(publish, [run, published, "--private"], capsys)


def test_branches_and_pull_requests(hub, run, published):
    repository = hub.repository(published)
    main, codebook = repository.refs["main"], OptVQModel.from_pretrained(run).get_codebook()
    model = move_codes(run)
    publish.main([str(run), published, "--revision", "other", "--message", "Codes moved"])
    publish.main([str(run), published, "--create-pr"])
    assert repository.refs["main"] == main and repository.refs.keys() >= {"main", "other", "refs/pr/1"}
    first, other, proposed = (
        AutoModel.from_pretrained(published, revision=name) for name in ("main", "other", "refs/pr/1")
    )
    assert torch.equal(first.get_codebook(), codebook) and not torch.equal(codebook, model.get_codebook())
    assert torch.equal(other.get_codebook(), model.get_codebook())
    assert torch.equal(proposed.get_codebook(), model.get_codebook())


def test_commands_take_a_revision(hub, run, published, tmp_path, capsys):
    HfApi().create_tag(published, tag="v1")
    options = ["--dataset", "fashion_mnist_sample", "--max-images", "8", "--output-dir", str(tmp_path / "evaluation")]
    evaluate.main(["--model", published, "--model-revision", "v1", *options])
    assert json.loads((tmp_path / "evaluation" / "metrics.json").read_text())["model_revision"] == "v1"
    line = fails(evaluate, ["--model", published, "--model-revision", "v2", *options], capsys)
    assert f"{published} has no such revision on the Hub" in line


def test_shards_of_earlier_commits_go(hub, run, published):
    """A repository never has weights of two models."""
    shard = CommitOperationAdd("model-00001-of-00002.safetensors", b"old")
    index = CommitOperationAdd("model.safetensors.index.json", b"{}")
    own = CommitOperationAdd("notes.md", b"mine")
    HfApi().create_commit(published, [shard, index, own], commit_message="of old")
    publish.main([str(run), published])
    files = hub.repository(published).files()
    assert [name for name in files if ".safetensors" in name] == ["model.safetensors"]
    assert "notes.md" in files


def test_results_of_earlier_commits_go(hub, run, published):
    (run / "metrics.json").unlink()
    (run / "reconstructions.png").unlink()
    publish.main([str(run), published])
    files = hub.repository(published).files()
    assert "None were measured on these weights" in files["README.md"].decode()
    assert not {"metrics.json", "reconstructions.png", ".eval_results/optvq.yaml"} & files.keys()


def test_a_published_model_can_be_published_again(hub, published):
    """Its card is then of the new place."""
    publish.main([published, "alice/copy"])
    one, other = hub.repository(published).files(), hub.repository("alice/copy").files()
    assert one["model.safetensors"] == other["model.safetensors"] and one["metrics.json"] == other["metrics.json"]
    card = other["README.md"].decode()
    assert 'repo_id = "alice/copy"' in card and "# copy\n" in card and published not in card


def test_a_discriminator_goes_with_its_model_and_comes_back(hub, alice, run):
    discriminator = PatchDiscriminator(1, 8, 1)
    discriminator.save_pretrained(run / "discriminator")
    publish.main([str(run), "alice/adversarial"])
    for source in ("alice/adversarial", str(run), str(run / "discriminator")):
        arguments = ObjectiveArguments(adversarial_weight=1.0, discriminator_weights=source)
        again = make_objective(arguments, 1, torch.device("cpu")).discriminator.state_dict()
        assert all(torch.equal(again[name], tensor) for name, tensor in discriminator.state_dict().items())
    shutil.rmtree(run / "discriminator")
    publish.main([str(run), "alice/adversarial"])
    assert not [name for name in hub.repository("alice/adversarial").files() if name.startswith("discriminator")]


def test_only_known_pictures_go(hub, alice, run):
    (run / "passport.png").write_bytes(b"a picture")
    publish.main([str(run), "alice/pictures-of-the-run"])
    assert "passport.png" not in hub.repository("alice/pictures-of-the-run").files()


# ---- faults ----------------------------------------------------------------------------------------------------------


def in_hub(*values):
    return pytest.param(*values, marks=pytest.mark.hub)


@pytest.mark.parametrize(
    ("kind", "on"),
    [
        in_hub("500", "/api/repos/create"),
        in_hub("500", "/api/models/"),
        in_hub("500", "/preupload/"),
        ("500", "/commit/"),
        in_hub("429", "/commit/"),
        in_hub("429", "/info/lfs/"),
        in_hub("drop", "/commit/"),
        in_hub("drop", "lfs"),
        ("drop-after", "/commit/"),
    ],
)
def test_a_moments_failure_is_overcome(hub, alice, run, waits, kind, on):
    repo_id = f"alice/{token_hex(6)}"
    hub.fail(kind, on=on)
    publish.main([str(run), repo_id])
    assert (waits or kind == "drop-after") and not any(fault.times for fault in hub.faults)
    [_, commit] = hub.repository(repo_id).commits
    assert {"model.safetensors", "README.md", "config.json"} < commit.files.keys()
    AutoModel.from_pretrained(repo_id)


@pytest.mark.parametrize(
    ("kind", "on", "message"),
    [
        ("500", "/commit/", "the Hub answered 500"),
        in_hub("429", "/preupload/", "the Hub answered 429"),
        in_hub("drop", "/commit/", "cannot reach the Hub at http://127.0.0.1"),
        in_hub("drop", "lfs", "cannot reach the Hub at http://127.0.0.1"),
    ],
)
def test_a_lasting_failure_leaves_the_repository_as_it_was(hub, run, published, waits, capsys, kind, on, message):
    repository = hub.repository(published)
    before = (dict(repository.refs), repository.files())
    model = move_codes(run)
    hub.fail(kind, times=1000, on=on)
    assert message in fails(publish, [run, published], capsys)
    assert (dict(repository.refs), repository.files()) == before
    hub.faults.clear()
    publish.main([str(run), published])  # it can be repeated
    assert torch.equal(OptVQModel.from_pretrained(published).get_codebook(), model.get_codebook())


@pytest.mark.hub
def test_a_hub_that_says_nothing(hub, alice, run, waits, monkeypatch, capsys):
    monkeypatch.setattr(publishing_hub, "TIMEOUT", 0.2)
    hub.fail("stall", times=1000, on="/commit/")
    assert "cannot reach the Hub" in fails(publish, [run, "alice/silent"], capsys)
    assert len(hub.repository("alice/silent").commits) == 1
    get_session().timeout = None


def test_a_push_does_not_hold_up_a_run(hub, alice, run, tmp_path, monkeypatch, capsys):
    """A checkpoint that cannot be pushed is told, and no more; one that waits is pushed at the end."""
    checkpoint = tmp_path / "output" / "checkpoint-10"
    shutil.copytree(run, checkpoint, ignore=lambda *_: ["training_log.jsonl", "recipe.yaml", "metrics.json"])
    files = checksums(checkpoint)
    write_state(checkpoint, RunState(10, 30, [None], {}, [], {}, files=files))
    pusher = CheckpointPusher("alice/slow", private=False, output_dir=tmp_path / "output")
    hub.fail("stall", on="/commit/")
    pusher.push(checkpoint)
    later = shutil.copytree(checkpoint, tmp_path / "output" / "checkpoint-20")
    write_state(later, RunState(20, 30, [None], {}, [], {}, files=files))
    pusher.push(later)  # waits
    pusher.finish(patience=0.5)
    assert "the newest checkpoint is not on the Hub" in capsys.readouterr().out
    assert len(hub.repository("alice/slow").commits) == 1

    pusher = CheckpointPusher("alice/full", private=False, output_dir=tmp_path / "output")
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("not on this disk")))
        patch.setattr(shutil, "copy2", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
        pusher.push(checkpoint)
    assert "could not push checkpoint-10: No space left on device; training continues" in capsys.readouterr().out
    pusher.push(checkpoint)
    pusher.push(later)
    pusher.finish(patience=60)
    assert [commit.message for commit in hub.repository("alice/full").commits[1:]] == ["Checkpoint 10", "Checkpoint 20"]


def test_somebody_else_was_faster(hub, run, published, monkeypatch, capsys):
    preupload = HfApi.preupload_lfs_files

    def meanwhile(api, repo_id, additions, **options):
        preupload(api, repo_id, additions, **options)
        if len(additions) == 1:
            return
        monkeypatch.undo()
        monkeypatch.setenv("HF_TOKEN", hub.add_user("alice"))
        other = CommitOperationAdd("notes.md", b"theirs")
        api.create_commit(published, [other], commit_message="Faster")

    move_codes(run)
    monkeypatch.setattr(HfApi, "preupload_lfs_files", meanwhile)
    assert "in the meantime; nothing was committed" in fails(publish, [run, published], capsys)
    assert hub.repository(published).commits[-1].message == "Faster"
    hub.refused.clear()  # the commit on an old head


@pytest.mark.hub
def test_truncated_weights_are_never_loaded(hub, published, waits, tmp_path, monkeypatch, capsys):
    hub.fail("truncate", on="model.safetensors")
    whole = OptVQModel.from_pretrained(published, cache_dir=tmp_path / "one")  # the rest is asked for
    hub.fail("truncate", on="model.safetensors")
    hub.fail("500", times=1000, on="model.safetensors")
    with pytest.raises(OSError, match="model.safetensors"):
        OptVQModel.from_pretrained(published, cache_dir=tmp_path / "two")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "two"))
    line = fails(evaluate, ["--model", published, "--dataset", "fashion_mnist_sample"], capsys)
    assert f"cannot load '{published}': the Hub answered 500" in line
    assert not list((tmp_path / "two").rglob("snapshots/*/model.safetensors"))
    hub.faults.clear()
    again = OptVQModel.from_pretrained(published, cache_dir=tmp_path / "two")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in whole.state_dict().items())


def test_a_cut_off_file_of_the_cache_is_not_loaded(published, tmp_path, capsys):
    OptVQModel.from_pretrained(published)
    folder = Path(constants.HF_HUB_CACHE) / f"models--{published.replace('/', '--')}"
    [path] = folder.rglob("model.safetensors")
    whole = path.read_bytes()
    path.resolve().write_bytes(whole[: len(whole) // 2])
    line = fails(evaluate, ["--model", published, "--dataset", "fashion_mnist_sample"], capsys)
    assert f"cannot load model '{published}'" in line
