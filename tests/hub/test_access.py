"""Who may do what, and what is said when they may not, or when something is not there."""

import os
import subprocess
import sys

import pytest
from huggingface_hub import HfApi

from hub.checks import fails
from optvq_hf import OptVQConfig, OptVQModel
from optvq_hf.commands import convert, evaluate, publish, train
from training.runs import flags


def test_tokens(hub, alice, run, monkeypatch, capsys):
    assert "your token may not do this to bob/model" in fails(publish, [run, "bob/model"], capsys)
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    assert "the Hub needs a valid token: log in" in fails(publish, [run, "alice/model"], capsys)
    monkeypatch.delenv("HF_TOKEN")
    assert "the Hub needs a valid token: log in" in fails(publish, [run, "alice/model"], capsys)
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
    assert ended.value.code == 2 and "drop --revision" in capsys.readouterr().err


@pytest.mark.hub
def test_offline(hub, published, tmp_path):
    """What is in the cache is used; the rest has a clear line."""
    dataset = ["--dataset", "fashion_mnist_sample", "--max-images", "8", "--output-dir", str(tmp_path)]
    evaluate.main(["--model", published, *dataset])
    assert OptVQConfig.from_pretrained(published, local_files_only=True).image_size == 16
    assert OptVQModel.from_pretrained(published, local_files_only=True).config.image_size == 16
    with pytest.raises(OSError, match="cache"):
        OptVQModel.from_pretrained("alice/never-seen", local_files_only=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "optvq_hf.commands.evaluate", *dataset, "--model"]
    for model, says in ((published, None), ("alice/none", "alice/none is not in the cache, and HF_HUB_OFFLINE=1")):
        done = subprocess.run([*command, model], env=environment, capture_output=True, text=True, check=False)
        if says is None:
            assert done.returncode == 0, done.stderr
        else:
            assert done.returncode == 1 and says in done.stderr.splitlines()[-1], done.stderr
