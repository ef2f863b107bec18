"""Folders that cannot be written to are found before the work; results are printed first, and not replaced by lesser ones."""

import json
import shutil

import pytest

from optvq_hf.commands.cli import main
from optvq_hf.commands.evaluate import default_folder
from optvq_hf.commands.folders import check_writable
from optvq_hf.evaluation.arguments import EvaluationArguments


DATA = ["--dataset", "fashion_mnist_sample", "--eval-split", "test[:16]"]


def fails(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in argv])
    assert stopped.value.code == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    return line


@pytest.fixture
def model(trained_folder, tmp_path):
    shutil.copytree(trained_folder, tmp_path / "model")
    for name in ("metrics.json", "reconstructions.png", "examples.png", "codebook_usage.png"):
        (tmp_path / "model" / name).unlink()
    return tmp_path / "model"


def test_check_writable_leaves_nothing(tmp_path):
    check_writable(tmp_path)
    check_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "b"):
        with pytest.raises(OSError, match=f"cannot write to {folder}: {tmp_path / 'file'} is not a folder"):
            check_writable(folder)


def test_a_full_disk_is_found_before_the_work(tmp_path, monkeypatch):
    def full(**options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("optvq_hf.commands.folders.TemporaryFile", full)
    with pytest.raises(OSError, match=f"cannot write to {tmp_path}: No space left on device"):
        check_writable(tmp_path)


def test_every_command_checks_its_folder_first(model, monkeypatch, capsys):
    """/proc is no place for files, for root neither."""
    nowhere = "/proc/nowhere"
    monkeypatch.setattr("optvq_hf.evaluation.evaluator.evaluate_model", None)  # no work is begun
    monkeypatch.setattr("optvq_hf.publishing.reference_files.read_reference", None)
    monkeypatch.setattr("optvq_hf.training.preparation.make_run", None)
    monkeypatch.setattr("optvq_hf.publishing.model_card.make_card", None)
    commands = (
        ["evaluate", "--model", model, *DATA, "--output-dir", nowhere],
        ["convert", "any/source", nowhere],
        [
            "train",
            *DATA,
            "--backbone",
            "plain_cnn",
            "--num-channels",
            "1",
            "--output-dir",
            nowhere,
            "--report-to",
            "none",
        ],
    )
    for command in commands:
        assert f"cannot write to {nowhere}: " in fails(capsys, *command)
    refused = "optvq_hf.commands.publish.check_writable"
    monkeypatch.setattr(refused, lambda folder: (_ for _ in ()).throw(OSError(f"cannot write to {folder}: it is full")))
    assert f"cannot write to {model}: " in fails(capsys, "publish", model, "me/model", "--card-only")


def test_a_result_is_printed_before_it_is_written(model, monkeypatch, capsys):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("optvq_hf.evaluation.report.save_reconstructions", full)
    with pytest.raises(SystemExit):
        main(["evaluate", "--model", str(model), *DATA])
    shown = capsys.readouterr()
    assert "PSNR dB" in shown.out and "nearest    |" in shown.out and "No space left" in shown.err
    assert not (model / "metrics.json").exists()


def test_a_lesser_result_does_not_replace_a_fuller_one(model, capsys):
    evaluate = ["evaluate", "--model", str(model), "--dataset", "fashion_mnist_sample"]
    main([*evaluate, "--eval-split", "test[:16]", "--assignment", "nearest", "sinkhorn"])
    whole = (model / "metrics.json").read_bytes()
    before = (
        "metrics.json has 16 images of fashion_mnist_sample, split test[:16] (nearest, sinkhorn); the new result would"
    )
    advice = "pass --overwrite to replace it, or another --output-dir"
    both = ["--assignment", "nearest", "sinkhorn"]
    for flags, new in (
        (
            ["--eval-split", "test[:16]", *both, "--max-images", "8"],
            "8 images of fashion_mnist_sample, split test[:16]",
        ),
        (["--eval-split", "test[:16]"], "16 images of fashion_mnist_sample, split test[:16] (nearest)"),
        (["--eval-split", "train[:16]", *both], "16 images of fashion_mnist_sample, split train[:16]"),
    ):
        line = fails(capsys, *evaluate, *flags)
        assert before in line and new in line and advice in line
        assert (model / "metrics.json").read_bytes() == whole
    main([*evaluate, "--eval-split", "test[:16]", "--assignment", "nearest", "sinkhorn", "potentials"])  # it says more
    assert len(json.loads((model / "metrics.json").read_text())["by_assignment"]) == 3
    main([*evaluate, "--eval-split", "test[:16]", "--max-images", "8", "--overwrite"])
    assert json.loads((model / "metrics.json").read_text())["num_images"] == 8
    main([*evaluate, "--eval-split", "test[:16]", "--max-images", "16"])


def test_a_result_of_other_weights_is_not_replaced(model, tmp_path, capsys):
    """Nor are its pictures; not in the model's own folder, nor in another."""
    others = json.dumps({"weights_sha256": "0" * 64, "num_images": 8, "by_assignment": {}})
    for folder in (model, tmp_path / "other"):
        folder.mkdir(exist_ok=True)
        (folder / "metrics.json").write_text(others)
        (folder / "reconstructions.png").write_text("of other weights")
        evaluate = ["evaluate", "--model", model, *DATA, "--output-dir", folder]
        line = fails(capsys, *evaluate)
        assert f"{folder / 'metrics.json'} is the result of other weights than those of {model}" in line
        assert "pass --overwrite to replace it and its pictures, or another --output-dir" in line
        assert (folder / "metrics.json").read_text() == others
        assert (folder / "reconstructions.png").read_text() == "of other weights"
        main([str(word) for word in (*evaluate, "--overwrite")])
        assert json.loads((folder / "metrics.json").read_text())["num_images"] == 16


def test_results_of_hub_models_have_folders_of_their_own(tmp_path):
    names = {
        ("me/optvq", None): "runs/me--optvq",
        ("you/optvq", None): "runs/you--optvq",
        ("me/optvq", "refs/pr/1"): "runs/me--optvq--refs--pr--1",
        (str(tmp_path), "main"): str(tmp_path),
    }
    for (model, revision), folder in names.items():
        assert str(default_folder(EvaluationArguments(model=[model], model_revision=revision))) == folder


def test_a_broken_earlier_result_is_replaced(model):
    for text in ("[1", "[]"):
        (model / "metrics.json").write_text(text)
        main(["evaluate", "--model", str(model), *DATA, "--max-images", "8"])
        assert json.loads((model / "metrics.json").read_text())["num_images"] == 8
