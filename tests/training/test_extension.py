"""Runs that get more steps or other learning rates when they are resumed."""

import pytest
import torch
from torch import nn

from optvq_hf import OptVQModel
from optvq_hf.commands.train import main
from optvq_hf.training.arguments import OptimizationArguments
from optvq_hf.training.optimization import Learner, make_optimizer
from training.runs import flags, read_log, remove_result, weights


RUN = {"max_steps": 12, "save_every": 8, "eval_images": 0, "discriminator_start": 2}


def run(output_dir, **settings):
    main(flags(output_dir, **{**RUN, **settings}))
    return read_log(output_dir)


def rates(total_steps, extended_at=None, length=None):
    """(steps, 2): learning rate and first beta in every step of a run that gets another length on the way."""
    arguments, seen = OptimizationArguments(warmup_ratio=0.1), []
    learner = Learner(make_optimizer(nn.Linear(2, 2), 1e-3, 0.0), arguments, total_steps)
    for step in range(length or total_steps):
        if step:
            learner.step()
        if step == extended_at:
            learner.change_length(length)
        [group, *_] = learner.optimizer.param_groups
        seen.append((group["lr"], group["betas"][0]))
    return torch.tensor(seen, dtype=torch.float64)


@pytest.mark.parametrize("step", [0, 1, 30, 99])
def test_the_schedule_continues_as_that_of_the_longer_run(step):
    """Also the moment's decay; an extension by nothing changes nothing."""
    extended = rates(100, step, 300)
    torch.testing.assert_close(extended[step:], rates(300)[step:])
    assert torch.equal(extended[:step], rates(100)[:step])
    assert torch.equal(rates(100, step, 100), rates(100))


def test_an_extended_run(tmp_path, capsys):
    run(tmp_path / "long", max_steps=24, save_every=0)
    run(tmp_path / "run")
    capsys.readouterr()
    log = run(tmp_path / "run", max_steps=24, resume="auto")
    told = "from step 8 on, all schedules are those of a run of 24 steps instead of 12"
    assert f"resuming {tmp_path / 'run' / 'checkpoint-8'} with max_steps 12 -> 24; {told}" in capsys.readouterr().out
    assert [entry["step"] for entry in log] == list(range(1, 25))
    expected = read_log(tmp_path / "long")
    for name in ("learning_rate", "discriminator_learning_rate"):
        assert [entry.get(name) for entry in log[8:]] == pytest.approx([entry.get(name) for entry in expected[8:]])
    ends = [OptVQModel.from_pretrained(tmp_path / name).config.sinkhorn_epsilon for name in ("run", "long")]
    assert ends[0] == pytest.approx(ends[1])


def test_an_extension_can_be_resumed_exactly(tmp_path):
    for name in ("whole", "killed"):
        run(tmp_path / name)
        run(tmp_path / name, max_steps=24, resume="auto")
    remove_result(tmp_path / "killed")
    run(tmp_path / "killed", max_steps=24, resume="auto")  # from checkpoint 16, which is of the longer run
    expected, actual = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_another_learning_rate(tmp_path, capsys):
    before = run(tmp_path)
    remove_result(tmp_path)
    with pytest.raises(SystemExit):
        run(tmp_path, learning_rate=1e-3, resume="auto")
    assert "learning_rate 0.002 -> 0.001" in capsys.readouterr().err
    after = run(tmp_path, learning_rate=1e-3, resume="auto", change_learning_rate=True)
    assert "with learning_rate 0.002 -> 0.001" in capsys.readouterr().out
    for name in ("learning_rate", "discriminator_learning_rate"):  # the discriminator's follows it
        assert [entry[name] for entry in after[8:]] == pytest.approx([entry[name] / 2 for entry in before[8:]])
    assert "change_learning_rate: false" in (tmp_path / "recipe.yaml").read_text()
    remove_result(tmp_path)
    again = run(
        tmp_path, learning_rate=1e-3, discriminator_learning_rate=4e-3, resume="auto", change_learning_rate=True
    )
    assert again[-1]["discriminator_learning_rate"] == pytest.approx(2 * before[-1]["discriminator_learning_rate"])
    assert again[-1]["learning_rate"] == pytest.approx(before[-1]["learning_rate"] / 2)
