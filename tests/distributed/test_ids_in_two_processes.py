"""`optvq ids` in two processes: the bytes of one; a mistake is one line of one of them."""

import multiprocessing
import os
import socket
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fixtures.runs import forget_accelerator
from optvq_hf.commands.ids import main
from optvq_hf.item_ids import embeddings
from optvq_hf.training.processes import world_size


pytestmark = pytest.mark.distributed


@pytest.fixture(autouse=True)
def runs(fresh_run, monkeypatch):
    """Tests here run commands, of which every process has several blocks."""
    monkeypatch.setattr(embeddings, "BLOCK_ROWS", 64)


def run(rank, port, flags, shown):
    """One of two processes, forked from this one. Nothing tells accelerate that there is no GPU."""
    sys.stdout = sys.stderr = open(shown / f"{rank}.txt", "w", buffering=1)  # noqa: SIM115
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    forget_accelerator()
    main(flags)
    assert world_size() == 2


def start(flags, shown) -> list[int]:
    """Exit codes of two processes."""
    shown.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run, args=(rank, port, flags, shown)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def test_the_bytes_are_those_of_one_process(tmp_path):
    random = np.random.default_rng(0)
    vectors = list(random.standard_normal((500, 6)) + 4 * random.integers(0, 3, (500, 1)))
    pq.write_table(pa.table({"key": random.permutation(500), "vector": vectors}), tmp_path / "rows.parquet")
    flags = ["--dataset", str(tmp_path / "rows.parquet"), "--embedding-column", "vector", "--key-column", "key"]
    flags += ["--num-quantizers", "2", "--codebook-size", "32", "--max-steps", "10", "--unique"]
    main([*flags, "--output-dir", str(tmp_path / "one")])
    codes = start([*flags, "--output-dir", str(tmp_path / "two")], tmp_path / "shown")
    assert codes == [0, 0], (tmp_path / "shown" / "0.txt").read_text()
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir()) and "ids.parquet" in names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert (tmp_path / "shown" / "1.txt").read_text() == ""

    np.save(tmp_path / "rows.npy", np.full((100, 6), np.nan))
    wrong = ["--dataset", str(tmp_path / "rows.npy"), "--output-dir", str(tmp_path / "wrong")]
    assert start(wrong, tmp_path / "failed") == [1, 1] and not (tmp_path / "wrong").exists()
    shown = [(tmp_path / "failed" / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert shown[0].startswith("optvq ids: error: the embedding of row 0 (key 0) has NaN") and shown[1] == ""
    assert len(shown[0].splitlines()) == 1
