import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grids import long, slow
from optvq_hf import OptVQConfig
from optvq_hf.training import memory
from optvq_hf.training.arguments import (
    CodebookArguments,
    ObjectiveArguments,
    OptimizationArguments,
    Recipe,
    RecordArguments,
    TrainingArguments,
)
from peak_memory import needs_proc


CPU = torch.device("cpu")


def make_recipe(objective=None, optimization=None, **training):
    return Recipe(
        TrainingArguments(**training),
        OptimizationArguments(**(optimization or {})),
        ObjectiveArguments(**(objective or {})),
        CodebookArguments(),
        RecordArguments(),
    )


def plain(**fields):
    sizes = {"image_size": 32, "codebook_size": 1024, "codebook_dim": 8}
    return OptVQConfig(backbone="plain_cnn", **{**sizes, **fields})


def test_the_parts_of_a_plan(monkeypatch):
    plan = memory.plan_memory(plain(), make_recipe(batch_size=64), CPU)
    assert plan.num_parameters == 38769 and plan.tokens_per_step == 64 * 64
    assert plan.weights == 4 * 4 * plan.num_parameters  # weights, gradients, two moments of AdamW
    assert plan.transport == 4 * 64 * 64 * 4 * 1024 + 3 * 8 * 2**20
    assert plan.total == plan.base + plan.weights + plan.activations + plan.transport and plan.codebook_start == 0
    assert str(plan).startswith("38,769 parameters, 4,096 tokens per step; memory about ")
    twice = memory.plan_memory(plain(), make_recipe(batch_size=128), CPU)
    assert twice.activations == pytest.approx(2 * plan.activations)
    averaged = memory.plan_memory(plain(), make_recipe(optimization={"ema_decay": 0.9}), CPU)
    assert averaged.weights == 5 * 4 * plan.num_parameters
    adversarial = memory.plan_memory(plain(), make_recipe(objective={"adversarial_weight": 1.0}), CPU)
    assert adversarial.num_parameters > 2_000_000 and adversarial.activations > plan.activations
    block = 8 * 2**20
    assert memory.plan_memory(plain(training_assignment="nearest"), make_recipe(), CPU).transport == 3 * block
    soft = memory.plan_memory(plain(training_assignment="soft"), make_recipe(batch_size=64), CPU)
    assert soft.transport == plan.transport + 4 * 64 * 64 * 4 * 1024
    entropy = memory.plan_memory(plain(codebook_loss_type="cross_entropy"), make_recipe(batch_size=64), CPU)
    assert entropy.transport == plan.transport + 6 * block
    with monkeypatch.context() as patch:
        patch.setattr(memory, "use_fused", lambda solver, *tensors: solver == "auto")  # as on a GPU
        assert memory.plan_memory(plain(), make_recipe(), CPU).transport == 3 * block
        kept_in_torch = make_recipe(batch_size=64, solver="torch")
        assert memory.plan_memory(plain(), kept_in_torch, CPU).transport == plan.transport
    waiting = memory.plan_memory(plain(), make_recipe(batch_size=64, gradient_accumulation_steps=11), CPU)
    assert waiting.activations == plan.activations + 10 * 64 * 3 * 32 * 32 * 4
    lpips = memory.plan_memory(plain(), make_recipe({"perceptual_weight": 1.0}, batch_size=64), CPU)
    assert lpips.weights > plan.weights + 4 * 14_000_000 and lpips.activations > plan.activations + 100 * 2**20
    starts = make_recipe(batch_size=64)._replace(codebook=CodebookArguments(codebook_start="kmeans"))
    assert memory.plan_memory(plain(), starts, CPU).codebook_start > 16 * 64 * 64 * 4 * (2 * 8 + 16)


def test_a_plan_makes_nothing_of_its_size():
    plan = memory.plan_memory(plain(codebook_size=10**9), make_recipe(), CPU)
    assert plan.weights > 2 * 10**9 * 4 * 4
    assert memory.plan_memory(OptVQConfig(image_size=16384), make_recipe(batch_size=1), CPU).activations > 10**12


def test_what_does_not_fit_is_refused_with_what_would(monkeypatch):
    recipe = make_recipe(batch_size=64)
    plan = memory.plan_memory(plain(), recipe, CPU)
    monkeypatch.setattr(memory, "usable_memory", lambda device: (plan.total - plan.base) // 3)
    with pytest.raises(
        ValueError, match=r"the run needs about .* GiB are free on cpu: --batch-size 8 fits, or pass --check"
    ):
        memory.check_memory(plan, plain(), recipe, CPU)
    assert memory.fitting_batch_size(plain(), recipe, CPU) == 8
    assert memory.fitting_batch_size(plain(), recipe, CPU, num_images=5) == 4
    with pytest.raises(ValueError, match="--batch-size 4 fits"):
        memory.check_memory(plan, plain(), recipe, CPU, lambda: 5)
    monkeypatch.setattr(memory, "usable_memory", lambda device: 1000)
    with pytest.raises(ValueError, match="not even --batch-size 1 fits: choose a smaller model"):
        memory.check_memory(plan, plain(), recipe, CPU)
    monkeypatch.setattr(memory, "usable_memory", lambda device: 10**15)
    memory.check_memory(plan, plain(), recipe, CPU)


RUN = """
import json, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from peak_memory import peak_memory
from optvq_hf.commands.train import main
from optvq_hf.training import preparation, trainer
plan_memory, finish, figures = preparation.plan_memory, trainer.TrainingRun.finish, []

def planned(*arguments):
    plan = plan_memory(*arguments)
    figures.append(plan.total)
    return plan

def finished(run):
    figures.append(peak_memory())
    finish(run)

preparation.plan_memory, trainer.TrainingRun.finish = planned, finished
main(sys.argv[2:])
print(json.dumps(figures))
"""
SMALL = [
    *("--dataset", "fashion_mnist_sample", "--num-channels", "1", "--eval-split", "test[:8]", "--eval-images", "0"),
    *(
        "--report-to",
        "none",
        "--images-every",
        "0",
        "--backbone",
        "plain_cnn",
        "--image-size",
        "64",
        "--codebook-dim",
        "8",
    ),
    *("--codebook-size", "8192", "--num-codebook-heads", "1", "--batch-size", "32", "--max-steps", "2"),
]


@needs_proc
@pytest.mark.parametrize(
    "words",
    [
        slow(""),
        long("--training-assignment soft"),
        long("--training-assignment nearest --codebook-loss-type cross_entropy"),
        long("--codebook-size 1024 --batch-size 64 --gradient-accumulation-steps 50 --max-steps 1"),
        slow("--codebook-size 1024 --codebook-start kmeans --codebook-start-batches 200"),
        slow("--adversarial-weight 1 --batch-size 16"),
    ],
)
def test_a_plan_is_what_optvq_train_takes(words, tmp_path):
    command = [sys.executable, "-c", RUN, str(Path(__file__).parents[1]), *SMALL, "--output-dir", str(tmp_path / "run")]
    shown = subprocess.run([*command, *words.split()], capture_output=True, text=True, check=True).stdout
    planned, peak = json.loads(shown.splitlines()[-1])
    assert planned == pytest.approx(peak, rel=0.25)
