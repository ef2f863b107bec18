"""`optvq tokenize` in several processes, and killed at any moment: the shards of one process that ran through."""

import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from builders import make, plain_config
from optvq_hf.commands import tokenize
from optvq_hf.tokenization import load_tokens
from optvq_hf.training.models import make_image_processor


pytestmark = pytest.mark.distributed
KILLS = int(os.environ.get("OPTVQ_KILLS", "1"))
SHARDS = 40


@pytest.fixture(autouse=True)
def runs(fresh_run):
    """Tests here run commands."""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Flags but for the output folder: 1000 images in 40 shards."""
    folder = tmp_path_factory.mktemp("tokenizer")
    model = make(plain_config(image_size=32, num_channels=1))
    model.save_pretrained(folder)
    make_image_processor(model.config).save_pretrained(folder)
    flags = {"model": folder, "dataset": "fashion_mnist_sample", "split": "test", "columns": "label", "shard_size": 25}
    return [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def expected(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    tokenize.main([*command, "--output-dir", str(folder)])
    return folder


def start(command, out) -> list[subprocess.Popen]:
    """Two processes, as torchrun starts them: nothing tells accelerate that there is no GPU."""
    words = [sys.executable, "-m", "optvq_hf.commands.tokenize", *command, "--output-dir", str(out)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [
        subprocess.Popen(words, env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank}, **pipes)
        for rank in "01"
    ]


def shards_in(folder: Path) -> dict[str, int]:
    """Finished shards, by name; their inode tells whether one was written again."""
    return {path.name: path.stat().st_ino for path in (folder / "data").glob("*-of-*.parquet")}


def check_same(folder, expected):
    for name in shards_in(expected):
        assert (folder / "data" / name).read_bytes() == (expected / "data" / name).read_bytes(), name
    one, other = (json.loads((path / "manifest.json").read_text()) for path in (folder, expected))
    assert one == other and sorted(path.name for path in folder.iterdir()) == ["README.md", "data", "manifest.json"]
    assert len(load_tokens(folder)) == 1000


def test_killed_at_any_moment(command, expected, tmp_path):
    """Every shard that was finished stays as it is: a process loses at most the one in its hands."""
    moments = random.Random(0)
    before = {}
    for _ in range(KILLS):
        processes = start(command, tmp_path / "out")
        while len(shards_in(tmp_path / "out")) <= len(before):  # until the first shard of this attempt
            assert processes[0].poll() is None, processes[0].communicate()[0]
            time.sleep(0.005)
        time.sleep(moments.random() * 0.3 / KILLS)  # 40 shards are to last for all attempts
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()
        now = shards_in(tmp_path / "out")
        assert before.items() <= now.items()
        before = now
    shown = [process.communicate(timeout=240)[0] for process in start(command, tmp_path / "out")]
    assert "process 1: " in shown[1] and "finished shards are as they were written, and stay" in shown[1]
    assert before.items() <= shards_in(tmp_path / "out").items()
    check_same(tmp_path / "out", expected)
