"""The first stage of `optvq transplant` in two processes: one run on the union of their latents."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from optvq_hf.commands import train
from optvq_hf.data.latents import LatentReader
from training.latents import make_latents


pytestmark = pytest.mark.distributed

# Runs `optvq train`, and writes what this process has read and has at the end.
WATCHED = """
import os, sys, torch
from optvq_hf.commands import train
from optvq_hf.data.latents import LatentReader
from optvq_hf.training.trainer import TrainingRun

rows, read, run_through = [], LatentReader._latents, TrainingRun.train

def note(self, row):
    rows.append(row)
    return read(self, row) * (float("nan") if row == int(sys.argv[2]) else 1)

def save(self):
    run_through(self)
    torch.save((rows, self.model.state_dict()), f"{sys.argv[1]}/rank-{os.environ['RANK']}.pt")

LatentReader._latents, TrainingRun.train = note, save
train.main(sys.argv[3:])
"""
IMAGES, MAX_STEPS, START_BATCHES, TOGETHER = 128, 4, 2, 16
# A row that the second process reads in the second step, after the batches of whitening and of k-means.
SPOILED = int(np.random.default_rng([0, 0]).permutation(IMAGES)[TOGETHER * (2 * START_BATCHES + 1) + 1])


@pytest.fixture(autouse=True)
def runs(fresh_run):
    """Tests here run commands."""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_latents(tmp_path_factory.mktemp("source"), IMAGES)


def flags_of_training(source, out, batch_size) -> list[str]:
    flags = ["--config", "transplant_quantizer", "--model", source / "model", "--latents", source / "latents"]
    flags += ["--dataset", "fashion_mnist_sample", "--train-split", f"train[:{IMAGES}]", "--eval-split", "test[:8]"]
    flags += ["--max-steps", MAX_STEPS, "--codebook-start-batches", START_BATCHES, "--batch-size", batch_size]
    flags += ["--log-every", 1, "--images-every", 0, "--save-every", 0, "--report-to", "none", "--eval-images", 0]
    return [*map(str, [*flags, "--output-dir", out])]


def train_in_two_processes(source, tmp_path) -> list[tuple[list[int], dict]]:
    """What each process has read, and its model at the end."""
    (tmp_path / "watched.py").write_text(WATCHED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [tmp_path / "watched.py", tmp_path, SPOILED, *flags_of_training(source, tmp_path / "two", TOGETHER // 2)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*launcher, *map(str, words)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f" parameters for {MAX_STEPS} steps") == 1
    return [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2)]


def log(folder):
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def test_the_quantizer_is_that_of_one_process_with_twice_the_batch(source, tmp_path, monkeypatch):
    """By the shipped recipe, with whitening and k-means. A latent that is not finite makes both skip the step."""
    read = LatentReader._latents
    monkeypatch.setattr(
        LatentReader, "_latents", lambda self, row: read(self, row) * (math.nan if row == SPOILED else 1)
    )
    (first, of_first), (second, of_second) = train_in_two_processes(source, tmp_path)
    assert len(first) == len(second) == TOGETHER // 2 * (2 * START_BATCHES + MAX_STEPS)
    assert len({*first, *second}) == len(first) + len(second)  # within the first epoch
    assert SPOILED in second
    train.main(flags_of_training(source, tmp_path / "one", TOGETHER))
    two, one, start = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "two", tmp_path / "one", source / "model")
    )
    for name, tensor in two.items():
        assert torch.equal(of_first[name], tensor) and torch.equal(of_second[name], tensor), name
        torch.testing.assert_close(tensor, one[name], rtol=1e-3, atol=1e-4, msg=name)
    for name in ("quant_conv.weight", "quantizer.embedding.weight"):
        assert not torch.equal(one[name], start[name]), name
    logs = [log(tmp_path / name) for name in ("two", "one")]
    for entries in logs:
        assert [entry["nonfinite_steps"] for entry in entries] == [0, 1, 0, 0]
        del entries[1]  # the codes of the step that was skipped count for nothing
    for of_two, of_one in zip(*logs, strict=True):
        for name in ("codebook_usage", "codebook_distance"):
            assert of_two[name] == pytest.approx(of_one[name], rel=1e-3), name
