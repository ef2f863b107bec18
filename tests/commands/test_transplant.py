"""`optvq transplant`: three commands in a row, which resume where they were stopped."""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from builders import make_untrained, plain_config
from optvq_hf.commands import train, transplant
from optvq_hf.commands.parser import RECIPES
from optvq_hf.training.models import make_image_processor


DATA = ["--dataset", "fashion_mnist_sample", "--train-split", "train[:64]", "--eval-split", "test[:8]"]
SHORT = {"batch_size": 8, "report_to": "none", "images_every": 0, "log_every": 1, "eval_images": 0, "save_every": 2}


@pytest.fixture
def source(tmp_path):
    config = plain_config(
        image_size=16, num_channels=1, codebook_size=16, codebook_dim=4, use_codebook_projection=False
    )
    make_untrained(config).save_pretrained(tmp_path / "model")
    make_image_processor(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def words(source, tmp_path):
    """words(out, **settings of the second stage): a short transplant by the shipped recipes."""

    def make(out, **of_decoder):
        names = {"quantizer": {"max_steps": 4, "codebook_start_batches": 3}, "decoder": {"max_steps": 4, **of_decoder}}
        flags = []
        for name, settings in names.items():
            recipe = yaml.load(RECIPES[f"transplant_{name}"].read_text(), yaml.BaseLoader) | SHORT | settings
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
            flags += [f"--{name}-config", str(tmp_path / f"{name}.yaml")]
        return ["--model", str(source), *DATA, *flags, "--output-dir", str(out)]

    return make


@pytest.fixture
def in_this_process(monkeypatch):
    """Stages run here, which saves the start of three processes; how many were run."""
    from fixtures.runs import forget_accelerator
    from optvq_hf.commands.cli import main

    stages = []

    def run(argv):
        stages.append(argv[0])
        try:
            main(argv)
        except SystemExit as error:
            return int(error.code or 0)
        finally:
            forget_accelerator()
        return 0

    monkeypatch.setattr(transplant, "run_stage", run)
    return stages


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_the_whole_transplant_and_again(words, source, tmp_path, in_this_process, fresh_run, monkeypatch, capsys):
    out = tmp_path / "out"
    transplant.main(words(out))
    first, quantizer, decoder = weights(source), weights(out / "quantizer"), weights(out / "decoder")
    for name in first:
        changes = [not torch.equal(one[name], other[name]) for one, other in ((first, quantizer), (quantizer, decoder))]
        assert changes[0] == name.startswith(("quantizer.", "quant_conv.", "post_quant_conv.")), name
        assert changes[1] == name.startswith(("decoder.", "post_quant_conv.")), name
    assert f"transplant {out / 'decoder'}  (load it" in capsys.readouterr().out
    transplant.main(words(out))
    assert in_this_process == ["tokenize", "train", "train"] * 2
    shown = capsys.readouterr().out
    assert "1 finished shards are as they were written" in shown and shown.count("only what is missing is done") == 2
    assert all(torch.equal(tensor, decoder[name]) for name, tensor in weights(out / "decoder").items())

    def stopped_before_the_quantizer(argv):
        if argv[0] == "train":
            raise KeyboardInterrupt
        return 0

    longer = words(out)
    recipe = tmp_path / "quantizer.yaml"
    recipe.write_text(recipe.read_text().replace("max_steps: 4", "max_steps: 5"))
    with pytest.raises(SystemExit) as error:
        transplant.main(longer)
    line = capsys.readouterr().err
    assert error.value.code == 1 and f"is not recorded as one from the model that is in {out / 'quantizer'} now" in line
    assert "pass --overwrite" in line and in_this_process[6:] == ["tokenize", "train"]
    (out / "decoder" / "notes.txt").write_text("of the user")
    again = [*words(out), "--overwrite"]
    for flag in ("--model", "--decoder-config"):
        with pytest.raises(SystemExit) as error:
            transplant.main([*again, flag, str(out / "decoder" / ("" if flag == "--model" else "recipe.yaml"))])
        assert error.value.code == 1 and f"which {flag} names" in capsys.readouterr().err
    assert (out / "decoder" / "model.safetensors").is_file()
    monkeypatch.setattr(transplant, "run_stage", stopped_before_the_quantizer)
    with pytest.raises(SystemExit):
        transplant.main(again)
    assert [path.name for name in ("quantizer", "decoder") for path in (out / name).iterdir()] == ["notes.txt"]


def test_a_failed_stage_ends_it(words, tmp_path, in_this_process, fresh_run, capsys):
    with pytest.raises(SystemExit) as error:
        transplant.main(words(tmp_path / "out", freeze_decoder="true"))
    assert error.value.code == 1 and in_this_process == ["tokenize", "train", "train"]
    assert "nothing is left to train" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        transplant.main([*words(tmp_path / "out"), "--flips"])
    assert error.value.code == 1 and in_this_process[3:] == ["tokenize"]
    assert "made with flips false, not true" in capsys.readouterr().err
    transplant.main([*words(tmp_path / "out"), "--flips", "--overwrite"])
    assert (tmp_path / "out" / "decoder" / "metrics.json").is_file()


def test_it_stops_where_a_stage_was_stopped(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(transplant, "run_stage", lambda argv: 0)
    transplant.main(words(tmp_path / "out"))
    assert "stopped; the same command resumes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "D"], "--model is missing"),
        (["--model", "M"], "--dataset is missing"),
        (["--model", "M", "--dataset", "D", "--streaming"], "--streaming is not for this command"),
        (["--model", "M", "--dataset", "D", "--latents", "L"], "--latents is not for this command"),
    ],
)
def test_wrong_flags(flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        transplant.main(flags)
    assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--decoder-config", "transplant_decodr"], 2, "cannot read recipe transplant_decodr"),
        (["--crops", "-1"], 2, "crops must be 0 or greater"),
        (["--eval-split", "validation"], 1, "split 'validation'"),
        (["--model", "nowhere"], 1, "nowhere"),
    ],
)
def test_later_stages_are_checked_before_the_first(flags, code, message, words, tmp_path, in_this_process, capsys):
    with pytest.raises(SystemExit) as error:
        transplant.main([*words(tmp_path / "out"), *flags])
    line = capsys.readouterr().err
    assert error.value.code == code and message in line and line.count("\n") == 1, line
    assert in_this_process == []


