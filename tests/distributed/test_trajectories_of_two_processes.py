"""Runs of two processes are, step by step, those of one."""

from pathlib import Path

import pytest

from training.runs import finish, run_here, start_several
from training.test_trajectories import RUNS, SETTINGS, assert_as_it_was, assert_close, trajectory


pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory) -> Path:
    """All runs by two processes, with half the batch in each."""
    folder = tmp_path_factory.mktemp("two")
    runs = {folder / name: {**SETTINGS, **settings, "batch_size": 8} for name, settings in RUNS.items()}
    finish(start_several(runs, processes=2))
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_one(of_two_processes, tmp_path, name):
    """The transport, batch norms, LeCam and the adaptive weight are of the whole batch."""
    run_here(tmp_path, **SETTINGS, **RUNS[name])
    assert_close(trajectory(of_two_processes / name), trajectory(tmp_path), 1e-4)
    assert_as_it_was(tmp_path, name)
