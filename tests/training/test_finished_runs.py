"""A finished run is completed where something is missing, and never overwritten unless that is asked for."""

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from folders import contents
from optvq_hf.commands.train import how_to_resume, main
from optvq_hf.data.order import RowOrder, StreamOrder
from optvq_hf.publishing import checkpoint_pusher
from optvq_hf.training import results
from optvq_hf.training.results import WHOLE, place_result
from optvq_hf.training.run_folder import RunFolder
from training.runs import finish, flags, kill, read_log, remove_result, start, weights


RUN = {"max_steps": 6, "eval_images": 0, "save_every": 0, "discriminator_start": 3}


def run(output_dir, **settings):
    main(flags(output_dir, **{**RUN, **settings}))


def fails(output_dir, capsys, **settings):
    with pytest.raises(SystemExit) as stopped:
        run(output_dir, **settings)
    assert stopped.value.code in (1, 2)
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    return line


def test_a_second_run_does_not_overwrite_a_finished_one(tmp_path, capsys):
    run(tmp_path)
    before = contents(tmp_path)
    assert "holds the model of an earlier run; pass --overwrite to remove that run, or another" in fails(
        tmp_path, capsys
    )
    (tmp_path / "training_summary.json").rename(tmp_path / "kept")
    assert "holds the model of an earlier run" in fails(
        tmp_path, capsys, resume="auto"
    )  # it is not known how far it is
    (tmp_path / "kept").rename(tmp_path / "training_summary.json")
    assert contents(tmp_path) == before


def test_overwriting_leaves_nothing_of_the_old_run(tmp_path, capsys):
    run(tmp_path, max_steps=9, save_every=3, eval_images=8, images_every=2, report_to="tensorboard", keep_checkpoints=9)
    (tmp_path / "checkpoint-3").rename(tmp_path / "abandoned-checkpoint-3")
    (tmp_path / "notes.txt").write_text("not of the run")
    (tmp_path / "images" / "mine.png").write_text("not of the run")
    run(tmp_path, max_steps=4, ema_decay=0, overwrite=True)
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {name for name in names if not name.endswith(".py")} == {
        *(
            "notes.txt",
            "images/mine.png",
            "config.json",
            "preprocessor_config.json",
            "model.safetensors",
            "recipe.yaml",
        ),
        *("training_log.jsonl", "training_summary.json", "training_curves.png"),
        *("metrics.json", "reconstructions.png", "examples.png", "codebook_usage.png"),
    }
    assert [entry["step"] for entry in read_log(tmp_path)] == [1, 2, 3, 4]
    assert "overwrite: false" in (tmp_path / "recipe.yaml").read_text()  # running the recipe again does not overwrite


def test_all_that_a_run_writes_is_known(tmp_path):
    """So that nothing of it remains, whatever is added."""
    run(tmp_path / "run", max_steps=6, save_every=3, eval_images=8, images_every=2, report_to="tensorboard")
    RunFolder(tmp_path / "run").remove_run(with_checkpoints=True)
    assert not list((tmp_path / "run").iterdir())


def test_resuming_a_finished_run_does_what_is_missing(tmp_path, capsys):
    run(tmp_path)
    before = contents(tmp_path)
    capsys.readouterr()
    run(tmp_path, resume="auto")
    shown = capsys.readouterr().out
    assert f"resuming the finished run of 6 steps in {tmp_path}: only what is missing is done" in shown
    assert f"evaluated  {tmp_path} already" in shown and "PSNR" not in shown
    assert contents(tmp_path) == before
    (tmp_path / "ema" / "metrics.json").unlink()
    run(tmp_path, resume="auto")
    assert capsys.readouterr().out.count("PSNR dB") == 1
    after = contents(tmp_path)
    assert after == before


def test_settings_of_a_finished_run_are_compared(tmp_path, capsys):
    run(tmp_path)
    assert "weight_decay 0.05 -> 0.1" in fails(tmp_path, capsys, resume="auto", weight_decay=0.1)
    assert "has 6 steps already, more than the 5 asked for" in fails(tmp_path, capsys, resume="auto", max_steps=5)
    assert "has no checkpoint to extend it from" in fails(tmp_path, capsys, resume="auto", max_steps=8)


def test_a_partial_evaluation_is_replaced_by_the_whole(tmp_path):
    from optvq_hf.commands.evaluate import main as evaluate

    run(tmp_path)
    (tmp_path / "metrics.json").unlink()
    evaluate(
        [
            "--model",
            str(tmp_path),
            "--dataset",
            "fashion_mnist_sample",
            "--eval-split",
            "test[:16]",
            "--max-images",
            "8",
        ]
    )
    run(tmp_path, resume="auto")
    assert json.loads((tmp_path / "metrics.json").read_text())["num_images"] == 16