def test_a_projection_is_refused_before_the_first_stage(words, source, tmp_path, in_this_process, capsys):
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_codebook_projection": True}))
    with pytest.raises(SystemExit) as stop:
        transplant.main(words(tmp_path / "out"))
    assert stop.value.code == 1 and not in_this_process
    assert "its codebook has a projection, which cannot be removed" in capsys.readouterr().err


def test_stages_get_the_flags_that_were_given(tmp_path):
    (tmp_path / "mine.yaml").write_text("eval_split: test\nimage_column: null\n")
    parser = transplant.make_parser()
    typed = ["--model", "M", "--dataset", "D", "--config", str(tmp_path / "mine.yaml"), "--random-flip", "false"]
    stages = transplant.commands(*parser.parse(typed), parser.given(typed))
    assert stages[0][-2:] == ["--output-dir", "runs/transplant/latents"] and "--eval-split" not in stages[0]
    for words, flips in zip(stages[1:], (None, False)):
        recipe, data, _ = train.parse(train.make_parser(), words[1:])
        assert (data.dataset, data.eval_split, data.image_column) == ("D", "test", None)
        assert "--eval-split" in words and "--eval-fraction" not in words
        assert ("--random-flip" in words) == (flips is not None) and data.random_flip is False


def test_several_processes_run_the_stages_themselves(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as error:
        transplant.main([*words(tmp_path / "out"), "--random-flip", "--crops", "2"])
    line = capsys.readouterr().err
    assert error.value.code == 1 and "run each of its stages with several" in line
    assert line.count("--random-flip") == 1 and line.count("--crops 2") == 1  # of the decoder; of the latents


@pytest.mark.parametrize("stage", ["quantizer", "decoder"])
def test_shipped_recipes_are_valid(stage):
    of_model = ["--model", "M", "--dataset", "D"]
    for name in (f"transplant_{stage}", "transplant_decoder_full"):
        train.parse(train.make_parser(), ["--config", name, *of_model])


def test_a_request_to_stop_reaches_the_stage(monkeypatch):
    class Stage:
        def __init__(self, words):
            self.got = []

        send_signal = property(lambda self: self.got.append)

        def wait(self):
            os.kill(os.getpid(), signal.SIGTERM)
            while not self.got:
                time.sleep(0.01)
            return -self.got[0]

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a request that is not passed on must not end the tests
    try:
        monkeypatch.setattr(subprocess, "Popen", Stage)
        assert transplant.run_stage(["train"]) == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
def test_killed_and_stopped_stages_resume_exactly(words, tmp_path, in_this_process, fresh_run, monkeypatch):
    run_here = transplant.run_stage
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def stopped_between(argv):
        if str(parts / "decoder") in argv:
            raise KeyboardInterrupt
        return run_here(argv)

    def killed_inside(argv):
        if str(parts / "decoder") not in argv:
            return run_here(argv)
        env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        stage = subprocess.Popen([sys.executable, "-m", "optvq_hf", *argv], env=env, start_new_session=True)
        try:
            while not (parts / "decoder" / "checkpoint-2").exists():
                assert stage.poll() is None
                time.sleep(0.02)
        finally:
            if stage.poll() is None:
                os.killpg(stage.pid, signal.SIGKILL)
            stage.wait()
        return 128 - stage.returncode

    make = functools.partial(words, max_steps=24)
    transplant.main(make(whole))
    for run_stage, code in ((stopped_between, 130), (killed_inside, 128 + signal.SIGKILL)):
        monkeypatch.setattr(transplant, "run_stage", run_stage)
        with pytest.raises(SystemExit) as error:
            transplant.main(make(parts))
        assert error.value.code == code and not (parts / "decoder" / "model.safetensors").exists()
    monkeypatch.setattr(transplant, "run_stage", run_here)
    transplant.main(make(parts))
    expected = weights(whole / "decoder")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(parts / "decoder").items())
