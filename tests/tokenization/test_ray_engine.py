"""Ray Data on a cluster of two workers, of which one is killed: the rows and bytes of the local engine."""

import sys
import threading
import time

import datasets
import numpy as np
import psutil
import pytest

from builders import make, plain_config
from optvq_hf.tokenization import OptVQTokenizer, load_tokens
from optvq_hf.training.models import make_image_processor


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 by default: beside other processes, workers would hardly start
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    yield ray
    ray.shutdown()


def workers():
    """The processes of the actors that tokenize."""
    found = psutil.Process().children(recursive=True)
    return [process for process in found if "ray::MapWorker" in " ".join(process.cmdline()[:1])]


@pytest.mark.long
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_a_worker_is_killed_midway(cluster, tokenize, tmp_path, pictures):
    model = make(plain_config(image_size=64, num_channels=1))
    model.save_pretrained(tmp_path / "model")
    make_image_processor(model.config).save_pretrained(tmp_path / "model")
    flags = {"model": tmp_path / "model", "dataset": "fashion_mnist_sample", "split": "test[:500]", "shard_size": 25}
    killed = []

    def kill():
        while not (found := list((tmp_path / "ray" / "data").glob("*-of-*.parquet"))):
            time.sleep(0.01)
        victim = workers()[0]
        victim.kill()
        killed.append((victim.pid, len(found)))

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    tokenize(tmp_path / "ray", engine="ray", num_actors=2, **flags)
    thread.join(timeout=1)
    [(pid, finished)] = killed
    assert finished < 10 and not psutil.pid_exists(pid)
    tokenize(tmp_path / "local", **flags)
    one, other = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "data").iterdir()} for name in ("ray", "local")
    )
    assert one == other and len(one) == 20
    assert (tmp_path / "ray" / "manifest.json").read_text() == (tmp_path / "local" / "manifest.json").read_text()

    # Anybody's pipeline takes the same callable.
    rows = datasets.load_dataset(str(pictures), split="train").cast_column("image", datasets.Image(decode=False))
    source = cluster.data.from_items([rows[number] for number in range(17)], override_num_blocks=4)
    mapped = source.map_batches(
        OptVQTokenizer,
        fn_constructor_args=[str(tmp_path / "model")],
        compute=cluster.data.ActorPoolStrategy(size=1),
        batch_size=5,
    )
    by_name = {row["name"]: row["codes"] for row in mapped.take_all()}
    expected = OptVQTokenizer(str(tmp_path / "model"))(rows[:17])
    assert len(by_name) == 17
    assert all(np.array_equal(by_name[name], codes) for name, codes in zip(expected["name"], expected["codes"]))
    assert len(load_tokens(tmp_path / "ray")) == 500


def test_without_ray(tokenize, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit):
        tokenize(tmp_path, engine="ray")
    assert 'ray is not installed: run pip install "optvq_hf[ray]"' in capsys.readouterr().err
