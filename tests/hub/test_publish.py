"""`optvq publish` and loading from the Hub, when all is well and when it is not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from secrets import token_hex
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, constants
from transformers import AutoModel

from hub.checks import contents, sent
from optvq_hf import OptVQConfig, OptVQModel
from optvq_hf.commands import evaluate, publish, train
from optvq_hf.publishing import hub as publishing_hub
from training.runs import flags


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run, with what `optvq train` leaves."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train.main(flags(folder, max_steps=5, save_every=0, ema_decay=0, eval_split="test[:40]"))
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy, to be changed."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def waits(backoff_waits, monkeypatch):
    monkeypatch.setattr(publishing_hub, "time", SimpleNamespace(sleep=backoff_waits.append))
    return backoff_waits


@pytest.fixture
def published(hub, alice, run):
    """A repository with the model, of a name of its own."""
    repo_id = f"alice/{token_hex(6)}"
    publish.main([str(run), repo_id])
    return repo_id


def fails(command, argv, capsys) -> str:
    """The one line that it says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        command.main([str(word) for word in argv])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 1 and ": error: " in line
    return line


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
    assert all(files[name] == here[name] for name in ("model.safetensors", "metrics.json", "recipe.yaml"))
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


@pytest.fixture
def bob_reads(hub):
    """Within it, bob is logged in."""
    patch = pytest.MonkeyPatch()

    class Login:
        def __enter__(self):
            patch.setenv("HF_TOKEN", hub.add_user("bob"))

        def __exit__(self, *_):
            patch.undo()

    return Login()


def test_branches_and_pull_requests(hub, run, published):
    repository = hub.repository(published)
    main = repository.refs["main"]
    with torch.no_grad():
        model = OptVQModel.from_pretrained(run)
        model.quantizer.embedding.weight.add_(1)
        model.save_pretrained(run)
    publish.main([str(run), published, "--revision", "other", "--message", "Codes moved"])
    publish.main([str(run), published, "--create-pr"])
    assert repository.refs["main"] == main and repository.refs.keys() >= {"main", "other", "refs/pr/1"}
    first, other, proposed = (
        AutoModel.from_pretrained(published, revision=name) for name in ("main", "other", "refs/pr/1")
    )
    assert torch.equal(first.get_codebook() + 0, OptVQModel.from_pretrained(published).get_codebook())
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
    assert [name for name in files if name.startswith("model")] == ["model.safetensors", "modeling_optvq.py"]
    assert "notes.md" in files


def test_a_published_model_can_be_published_again(hub, published):
    publish.main([published, "alice/copy"])
    one, other = hub.repository(published).files(), hub.repository("alice/copy").files()
    assert one["model.safetensors"] == other["model.safetensors"] and one["metrics.json"] == other["metrics.json"]


def test_push_to_hub_of_the_model_alone(hub, alice, run):
    OptVQModel.from_pretrained(run).push_to_hub("alice/alone")
    assert torch.equal(
        AutoModel.from_pretrained("alice/alone").get_codebook(), OptVQModel.from_pretrained(run).get_codebook()
    )
    assert {"modeling_optvq.py", "config.json", "model.safetensors"} < hub.repository("alice/alone").files().keys()


# ---- the card tells the truth ----------------------------------------------------------------------------------------


def test_a_card_of_ones_own_is_kept(hub, alice, run):
    publish.main([str(run), "alice/own", "--card-only", "--license", "cc-by-4.0"])
    path = run / "README.md"
    path.write_text(path.read_text().replace("## Limits and biases", "My notes.\n\n## Limits and biases"))
    publish.main([str(run), "alice/own"])
    card = hub.repository("alice/own").files()["README.md"].decode()
    assert "My notes." in card and "license: cc-by-4.0" in card


@pytest.mark.parametrize("place", ["metadata", "table", "results"])
def test_wrong_numbers_are_refused(hub, alice, run, capsys, place):
    publish.main([str(run), "alice/wrong", "--card-only"])
    path, metrics = run / "README.md", json.loads((run / "metrics.json").read_text())
    if place == "metadata":
        path.write_text(path.read_text().replace(str(metrics["mse"]), "0.0001"))
        message = f"the model card's metadata says mse is 0.0001, metrics.json {metrics['mse']}"
    elif place == "table":
        path.write_text(path.read_text().replace(f"| nearest | {metrics['mse']:.4f} |", "| nearest | 0.0001 |"))
        message = "the model card lacks the row '| nearest | "
    else:
        metrics["psnr"] = 40.0
        (run / "metrics.json").write_text(json.dumps(metrics))
        message = "metadata says psnr is"
    assert message in fails(publish, [run, "alice/wrong"], capsys)
    (run / "metrics.json").unlink()
    assert "metrics.json nothing" in fails(publish, [run, "alice/wrong"], capsys)
    assert ("model", "alice/wrong") not in hub.repositories


def test_results_of_a_hub_dataset_are_in_both_forms(hub, alice, run):
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({**metrics, "dataset": "ylecun/mnist"}))
    publish.main([str(run), "alice/both"])
    files = hub.repository("alice/both").files()
    entries = yaml.safe_load(files[".eval_results/optvq.yaml"])
    assert {entry["dataset"]["task_id"]: entry["value"] for entry in entries}["reconstruction_mse"] == metrics["mse"]
    assert {entry["dataset"]["id"] for entry in entries} == {"ylecun/mnist"}
    results = {result.metric_type: result for result in ModelCard(files["README.md"].decode()).data.eval_results}
    assert results["mse"].metric_value == metrics["mse"] and results["mse"].dataset_type == "ylecun/mnist"