@pytest.mark.parametrize("moved", range(6))
def test_killed_while_the_result_is_moved(tmp_path, monkeypatch, moved):
    """Whatever has been moved: the next start has the whole result, and the models are those that were saved."""
    run(tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(results, "place_result", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            run(tmp_path / "killed")
    files = sorted((tmp_path / "killed" / WHOLE).rglob("*.*"))
    for path in files[:moved]:
        target = tmp_path / "killed" / path.relative_to(tmp_path / "killed" / WHOLE)
        target.parent.mkdir(exist_ok=True)
        path.replace(target)
    assert RunFolder(tmp_path / "killed").finished_steps is None
    place_result(tmp_path / "killed")
    assert RunFolder(tmp_path / "killed").finished_steps == 6 and not (tmp_path / "killed" / WHOLE).exists()
    expected, actual = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_a_result_that_is_not_whole_does_not_count(tmp_path, monkeypatch):
    """Killed while the models are written: the run resumes from its checkpoint."""
    run(tmp_path, save_every=4)
    remove_result(tmp_path)
    (tmp_path / ".result.unfinished").mkdir()
    (tmp_path / ".result.unfinished" / "model.safetensors").write_bytes(b"half of it")
    run(tmp_path, save_every=4, resume="auto")
    assert RunFolder(tmp_path).finished_steps == 6 and not list(tmp_path.glob(".result*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_in_the_final_evaluation(tmp_path, monkeypatch, capsys, number):
    from optvq_hf.commands import train

    def evaluate(*arguments):
        os.kill(os.getpid(), number)
        time.sleep(5)

    with monkeypatch.context() as patched:
        patched.setattr(train, "evaluate_and_report", evaluate)
        with pytest.raises(SystemExit) as stopped:
            run(tmp_path)
    shown = capsys.readouterr()
    assert stopped.value.code == 130 and "optvq train: interrupted" in shown.err
    assert f"do what is missing with: optvq train --config {tmp_path / 'recipe.yaml'} --resume auto" in shown.out
    saved = load_file(tmp_path / "model.safetensors")
    main(["--config", str(tmp_path / "recipe.yaml"), "--resume", "auto"])
    assert json.loads((tmp_path / "metrics.json").read_text())["num_images"] == 16
    after = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], after[name]) for name in saved)


def test_an_error_in_the_final_evaluation(tmp_path, capsys):
    """It does not cost the run, and the command that does the rest is said. Broken images at the beginning are no error."""
    (tmp_path / "images" / "test").mkdir(parents=True)
    for number in range(120):
        Image.new("L", (16, 16), number).save(tmp_path / "images" / "test" / f"{number:03}.png")
    for number in (*range(8), *range(100, 105)):  # 8 of the first 16, 13 of all 120
        (tmp_path / "images" / "test" / f"{number:03}.png").write_bytes(b"no picture")
    shutil.copytree(tmp_path / "images" / "test", tmp_path / "images" / "train")
    settings = {"dataset": tmp_path / "images", "eval_split": "test", "max_unreadable": 0.107, "eval_images": 16}
    settings |= {"train_split": "train[8:88]", "save_every": 4}
    with pytest.raises(SystemExit):
        run(tmp_path / "run", **settings)
    shown = capsys.readouterr()
    assert "13 of 112 images cannot be read, --max-unreadable is 0.107" in shown.err
    command = f"optvq train --config {tmp_path / 'run' / 'recipe.yaml'} --resume auto"
    assert f"the run is finished; do what is missing with: {command}" in shown.out
    assert RunFolder(tmp_path / "run").finished_steps == 6
    main([*command.split()[2:], "--max-unreadable", "0.2"])
    shown = capsys.readouterr().out
    assert "only what is missing is done" in shown and "unreadable 13 of 120 images" in shown


def kill_in_evaluation(folder, how, after, **settings):
    """Starts a run, or resumes a finished one, and kills it some seconds after its last step."""
    process = start(folder, **settings, resume="auto")
    assert process.stdout is not None
    for line in process.stdout:
        if "resuming the finished run" in line:
            break
        if line.startswith("training "):
            log = folder / "training_log.jsonl"
            while not log.is_file() or len(log.read_text().splitlines()) < settings["max_steps"]:
                time.sleep(0.005)
            break
    time.sleep(after)
    kill(process, how)
    process.communicate()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_kills_in_the_final_evaluation(tmp_path, monkeypatch):
    """SIGKILL and SIGTERM from the last step on, four times, or with OPTVQ_KILLS=5 twenty: the same command finishes the run.

    Its weights are those of one left alone.
    """
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    settings = {"max_steps": 10, "save_every": 4, "eval_split": "test", "eval_images": 16}
    finish(start(tmp_path / "whole", **settings))
    expected, generator = weights(tmp_path / "whole"), random.Random(0)
    for folder in (tmp_path / str(number) for number in range(int(os.environ.get("OPTVQ_KILLS", "1")))):
        for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            for path in folder.rglob("metrics.json"):
                path.unlink()
            kill_in_evaluation(folder, how, generator.uniform(0, 1), **settings)
        finish(start(folder, **settings, resume="auto"))
        for name in ("metrics.json", "ema/metrics.json"):
            assert json.loads((folder / name).read_text())["num_images"] == 1000
        actual = weights(folder)
        assert all(torch.equal(expected[name], actual[name]) for name in expected)
        assert [entry["step"] for entry in read_log(folder)] == list(range(1, 11))


def test_a_shorter_run_does_not_replace_a_longer_one(tmp_path, capsys):
    """However its length is given, and whatever it resumes."""
    epochs = {"train_split": "train[:16]", "eval_images": 0, "save_every": 3, "keep_checkpoints": 9}
    words = flags(tmp_path, **{**RUN, **epochs})
    at = words.index("--max-steps")
    del words[at : at + 2]
    main([*words, "--num-epochs", "4"])  # 8 steps
    before = contents(tmp_path)
    checkpoint = str(tmp_path / "checkpoint-3")
    for resume, length, steps in (
        ("auto", ["--num-epochs", "3"], 6),
        ("auto", ["--max-steps", "7"], 7),
        (checkpoint, ["--max-steps", "7"], 7),
        (checkpoint, ["--num-epochs", "2"], 4),
    ):
        with pytest.raises(SystemExit):
            main([*words, *length, "--resume", resume])
        assert f"has 8 steps already, more than the {steps} asked for" in capsys.readouterr().err
        assert contents(tmp_path) == before


def test_nothing_is_removed_before_everything_is_checked(tmp_path, monkeypatch, capsys):
    """A Hub out of reach, data and models that cannot be read, and too little memory."""
    run(tmp_path / "run", eval_images=0)
    (tmp_path / "images" / "train").mkdir(parents=True)
    (tmp_path / "images" / "test").mkdir()
    for number in range(16):
        (tmp_path / "images" / "train" / f"{number}.png").write_bytes(b"no picture")
        Image.new("L", (16, 16), number).save(tmp_path / "images" / "test" / f"{number}.png")
    before = contents(tmp_path / "run")
    monkeypatch.setattr(checkpoint_pusher, "make_repository", lambda *_: (_ for _ in ()).throw(OSError("no network")))
    for settings, message in (
        ({"push_to_hub": "me/model"}, "cannot push to me/model: no network"),
        ({"dataset": tmp_path / "images", "eval_split": "test", "num_channels": 3}, "16 of 16 images cannot be read"),
        ({"dataset": tmp_path / "nowhere"}, "nowhere"),
        ({"model": tmp_path / "images"}, "cannot load model"),
        ({"batch_size": 1000, "image_size": 4096}, "activations .* are free on cpu"),
    ):
        assert re.search(message, fails(tmp_path / "run", capsys, overwrite=True, **settings)), message
        assert contents(tmp_path / "run") == before


def test_overwriting_removes_only_what_a_run_wrote(tmp_path):
    ours = Path(results.__file__).parents[1] / "distances.py"
    mine = (
        "distances.py",
        "notes.py",
        "parsing.py",
        "model_of_mine.safetensors",
        "checkpoint-notes/file",
        "images/a.png",
    )
    for name in mine:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    of_run = ("sinkhorn.py", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "checkpoint-4/file")
    for name in of_run:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(ours.with_name("sinkhorn.py").read_bytes())
    folder = RunFolder(tmp_path)
    with pytest.raises(ValueError, match="holds the model of an earlier run"):  # in shards
        folder.check_new_run()
    folder.remove_run(with_checkpoints=True)
    assert contents(tmp_path).keys() == set(mine)
    (tmp_path / "config.json").write_text('{"model_type": "optvq"}')
    folder.remove_run(with_checkpoints=True)  # code beside our model is an earlier version of ours
    assert contents(tmp_path).keys() == {*mine} - {"distances.py"}


def test_the_number_of_processes_matters_for_streams_alone():
    command = "optvq train --config run/recipe.yaml --resume auto"
    for kind, said in ((RowOrder, command), (StreamOrder, f"{command} (with the same number of processes)")):
        batches = SimpleNamespace(order=kind.__new__(kind))
        stopped = SimpleNamespace(output_dir=Path("run"), batches=batches, accelerator=SimpleNamespace(num_processes=2))
        assert how_to_resume(stopped) == said
