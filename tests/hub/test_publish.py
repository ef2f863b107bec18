"""`optvq publish` and loading from the Hub, when all is well and when it is not."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from secrets import token_hex
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, constants, get_session
from transformers import AutoModel

from hub.checks import contents, sent
from optvq_hf import OptVQConfig, OptVQModel
from optvq_hf.commands import convert, evaluate, publish, train
from optvq_hf.evaluation.results import weights_digest
from optvq_hf.publishing import hub as publishing_hub
from optvq_hf.publishing.checkpoints import CheckpointPusher
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


def move_codes(run) -> OptVQModel:
    """Changes the weights, and says in the results that they are of these."""
    model = OptVQModel.from_pretrained(run)
    with torch.no_grad():
        model.quantizer.embedding.weight.add_(1)
    model.save_pretrained(run)
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({**metrics, "weights_sha256": weights_digest(model)}))
    return model


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
    model = move_codes(run)
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


def test_only_known_pictures_go(hub, alice, run):
    (run / "passport.png").write_bytes(b"a picture")
    publish.main([str(run), "alice/pictures-of-the-run"])
    assert "passport.png" not in hub.repository("alice/pictures-of-the-run").files()


def test_the_licence_of_a_model_that_began_as_another(hub, alice, run):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "model": "/home/alice/secret/base"}))
    publish.main([str(run), "alice/tuned"])
    card = ModelCard(hub.repository("alice/tuned").files()["README.md"].decode())
    assert card.data.license is None and "Licence of the weights: not stated" in card.text
    assert "It began with the weights of `base`" in card.text and "secret" not in card.content
    publish.main([str(run), "alice/tuned", "--license", "mit"])
    assert "license: mit" in hub.repository("alice/tuned").files()["README.md"].decode()


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
            "the section Results of the model card has a row that no result on record makes: '| nearest | 0.0001",
        ),
        ("second row", "has a row that no result on record makes: '| sinkhorn | 0.0001"),
        ("results", "the card says psnr is"),
        ("no results", "the card says mse is"),
        ("no results nor metadata", "has a row that no result on record makes"),
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
    evaluate.main(["--model", str(run), *dataset])
    publish.main([str(run), "alice/other-weights"])
    card = hub.repository("alice/other-weights").files()["README.md"].decode()
    assert "24 images, split `test`" in card and "--max-images 24" in card


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.json", "[]", "metrics.json lacks assignment, batch_size"),
        ("recipe.yaml", "a: 1", "recipe.yaml lacks dataset, learning_rate, train_split"),
        ("training_summary.json", "{", "training_summary.json is broken"),
        ("README.md", "---\na: [\n---\n", "the metadata of"),
        ("config.json", "{", "cannot load model"),
    ],
)
def test_broken_records(alice, run, capsys, name, content, message):
    (run / name).write_text(content)
    assert message in fails(publish, [run, "alice/broken"], capsys)


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
    model = move_codes(run)
    hub.fail(kind, times=1000, on=on)
    assert message in fails(publish, [run, published], capsys)
    assert (dict(repository.refs), repository.files()) == before
    hub.faults.clear()
    publish.main([str(run), published])  # it can be repeated
    assert torch.equal(OptVQModel.from_pretrained(published).get_codebook(), model.get_codebook())


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
    pusher = CheckpointPusher("alice/slow", private=False, output_dir=tmp_path / "output")
    hub.fail("stall", on="/commit/")
    pusher.push(checkpoint)
    later = shutil.copytree(checkpoint, tmp_path / "output" / "checkpoint-20")
    (later / "training_state.json").write_text("{}")
    pusher.push(later)  # waits
    pusher.finish(patience=0.5)
    assert "the newest checkpoint is not on the Hub" in capsys.readouterr().out
    assert len(hub.repository("alice/slow").commits) == 1

    pusher = CheckpointPusher("alice/full", private=False, output_dir=tmp_path / "output")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", lambda *_, **__: (_ for _ in ()).throw(OSError("No space left on device")))
        pusher.push(checkpoint)
    assert "could not push checkpoint-10: No space left on device; training goes on" in capsys.readouterr().out
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


def test_a_run_knows_at_once_that_it_may_not_push(hub, published, tmp_path, capsys, bob_reads):
    with bob_reads:
        line = fails(train, flags(tmp_path / "new", push_to_hub=published), capsys)
    assert f"cannot push to {published}: your token may not do this" in line
    assert not (tmp_path / "new" / "training_log.jsonl").exists()


def test_missing_gated_and_wrong_kinds(hub, published, bob_reads, tmp_path, capsys):
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
    for missing in ("alice/none", "alice/pictures"):
        line = fails(convert, [missing, tmp_path / "converted"], capsys)
        assert f"cannot download {missing} from the Hub: " in line
        assert ("no model" if missing == "alice/none" else "is a dataset on the Hub") in line
    HfApi().create_repo("alice/gated")
    HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="alice/gated")
    hub.repository("alice/gated").gated = True
    with bob_reads:
        line = fails(evaluate, ["--model", "alice/gated", *dataset], capsys)
    assert f"alice/gated is gated: ask for access at {hub.url}/alice/gated" in line
    assert "its model type is None, not 'optvq'" in fails(evaluate, ["--model", "alice/gated", *dataset], capsys)


def test_names_that_are_none(run, capsys):
    for name in ("alice/a/b", "model"):
        for command, argv in ((publish, [str(run), name]), (train, flags(run, push_to_hub=name))):
            with pytest.raises(SystemExit) as ended:
                command.main(argv)
            assert ended.value.code == 2 and "must be a Hub id, NAMESPACE/NAME" in capsys.readouterr().err
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
