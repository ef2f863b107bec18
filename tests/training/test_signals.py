"""Requests to end are noted; the second Ctrl-C is not. The kills of whole runs are in test_resume.py."""

import os
import pty
import signal
import sys
import time

import pytest
import torch

from optvq_hf.training.signals import StopRequest, interrupted_by_requests
from training.runs import REPOSITORY, flags, read_log


NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_requests_are_noted_until_the_end(number):
    before = [signal.getsignal(number) for number in NUMBERS]
    with StopRequest(torch.device("cpu")) as stop:
        assert not stop.agreed()
        for _ in range(2):  # schedulers repeat themselves
            os.kill(os.getpid(), number)
            assert stop.agreed()
    assert [signal.getsignal(number) for number in NUMBERS] == before


def test_the_second_ctrl_c_ends_the_process():
    with pytest.raises(KeyboardInterrupt), StopRequest(torch.device("cpu")) as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.agreed()
        signal.raise_signal(signal.SIGINT)


def test_an_ignored_hangup_stays_ignored():
    """As nohup leaves it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest(torch.device("cpu")) as stop, interrupted_by_requests():
            signal.raise_signal(signal.SIGHUP)
            assert not stop.agreed()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", NUMBERS)
def test_requests_interrupt_where_there_is_no_state_to_save(number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), interrupted_by_requests():
        signal.raise_signal(number)
    assert signal.getsignal(number) == before


@pytest.mark.slow
def test_a_lost_terminal(tmp_path):
    """The run writes its checkpoint and ends, though it can no longer write to the terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        script = str(REPOSITORY / "scripts" / "train.py")
        os.execve(sys.executable, [sys.executable, script, *flags(tmp_path, max_steps=5000, save_every=0)], environment)
    log = tmp_path / "training_log.jsonl"
    while not log.is_file() or len(log.read_text().splitlines()) < 10:
        time.sleep(0.05)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    [checkpoint] = tmp_path.glob("checkpoint-*")
    assert checkpoint.name == f"checkpoint-{len(read_log(tmp_path))}"
