"""Requests to stop (SIGTERM of a scheduler, Ctrl-C), which take effect at the end of a step."""

import signal
import threading
from types import FrameType

import torch

from .processes import world_size


class StopRequest:
    """Context manager that records SIGTERM and SIGINT instead of ending the process.

    Schedulers may send SIGTERM more than once, so it never ends the process; a second Ctrl-C does.
    """

    def __init__(self, device: torch.device):
        self.device, self.noted, self.before = device, False, {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # only it may set signal handlers
            self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self) -> bool:
        """Whether any process was asked to stop; all processes get the same answer."""
        if world_size() == 1:
            return self.noted
        asked = torch.tensor(float(self.noted), device=self.device)
        torch.distributed.all_reduce(asked)
        return asked.item() > 0
