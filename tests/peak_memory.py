"""How much memory a process took, for tests of it."""

from pathlib import Path

import pytest


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="peak memory is read from /proc, of Linux alone"
)


def peak_memory() -> int:
    """Of this process, in bytes. Not from getrusage, which begins with the peak of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
