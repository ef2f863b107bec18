"""Planted failures are named within 100 steps, healthy runs raise no alarm."""

import json
import re
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file

from grids import slow
from optvq_hf.commands.train import main, make_parser
from optvq_hf.data.arguments import DataArguments
from optvq_hf.data.batches import training_batches
from optvq_hf.training.arguments import Recipe
from optvq_hf.training.models import make_model
from optvq_hf.training.trainer import TrainingRun
from optvq_hf.training.watching.alarms import ALARMS, remedy, ringing
from optvq_hf.training.watching.trackers import make_accelerator


MODEL = {
    "backbone": "plain_cnn",
    "image_size": 32,
    "num_channels": 1,
    "codebook_size": 512,
    "codebook_dim": 8,
    "num_codebook_heads": 1,
}
RUN = {
    "dataset": "fashion_mnist_sample",
    "max_steps": 100,
    "batch_size": 32,
    "learning_rate": 2e-3,
    "warmup_ratio": 0.05,
    "eval_split": "test[:16]",
    "report_to": "none",
    "images_every": 0,
}
ADVERSARIAL = {"adversarial_weight": 0.1, "discriminator_layers": 2, "discriminator_channels": 16}


def run(folder, **settings) -> list[dict]:
    settings = {**RUN, **({} if "model" in settings else MODEL), "output_dir": folder, **settings}
    main([f"--{name.replace('_', '-')}={value}" for name, value in settings.items()])
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def rang(log) -> set[str]:
    return {name for entry in log for name in entry.get("alarms", ())}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        slow({"use_codebook_projection": False, "learning_rate": 5e-3}),
        slow({"num_codebook_heads": 4, "learning_rate": 5e-3}),
        slow({"batch_size": 8, "log_every": 2}),
        slow({**ADVERSARIAL, "discriminator_start": 30, "discriminator_learning_rate": 2e-4, "lecam_weight": 0.1}),
    ],
    ids=["default", "without projection", "4 heads", "small batches", "adversarial"],
)
def test_no_alarm_in_healthy_runs(tmp_path, settings, capsys):
    log = run(tmp_path, **settings)
    assert rang(log) <= {"data_starved"}  # which is the machine's matter
    assert log[-1]["l2"] < 0.5 * log[0]["l2"]


@pytest.mark.parametrize(
    ("settings", "alarm"),
    [
        ({"training_assignment": "nearest", "learning_rate": 2e-2}, "codebook_collapse"),
        slow(
            {**ADVERSARIAL, "adversarial_weight": 1.0, "discriminator_learning_rate": 2e-2},
            "discriminator_wins",
        ),
    ],
)
def test_failures_of_a_recipe(tmp_path, settings, alarm, capsys):
    log = run(tmp_path, **settings)
    assert alarm in rang(log)
    shown = capsys.readouterr()
    assert f"alarm at step {first(log, alarm)}: {alarm}: {remedy(alarm)}" in shown.err + shown.out
    assert f"{alarm}, first at step {first(log, alarm)}" in shown.out


def first(log, alarm) -> int:
    return next(entry["step"] for entry in log if alarm in entry.get("alarms", ()))


@pytest.mark.parametrize(
    "plant", [lambda codes: codes.add_(5), slow(lambda codes: codes.mul_(10))], ids=["+ 5", "x 10"]
)
def test_codes_in_the_wrong_place(tmp_path, plant):
    torch.manual_seed(0)
    model, image_processor = make_model({**MODEL, "use_codebook_projection": False})
    with torch.no_grad():
        plant(model.quantizer.embedding.weight)
    model.save_pretrained(tmp_path / "planted")
    image_processor.save_pretrained(tmp_path / "planted")
    assert "codebook_off_features" in rang(run(tmp_path / "run", model=tmp_path / "planted"))


def train_on(batches, folder, total_steps, **settings):
    """Through the Python interface, with batches of one's own."""
    words = {**RUN, **MODEL, "output_dir": folder, "max_steps": total_steps, "log_every": 5, **settings}
    parsed = make_parser().parse([f"--{name.replace('_', '-')}={value}" for name, value in words.items()])
    recipe = Recipe(*parsed[:5])
    model, image_processor = make_model({name: value for name, value in vars(parsed[-1]).items() if value is not None})
    run = TrainingRun(model, image_processor, batches, total_steps, recipe, make_accelerator(recipe))
    if not isinstance(batches, list):
        run.batches = batches(run)
    run.train()
    return run


def some_batches(number):
    _, image_processor = make_model(MODEL)
    return list(islice(training_batches(DataArguments("fashion_mnist_sample"), image_processor, 16), number))


