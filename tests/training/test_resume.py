"""Runs that are killed, asked to stop, or out of disk space are resumed as if nothing had been."""

import dataclasses
import json
import os
import random
import re
import signal

import pytest
import torch
from PIL import Image

from folders import contents
from optvq_hf import OptVQModel
from optvq_hf.commands.train import RUN_ARGUMENTS, main
from optvq_hf.data.arguments import DataArguments, may_change_on_resume
from optvq_hf.training.checkpoints import STATE_VERSION, read_state, write_state
from optvq_hf.training.integrity import BrokenCheckpointError, sealed
from training.runs import finish, flags, kill, read_log, remove_result, start, wait_for_step, weights


# `OPTVQ_KILLS=10 pytest tests/training/test_resume.py` is the long form of the test.
KILLS = int(os.environ.get("OPTVQ_KILLS", "1"))
MAP_STYLE, STREAM = {}, {"streaming": True, "shuffle_buffer": 100, "eval_split": "test"}


def without_times(log):
    measured = ("images_per_second", "data_wait", "peak_memory", "alarms")
    return [{name: value for name, value in entry.items() if name not in measured} for entry in log]


@pytest.mark.slow
@pytest.mark.parametrize(("data", "num_workers"), [(MAP_STYLE, 2), (STREAM, 0)], ids=str)
def test_killed_at_random_steps(tmp_path, data, num_workers):
    """The weights at the end are those of a run that was left alone, to the last bit, and so is every line of the log."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(whole, **data, num_workers=num_workers))
    steps = sorted(random.Random(str((data, num_workers))).sample(range(3, 118), KILLS))
    for step in steps:
        run = start(killed, **data, num_workers=num_workers, resume="auto")
        wait_for_step(run, killed, step)
        kill(run)
        run.wait()
    shown = finish(start(killed, **data, num_workers=num_workers, resume="auto"))
    assert f"resuming {killed / 'checkpoint-'}" in shown
    expected, actual = weights(whole), weights(killed)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert without_times(read_log(whole)) == without_times(read_log(killed))


@pytest.mark.distributed
def test_two_processes_killed(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = {**STREAM, "max_steps": 40, "save_every": 6}
    finish(start(whole, processes=2, **settings))
    run = start(killed, processes=2, **settings)
    wait_for_step(run, killed, 20)
    kill(run)
    run.wait()
    finish(start(killed, processes=2, **settings, resume="auto"))
    for entry, expected in zip(read_log(killed), read_log(whole), strict=True):
        assert entry["l1"] == pytest.approx(expected["l1"], rel=1e-5), entry["step"]  # the same images in every step


@pytest.mark.slow
def test_asked_to_end(tmp_path):
    """Also by a signal to the whole group, workers included, as schedulers send it."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    settings, resume = {"max_steps": 200, "save_every": 0, "num_workers": 1}, {}
    for how, first in ((signal.SIGTERM, 30), (signal.SIGINT, 90)):
        run = start(stopped, **settings, **resume)
        wait_for_step(run, stopped, first)
        kill(run, how)
        seen = len(read_log(stopped))
        shown = finish(run)  # exit code 0
        step = int(re.search(r"stopped after step (\d+)", shown)[1])
        assert step <= seen + 1  # the step that was under way
        assert first <= step < 200 and f"--config {stopped / 'recipe.yaml'} --resume auto" in shown
        assert not (stopped / "model.safetensors").exists()  # it is not the result of the run
        assert OptVQModel.from_pretrained(stopped / f"checkpoint-{step}").quantizer.num_updates == step
        resume = {"resume": "auto"}
    finish(start(stopped, **settings, **resume))
    finish(start(whole, **settings))
    expected, actual = weights(whole), weights(stopped)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


@pytest.mark.distributed
def test_two_processes_asked_to_end(tmp_path):
    run = start(tmp_path, processes=2, save_every=0, max_steps=2000)
    wait_for_step(run, tmp_path, 25)
    kill(run, signal.SIGTERM)
    run.communicate(timeout=60)
    [checkpoint] = tmp_path.glob("checkpoint-*")
    OptVQModel.from_pretrained(checkpoint)


def run(output_dir, **settings):
    main(flags(output_dir, **settings))


def run_killed_near_its_end(output_dir, **settings):
    """A run with its checkpoints, but without the result: as if it had been killed before it saved that."""
    run(output_dir, **settings)
    remove_result(output_dir)


def test_the_newest_and_the_best_checkpoint_are_kept(tmp_path):
    run(tmp_path, max_steps=40, save_every=4, keep_checkpoints=2)
    best = json.loads((tmp_path / "best_checkpoint.json").read_text())
    kept = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert kept == {"checkpoint-32", "checkpoint-36", best["folder"]} and best["mse"] > 0
    assert not list(tmp_path.glob(".checkpoint*"))


