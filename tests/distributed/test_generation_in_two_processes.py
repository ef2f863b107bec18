"""An example of generation in two processes, killed and resumed: the weights of a run that went through."""

import os
import runpy
import socket
import sys
from pathlib import Path

import pytest
import torch.multiprocessing as mp
from accelerate import Accelerator
from safetensors.torch import load_file

from builders import make, plain_config
from fixtures.runs import forget_accelerator
from optvq_hf.training.models import make_image_processor


pytestmark = pytest.mark.distributed
EXAMPLES = Path(__file__).parents[2] / "scripts" / "examples"
SMALL = ["--hidden-size", "16", "--num-layers", "1", "--batch-size", "200", "--per-class", "1", "--save-every", "3"]


def run(rank, port, flags, last_step):
    """One of two processes, forked from this one, which dies after `last_step` steps."""
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    forget_accelerator()
    backward, steps = Accelerator.backward, []

    def count(self, loss):
        assert self.num_processes == 2
        steps.append(loss)
        if len(steps) > last_step:
            os._exit(1)
        backward(self, loss)

    Accelerator.backward = count
    sys.path.insert(0, str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / "generate_images.py"))["main"](flags)


def start(flags, last_step=1000):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(run, (port, flags, last_step), nprocs=2, start_method="fork")


def test_killed_and_resumed(tmp_path):
    """Killed in step 17, after a checkpoint at step 15; an epoch has 10. Tokenizing is shared by the processes too."""
    tokenizer = make(plain_config(image_size=16, num_channels=1))
    tokenizer.save_pretrained(tmp_path / "model")
    make_image_processor(tokenizer.config).save_pretrained(tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), "--dataset", "fashion_mnist_sample", *SMALL, "--max-steps", "24"]
    start([*flags, "--output-dir", str(tmp_path / "whole")])
    broken = [*flags, "--output-dir", str(tmp_path / "broken")]
    with pytest.raises(mp.ProcessExitedException):
        start(broken, last_step=16)
    folders = [tmp_path / name / "autoregressive" for name in ("broken", "whole")]
    assert [path.name for path in folders[0].glob("checkpoint-*[0-9]")] == ["checkpoint-15"]
    start(broken)
    weights, expected = (load_file(folder / "model.safetensors") for folder in folders)
    assert weights.keys() == expected.keys() and all(weights[name].equal(expected[name]) for name in expected)
