"""Small training runs in processes of their own, to be interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import load_file

from optvq_hf.commands.train import main


REPOSITORY = Path(__file__).parents[2]

# A tokenizer of a few thousand parameters with everything that has a state: discriminator, averages, LeCam, a schedule.
SMALL_RUN = {
    "dataset": "fashion_mnist_sample",
    "backbone": "plain_cnn",
    "image_size": 16,
    "num_channels": 1,
    "codebook_size": 64,
    "codebook_dim": 4,
    "num_codebook_heads": 1,
    "batch_size": 8,
    "max_steps": 120,
    "learning_rate": 2e-3,
    "adversarial_weight": 0.1,
    "discriminator_start": 20,
    "discriminator_ramp": 30,
    "discriminator_channels": 8,
    "discriminator_layers": 1,
    "lecam_weight": 0.1,
    "r1_weight": 0.1,
    "r1_every": 4,
    "ema_decay": 0.98,
    "sinkhorn_warm_start": True,
    "epsilon_schedule": (10, 50),
    "reseed_dead_codes_after": 10,
    "random_flip": True,
    "training_assignment": "sample",
    "log_every": 1,
    "images_every": 0,
    "save_every": 7,
    "eval_images": 16,
    "eval_split": "test[:16]",
    "report_to": "none",
}


def flags(output_dir, **settings) -> list[str]:
    words = []
    for name, value in {**SMALL_RUN, "output_dir": output_dir, **settings}.items():
        words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
    return words


def start(output_dir, processes: int = 1, **settings) -> subprocess.Popen:
    """A run in its own process group, on one thread per process."""
    return _start(processes, REPOSITORY / "scripts" / "train.py", *flags(output_dir, **settings))


def start_several(runs: dict[Path, dict], processes: int) -> subprocess.Popen:
    """Runs one after the other in the same processes, by their output folders: what they import is imported once."""
    lines = [flags(output_dir, **settings) for output_dir, settings in runs.items()]
    return _start(processes, Path(__file__).parent / "several_runs.py", json.dumps(lines))


def _start(processes: int, script: Path, *words: str) -> subprocess.Popen:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    )
    command = [sys.executable, *launcher, str(script), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


def finish(run: subprocess.Popen) -> str:
    shown, _ = run.communicate(timeout=240)
    assert run.returncode == 0, shown[-3000:]
    return shown


def run_here(output_dir, **settings):
    """A run that need not be interrupted, without a process of its own: to the last bit what `start` gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with patch.dict(os.environ, {"ACCELERATE_USE_CPU": "true"}):
            main(flags(output_dir, **settings))
    finally:
        torch.set_num_threads(threads)


def wait_for_step(run: subprocess.Popen, output_dir: Path, step: int):
    """Until the log has this step."""
    log = output_dir / "training_log.jsonl"
    while not log.is_file() or len(log.read_text().splitlines()) < step:
        assert run.poll() is None, run.communicate()[0][-3000:]
        time.sleep(0.01)


def remove_result(output_dir: Path):
    """Leaves what a run has before it saves its result."""
    for path in (output_dir, output_dir / "ema"):
        for name in ("training_summary.json", "model.safetensors", "config.json", "metrics.json"):
            (path / name).unlink(missing_ok=True)


def kill(run: subprocess.Popen, how: int = signal.SIGKILL):
    os.killpg(run.pid, how)


def read_log(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "training_log.jsonl").read_text().splitlines()]


def weights(output_dir: Path) -> dict:
    """Of the model and of the averaged model."""
    return {
        f"{folder}/{name}": tensor
        for folder in ("", "ema")
        for name, tensor in load_file(output_dir / folder / "model.safetensors").items()
    }