@pytest.mark.slow
def test_levels_are_resumed_to_the_last_bit(tmp_path):
    """Codes, potentials, warm start, EMA codebooks, and the age of the codes of every level."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    settings = {"max_steps": 30, "save_every": 12, "num_quantizers": 3, "codebook_size": 32, "codebook_update": "ema"}
    settings |= {"use_codebook_projection": "false", "codebook_start": "kmeans"}
    run(whole, **settings)
    run_killed_near_its_end(stopped, **settings)
    run(stopped, **settings, resume="auto")  # from step 24 on
    expected, actual = weights(whole), weights(stopped)
    assert len([name for name in expected if name.endswith("ema_sums")]) == 2 * 3 and expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert without_times(read_log(whole)) == without_times(read_log(stopped))


def test_a_broken_checkpoint_is_passed_over(tmp_path, capsys):
    run_killed_near_its_end(tmp_path, max_steps=12, save_every=4, discriminator_start=2)
    weights_file = tmp_path / "checkpoint-8" / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-100])
    (tmp_path / ".checkpoint-10.unfinished").mkdir()  # of a process that was killed while it wrote
    run(tmp_path, max_steps=12, save_every=4, discriminator_start=2, resume="auto")
    shown = capsys.readouterr().out
    assert "checkpoint-8 is broken" in shown and f"resuming {tmp_path / 'checkpoint-4'}" in shown
    assert OptVQModel.from_pretrained(tmp_path / "checkpoint-8").quantizer.num_updates == 8  # written again


def test_a_checkpoint_of_another_version_is_no_broken_one(tmp_path, capsys):
    """It is not passed over in silence for a run from the first step, and the message says what to do."""
    run_killed_near_its_end(tmp_path, max_steps=6, save_every=4)
    checkpoint = tmp_path / "checkpoint-4"
    path = checkpoint / "training_state.json"
    state = read_state(checkpoint)
    assert state.version == STATE_VERSION
    write_state(checkpoint, dataclasses.replace(state, version=STATE_VERSION + 1))
    later, earlier = path.read_text(), json.dumps({"step": 4, "version": 2})
    for text, version in ((later, STATE_VERSION + 1), (earlier, 2), ("{}", 1)):
        path.write_text(text)
        with pytest.raises(SystemExit):
            run(tmp_path, max_steps=6, save_every=4, resume="auto")
        shown = capsys.readouterr().err
        assert f"has format {version}, but this version of optvq_hf reads format {STATE_VERSION}" in shown
        assert f"start a new run with --model {checkpoint}" in shown
    path.write_text(sealed({**dataclasses.asdict(state), "extra": 1}))
    with pytest.raises(BrokenCheckpointError, match="too many or too few entries: extra"):
        read_state(checkpoint)
    path.write_text("[1")
    with pytest.raises(BrokenCheckpointError, match="is broken"):
        read_state(checkpoint)


def test_what_may_change_on_resume_is_said_by_the_flags():
    flags_of_run = (*RUN_ARGUMENTS, DataArguments)
    names = {field.name for one in flags_of_run for field in dataclasses.fields(one)}
    changeable = may_change_on_resume(*flags_of_run)
    assert {"save_every", "log_every", "num_workers", "compile", "dataset", "push_to_hub"} <= changeable < names
    fixed = {"seed", "batch_size", "learning_rate", "random_flip", "epsilon_schedule", "train_split", "l1_weight"}
    assert not changeable & fixed and fixed < names


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch, capsys):
    """What the system says when a file cannot grow, in the middle of the second checkpoint."""
    from optvq_hf.training import checkpoints

    def full(tensors, path):
        if "checkpoint-8" in str(path):
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        return save_file(tensors, path)

    save_file = checkpoints.save_file
    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, max_steps=12, save_every=4)
    assert stopped.value.code == 1
    assert re.search(r"cannot write checkpoint .*checkpoint-8: .*No space left.*earlier", capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.glob("*checkpoint-*")) == ["checkpoint-4"]
    monkeypatch.undo()
    run(tmp_path, max_steps=12, save_every=4, resume="auto")
    assert OptVQModel.from_pretrained(tmp_path).quantizer.num_updates == 12


def test_no_resume_beside_checkpoints_of_another_run(tmp_path, capsys):
    run_killed_near_its_end(tmp_path, max_steps=6, save_every=4)
    for settings, message in (
        ({}, "holds checkpoints of an earlier run; pass --resume auto to resume it, --overwrite to remove it"),
        (
            {"resume": "auto", "max_steps": 4},
            "checkpoint-4 has 4 steps already, and the run would have 4: raise --max-steps",
        ),
        ({"resume": str(tmp_path / "images")}, "is not a checkpoint"),
        ({"resume": "auto", "overwrite": True}, "--overwrite excludes --resume"),
        ({"resume": "auto", "weight_decay": 0.1}, "weight_decay 0.05 -> 0.1: a resumed run must compute the same"),
        ({"resume": "auto", "learning_rate": 0.1}, "learning_rate 0.002 -> 0.1: .*, or pass --change-learning-rate"),
        ({"resume": "auto", "random_flip": False}, "random_flip True -> False"),
    ):
        with pytest.raises(SystemExit):
            run(tmp_path, **{"max_steps": 6, "save_every": 4, **settings})
        assert re.search(message, capsys.readouterr().err), message
    run(tmp_path, max_steps=6, save_every=3, resume="auto")
    assert "with save_every 4 -> 3" in capsys.readouterr().out


def test_resume_without_a_checkpoint_begins(tmp_path):
    run(tmp_path, max_steps=2, resume="auto")
    assert OptVQModel.from_pretrained(tmp_path).quantizer.num_updates == 2


def test_the_moments_of_channels_last_weights(tmp_path):
    """Their numbers lie in memory as the weights' do."""
    settings = {
        "backbone": "vqgan",
        "base_channels": 32,
        "channel_multiplier": (1, 2),
        "num_res_blocks": 1,
        "latent_channels": 8,
    }
    settings |= {"attn_resolutions": 8, "max_steps": 6, "channels_last": True, "batch_size": 4}
    run(tmp_path / "whole", **settings)
    run_killed_near_its_end(tmp_path / "parts", **settings, save_every=3)
    run(tmp_path / "parts", **settings, save_every=3, resume="auto")
    expected, actual = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_resuming_an_older_checkpoint_abandons_the_later_ones(tmp_path):
    run(tmp_path, max_steps=12, save_every=3, keep_checkpoints=9)
    (tmp_path / ".checkpoint-5.removed").mkdir()
    run(tmp_path, max_steps=12, save_every=4, keep_checkpoints=1, resume=tmp_path / "checkpoint-3")
    kept = {path.name for path in tmp_path.glob("*checkpoint-*") if path.is_dir()}
    assert {"abandoned-checkpoint-6", "abandoned-checkpoint-9", "checkpoint-8"} <= kept
    assert not {"checkpoint-6", "checkpoint-9", ".checkpoint-5.removed"} & kept