# ---- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "on"),
    [
        ("500", "/api/repos/create"),
        ("500", "/api/models/"),
        ("500", "/preupload/"),
        ("500", "/commit/"),
        ("429", "/commit/"),
        ("429", "/info/lfs/"),
        ("drop", "/commit/"),
        ("drop", "lfs"),
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
        ("429", "/preupload/", "the Hub answered 429"),
        ("drop", "/commit/", "cannot reach the Hub at http://127.0.0.1"),
        ("drop", "lfs", "cannot reach the Hub at http://127.0.0.1"),
    ],
)
def test_a_lasting_failure_leaves_the_repository_as_it_was(hub, run, published, waits, capsys, kind, on, message):
    repository = hub.repository(published)
    before = (dict(repository.refs), repository.files())
    model = OptVQModel.from_pretrained(run)
    with torch.no_grad():
        model.quantizer.embedding.weight.add_(1)
    model.save_pretrained(run)
    hub.fail(kind, times=1000, on=on)
    assert message in fails(publish, [run, published], capsys)
    assert (dict(repository.refs), repository.files()) == before
    hub.faults.clear()
    publish.main([str(run), published])  # it can be repeated
    assert torch.equal(OptVQModel.from_pretrained(published).get_codebook(), model.get_codebook())


def test_somebody_else_was_faster(hub, run, published, monkeypatch, capsys):
    preupload = HfApi.preupload_lfs_files

    def meanwhile(api, *arguments, **options):
        preupload(api, *arguments, **options)
        monkeypatch.undo()
        monkeypatch.setenv("HF_TOKEN", hub.add_user("alice"))
        other = CommitOperationAdd("notes.md", b"theirs")
        api.create_commit(published, [other], commit_message="Faster")

    (run / "more.png").write_bytes(b"a picture")
    monkeypatch.setattr(HfApi, "preupload_lfs_files", meanwhile)
    assert "was changed by somebody else meanwhile; nothing was committed" in fails(publish, [run, published], capsys)
    assert hub.repository(published).commits[-1].message == "Faster"
    hub.refused.clear()  # the commit on an old head


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


# ---- who may do what -------------------------------------------------------------------------------------------------


def test_tokens(hub, alice, run, monkeypatch, capsys):
    assert "your token may not do this to bob/model" in fails(publish, [run, "bob/model"], capsys)
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    assert "the Hub wants a token that it knows: log in" in fails(publish, [run, "alice/model"], capsys)
    monkeypatch.delenv("HF_TOKEN")
    assert "the Hub wants a token that it knows: log in" in fails(publish, [run, "alice/model"], capsys)
    monkeypatch.setenv("HF_TOKEN", hub.add_user("carol", write=False))
    assert "needs write access" in fails(publish, [run, "carol/model"], capsys)
    assert not {key for key in hub.repositories if key[1] in ("bob/model", "alice/model", "carol/model")}


def test_missing_gated_and_wrong_kinds(hub, published, bob_reads, capsys):
    dataset = ["--dataset", "fashion_mnist_sample"]
    assert "there is no model alice/none on the Hub" in fails(evaluate, ["--model", "alice/none", *dataset], capsys)
    line = fails(evaluate, ["--model", "no/such/folder", *dataset], capsys)
    assert "no/such/folder is neither a folder that exists, nor a Hub id" in line
    HfApi().create_repo("alice/pictures", repo_type="dataset")
    line = fails(evaluate, ["--model", "alice/pictures", *dataset], capsys)
    assert "alice/pictures is a dataset on the Hub, not a model" in line
    line = fails(evaluate, ["--model", published, "--dataset", published], capsys)
    assert f"{published} is a model on the Hub, not a dataset" in line
    line = fails(evaluate, ["--model", published, "--dataset", "alice/none"], capsys)
    assert "there is no dataset alice/none on the Hub" in line
    HfApi().create_repo("alice/gated")
    HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="alice/gated")
    hub.repository("alice/gated").gated = True
    with bob_reads:
        line = fails(evaluate, ["--model", "alice/gated", *dataset], capsys)
    assert f"alice/gated is gated: ask for access at {hub.url}/alice/gated" in line
    assert "its model type is None, not 'optvq'" in fails(evaluate, ["--model", "alice/gated", *dataset], capsys)


def test_names_that_are_none(run, capsys):
    with pytest.raises(SystemExit) as ended:
        publish.main([str(run), "alice/a/b"])
    assert ended.value.code == 2 and "REPO must be a Hub id" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        publish.main([str(run), "alice/a", "--create-pr", "--revision", "x"])
    assert ended.value.code == 2 and "leave out --revision" in capsys.readouterr().err


def test_offline(hub, published, tmp_path):
    """What is in the cache is used; the rest has a clear line."""
    dataset = ["--dataset", "fashion_mnist_sample", "--max-images", "8", "--output-dir", str(tmp_path)]
    evaluate.main(["--model", published, *dataset])
    assert OptVQConfig.from_pretrained(published, local_files_only=True).image_size == 16
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "optvq_hf.commands.evaluate", *dataset, "--model"]
    for model, says in ((published, None), ("alice/none", "alice/none is not in the cache, and HF_HUB_OFFLINE=1")):
        done = subprocess.run([*command, model], env=environment, capture_output=True, text=True, check=False)
        if says is None:
            assert done.returncode == 0, done.stderr
        else:
            assert done.returncode == 1 and says in done.stderr.splitlines()[-1], done.stderr
