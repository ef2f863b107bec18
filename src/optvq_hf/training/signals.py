"""Requests to stop: SIGTERM of a scheduler, SIGHUP of a lost terminal, Ctrl-C."""

import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from .processes import world_size


class StopRequest:
    """Context manager that records requests to stop instead of ending the process; they take effect at the end of a step.

    Schedulers may send SIGTERM more than once, so it never ends the process; a second Ctrl-C does. SIGHUP that is ignored, as
    under nohup, stays ignored.
    """

    def __init__(self, device: torch.device):
        self.device, self.noted, self.before = device, False, {}

    def __enter__(self) -> "StopRequest":
        self.before = _handle(self._note)
        return self

    def __exit__(self, *error: object) -> None:
        _restore(self.before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        _leave_lost_terminal()

    def agreed(self) -> bool:
        """Whether any process was asked to stop; all processes get the same answer."""
        if world_size() == 1:
            return self.noted
        asked = torch.tensor(float(self.noted), device=self.device)
        torch.distributed.all_reduce(asked)
        return asked.item() > 0


@contextmanager
def interrupted_by_requests() -> Iterator[None]:
    """Requests to stop raise KeyboardInterrupt at once, as Ctrl-C does, where there is no state to save."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        _leave_lost_terminal()
        raise KeyboardInterrupt

    before = _handle(interrupt)
    try:
        yield
    finally:
        _restore(before)


def _handle(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Sets the handler of all requests to stop that are not ignored; returns the handlers before."""
    if threading.current_thread() is not threading.main_thread():  # only it may set signal handlers
        return {}
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
    listened = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in listened}


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _leave_lost_terminal() -> None:
    """Sends further output nowhere if the terminal is gone: writing to it is an error, which must not cost the checkpoint."""
    for stream in (sys.stdout, sys.stderr):
        try:
            descriptor = stream.fileno()
            is_lost = stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor)
        except (OSError, ValueError, AttributeError):  # it has no file
            continue
        if is_lost:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