def test_an_unreadable_evaluation_image_is_found_before_the_first_step(tmp_path, capsys):
    (tmp_path / "images" / "test").mkdir(parents=True)
    (tmp_path / "images" / "test" / "broken.png").write_bytes(b"no picture")
    (tmp_path / "images" / "train").mkdir()
    for number in range(8):
        Image.new("L", (16, 16), number).save(tmp_path / "images" / "train" / f"{number}.png")
    with pytest.raises(SystemExit):
        run(tmp_path / "run", dataset=tmp_path / "images", eval_split="test")
    assert "broken.png: not an image file" in capsys.readouterr().err
    assert not (tmp_path / "run" / "training_log.jsonl").exists()


def refused(output_dir, capsys, **settings):
    """The one line with which a run is refused; nothing in its folder has changed."""
    before = contents(output_dir)
    with pytest.raises(SystemExit):
        run(output_dir, **settings)
    assert contents(output_dir) == before
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    return line


def test_a_checkpoint_of_another_folder_does_not_mix_two_runs(tmp_path, capsys):
    short = {"max_steps": 6, "discriminator_start": 2, "eval_images": 8}
    run_killed_near_its_end(tmp_path / "d", **short, save_every=4)
    run_killed_near_its_end(tmp_path / "c", **short, save_every=2, seed=1)
    settings = {**short, "save_every": 4, "resume": tmp_path / "d" / "checkpoint-4"}
    message = "holds checkpoints and log of another run than .*checkpoint-4: pass --overwrite to remove that run"
    assert re.search(message, refused(tmp_path / "c", capsys, **settings))
    for path in (tmp_path / "c").glob("checkpoint-*"):
        path.rename(tmp_path / f"moved-{path.name}")
    assert "holds log of another run" in refused(tmp_path / "c", capsys, **settings)
    assert "which --resume names" in refused(tmp_path / "d", capsys, **settings, overwrite=True)
    run(tmp_path / "c", **settings, overwrite=True)
    run(tmp_path / "new", **settings)
    expected = read_log(tmp_path / "d")
    for name in ("c", "new"):
        log = read_log(tmp_path / name)
        assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6]
        assert [entry["loss"] for entry in log[:4]] == [entry["loss"] for entry in expected[:4]]
        assert not (tmp_path / name / "best_checkpoint.json").exists()  # it named a checkpoint of the run before


def test_no_new_run_if_no_checkpoint_is_intact(tmp_path, capsys):
    run_killed_near_its_end(tmp_path, max_steps=3, save_every=2, eval_images=0)
    with open(tmp_path / "checkpoint-2" / "model.safetensors", "ab") as file:
        file.write(b"more")
    line = refused(tmp_path, capsys, max_steps=3, save_every=2, eval_images=0, resume="auto")
    assert "none of the 1 checkpoints in" in line and "pass --overwrite instead of --resume" in line