def test_a_batch_that_is_not_finite_is_skipped(tmp_path):
    """It changes no weight, no moment and no running state, and the alarm names it."""
    batches = some_batches(12)
    batches[6][3, 0, 5, 5] = float("nan")
    states = []

    def keep(run):
        for batch in batches:
            states.append({name: tensor.clone() for name, tensor in everything(run).items()})
            yield batch

    by_average = {"codebook_update": "ema", "use_codebook_projection": False, "sinkhorn_warm_start": True}
    result = train_on(keep, tmp_path, 12, **ADVERSARIAL, lecam_weight=0.1, ema_decay=0.9, **by_average)
    assert all(torch.equal(before, states[7][name]) for name, before in states[6].items())
    assert not all(torch.equal(before, states[8][name]) for name, before in states[7].items())
    assert [name for entry in result.log.entries for name in entry.get("alarms", ())] == ["nonfinite_loss"]
    assert [entry["nonfinite_steps"] for entry in result.log.entries] == [0, 2, 0]  # of two networks
    for learner in result.networks.learners.values():
        steps = {moments["step"].item() for moments in learner.optimizer.state.values()}
        assert steps == {11}
    state = load_file(tmp_path / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())


def everything(run) -> dict:
    """Weights, buffers and moments of both networks."""
    tensors = {**run.model.state_dict(), **run.networks.discriminator.state_dict(prefix="discriminator.")}
    for name, learner in run.networks.learners.items():
        for number, state in enumerate(learner.optimizer.state.values()):
            tensors |= {f"{name}.{number}.{key}": value for key, value in state.items()}
    tensors |= run.networks.averaged.module.state_dict(prefix="ema.")
    return {**tensors, **run.networks.objective.lecam.state_dict(prefix="lecam.")}


def test_nothing_but_broken_batches_end_the_run(tmp_path):
    batches = [torch.full((8, 1, 32, 32), float("inf"))] * 30
    with pytest.raises(
        ValueError, match="stopped at step 10: 10 steps in a row had a loss or gradient that is not finite"
    ):
        train_on(batches, tmp_path, 30)


def test_too_few_batches(tmp_path):
    with pytest.raises(ValueError, match="the batches ended after step 3 of 5"):
        train_on(some_batches(3), tmp_path, 5)


HEALTHY = {
    "step": 50,
    "l2": 0.1,
    "codebook_usage": 99,
    "expected_usage": 100,
    "codebook_distance": 0.3,
    "codebook_offset": 0.1,
    "quantizer_share": 10,
    "nonfinite_steps": 0,
    "unreadable_images": 0,
    "data_wait": 3,
}


@pytest.mark.parametrize(
    ("changes", "entries", "alarm"),
    [
        ({"codebook_usage": 49}, 3, "codebook_collapse"),
        ({"codebook_usage": 20, "expected_usage": 30}, 3, None),  # few tokens cannot use many codes
        ({"codebook_usage": 49}, 2, None),
        ({"codebook_usage": 49, "step": 20}, 3, None),
        ({"codebook_distance": 3}, 3, "codebook_off_features"),
        ({"quantizer_share": 95}, 3, "codebook_off_features"),
        ({"codebook_offset": 3, "quantizer_share": 80}, 1, "codebook_off_features"),
        ({"codebook_offset": 3}, 1, None),  # the bias of a random projection of few dimensions
        ({"quantizer_share": 80}, 3, None),
        ({"logits_real": 3, "logits_fake": -2}, 3, "discriminator_wins"),
        ({"logits_real": 1.5, "logits_fake": -1.5}, 3, None),
        ({"l2": 0.21}, 10, "reconstruction_diverges"),
        ({"l2": 0.5}, 2, None),  # one hard batch
        ({"l2": 0.19}, 10, None),
        ({"nonfinite_steps": 1}, 1, "nonfinite_loss"),
        ({"data_wait": 60}, 3, "data_starved"),
        ({"data_wait": 40}, 3, None),
        ({"unreadable_images": 2}, 1, "unreadable_images"),
    ],
)
def test_when_each_alarm_rings(changes, entries, alarm):
    log = [HEALTHY] * 10 + [{**HEALTHY, **changes}] * entries
    assert ringing(log) == ([alarm] if alarm else [])
    assert ringing(log[:10]) == []


def test_features_on_their_way_to_the_codes_are_no_alarm():
    """A slow warm-up takes hundreds of steps for it."""
    log = [{**HEALTHY, "codebook_distance": distance} for distance in (3.0, 2.9, 2.6, 2.3)]
    assert ringing(log) == [] and ringing(log[::-1]) == ["codebook_off_features"]


def test_noise_is_no_divergence():
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(500, generator=generator)  # of batches, around a falling error
    log = [{**HEALTHY, "l2": 0.1 * (0.4 + 1.2 * noise[n].item()) * (1 - n / 1000)} for n in range(500)]
    assert not any(ringing(log[:end]) for end in range(1, 501))


def test_remedies_name_flags_that_exist():
    flags = {option for action in make_parser()._actions for option in action.option_strings}
    for alarm in ALARMS:
        named = re.findall(r"--[a-z0-9-]+", remedy(alarm.name))
        assert set(named) <= flags and (named or alarm.name in ("unreadable_images", "nonfinite_loss")), alarm.name
