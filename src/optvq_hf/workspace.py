"""Working memory of the solver on a CPU, kept from one call to the next.

A system hands out fresh memory page by page, which takes as long as solving, and in virtual machines much longer. So one piece
is kept. Between calls it is marked as free to take (MADV_FREE): the system does so as soon as memory is short, although
the process is seen to hold it. On a GPU torch keeps freed memory anyway.
"""

import mmap

import torch


# Without MADV_FREE nobody could take the memory back, so only this much is kept.
LARGEST_HELD = 2**28
# Below, marking the memory costs more than it is worth.
SMALLEST_FREED = 2**24

_kept: list[mmap.mmap] = []  # at most one; taken out while in use, so that no other thread gets it


class Workspace:
    """Uninitialised memory for one matrix.

    Args:
        shape: Of the matrix.
        dtype, device: Of the matrix.

    Attributes:
        matrix: The matrix; of no use after `release`.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device):
        num_elements = shape[0] * shape[1]
        self._memory = None
        if device.type != "cpu" or num_elements == 0 or torch.compiler.is_compiling():
            self.matrix = torch.empty(shape, dtype=dtype, device=device)
            return
        self._num_bytes = num_elements * dtype.itemsize
        self._memory = _take(self._num_bytes)
        # A new tensor each time: the last one may have been made in inference mode.
        self.matrix = torch.frombuffer(self._memory, dtype=dtype, count=num_elements).view(shape)

    def release(self) -> None:
        """Leaves the memory to the next workspace."""
        memory = self._memory
        if memory is not None:
            # A small matrix in a large piece leaves the rest of it marked as it was.
            is_small = self._num_bytes < SMALLEST_FREED
            if is_small or _advise(memory, "MADV_FREE", self._num_bytes) or len(memory) <= LARGEST_HELD:
                _kept[:] = [max([memory, *_kept], key=len)]  # another thread may have left one
        self._memory = self.matrix = None


def _take(num_bytes: int) -> mmap.mmap:
    try:
        memory = _kept.pop()
    except IndexError:
        memory = None
    if memory is None or len(memory) < num_bytes:
        memory = mmap.mmap(-1, num_bytes, access=mmap.ACCESS_COPY)  # private to this process
        _advise(memory, "MADV_HUGEPAGE", num_bytes)
    return memory


def _advise(memory: mmap.mmap, advice: str, num_bytes: int) -> bool:
    """About the first bytes of it; whether the system took the advice."""
    try:
        memory.madvise(getattr(mmap, advice), 0, num_bytes)
    except (AttributeError, OSError):  # another system than Linux, or a kernel without it
        return False
    return True
