"""A request to end (SIGTERM of a scheduler, Ctrl-C) that waits for the end of a step."""

import signal

import torch

from .processes import world_size


# With several processes a request must be known to all before any of them ends; asking costs them a meeting.
STEPS_BETWEEN_MEETINGS = 10


class StopRequest:
    """Context manager in which SIGTERM and SIGINT are noted instead of ending the process; a second one ends it at once."""

    signals = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, device: torch.device):
        self.device, self.name, self.before = device, None, {}

    def __enter__(self) -> "StopRequest":
        try:
            self.before = {number: signal.signal(number, self._note) for number in self.signals}
        except ValueError:  # not in the main thread, which alone may handle signals
            self.before = {}
        return self

    def __exit__(self, *error):
        self._restore()

    def _note(self, number: int, frame):
        self.name = signal.Signals(number).name
        self._restore()

    def _restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def agreed(self, step: int) -> bool:
        """Whether the run is to end after this step, in every process alike."""
        if world_size() == 1:
            return self.name is not None
        if step % STEPS_BETWEEN_MEETINGS:
            return False
        asked = torch.tensor(float(self.name is not None), device=self.device)
        torch.distributed.all_reduce(asked)
        return asked.item() > 0
