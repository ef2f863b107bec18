"""How long the parts of a step take."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Adds up seconds by name: `with stopwatch("waiting for data"): ...`.

    Attributes:
        seconds: By name, from the beginning. On GPUs, where calls return before their work is done, of the calls alone.
    """

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - before
