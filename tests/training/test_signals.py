"""Requests to end are noted; the second Ctrl-C is not. The kills of whole runs are in test_resume.py."""

import os
import signal

import pytest
import torch

from optvq_hf.training.signals import StopRequest


NUMBERS = (signal.SIGTERM, signal.SIGINT)


def test_requests_are_noted_until_the_end():
    before = [signal.getsignal(number) for number in NUMBERS]
    with StopRequest(torch.device("cpu")) as stop:
        assert not stop.agreed()
        for _ in range(2):  # schedulers repeat themselves
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.agreed()
    assert [signal.getsignal(number) for number in NUMBERS] == before


def test_the_second_ctrl_c_ends_the_process():
    with pytest.raises(KeyboardInterrupt), StopRequest(torch.device("cpu")) as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.agreed()
        signal.raise_signal(signal.SIGINT)
