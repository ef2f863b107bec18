"""The solver's memory, which is kept from call to call."""

import mmap
import threading

import pytest
import torch

from optvq_hf import distances
from optvq_hf.distances import KeptMatrix


pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_FREE"), reason="this system cannot mark memory as free to take")


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(distances, "_kept_memory", [])


def take(*shape, dtype=torch.float32):
    return KeptMatrix(shape, torch.empty(0, dtype=dtype))


def test_memory_is_used_again():
    first = take(8, 16)
    address = first.matrix.data_ptr()
    first.release()
    second = take(4, 8, dtype=torch.float64)
    assert second.matrix.data_ptr() == address and second.matrix.shape == (4, 8)
    second.matrix.fill_(2.0)
    assert (second.matrix == 2).all()


def test_memory_in_use_is_not_handed_out():
    first, second = take(8, 8), take(8, 8)
    first.matrix.fill_(1.0)
    second.matrix.fill_(2.0)
    assert (first.matrix == 1).all() and (second.matrix == 2).all()


def test_the_largest_piece_is_kept():
    first, second = take(8, 8), take(1024, 1024)
    second.release()
    first.release()
    assert [len(memory) for memory in distances._kept_memory] == [4 * 1024**2]


def test_a_large_piece_is_marked_as_free(monkeypatch):
    monkeypatch.setattr(distances, "SMALLEST_FREED", 1024)
    large = take(64, 64)
    large.matrix.fill_(1.0)
    large.release()  # the system may take its pages from here on
    take(4, 4).release()  # nothing is marked
    assert [len(memory) for memory in distances._kept_memory] == [4 * 64 * 64]


def test_no_rows():
    empty = take(0, 16)
    assert empty.matrix.shape == (0, 16)
    empty.release()
    assert distances._kept_memory == []
    with torch.device("meta"):
        assert KeptMatrix((3, 4), torch.empty(0)).matrix.shape == (3, 4)


def test_nothing_is_kept_where_the_system_could_not_take_it_back(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_FREE")
    take(64, 64).release()
    assert distances._kept_memory == []


def test_a_piece_taken_meanwhile_is_not_put_back(monkeypatch):
    """Another thread takes the kept piece while this one is put back: it waits, so that no two threads have one piece."""
    kept, mine = take(64, 64), take(4, 4)
    kept.release()
    taken = []

    class Watched(list):
        def __iter__(self):
            thread = threading.Thread(target=lambda: taken.append(take(64, 64)))
            thread.start()
            thread.join(timeout=0.5)
            threads.append(thread)
            return super().__iter__()

    threads: list[threading.Thread] = []
    monkeypatch.setattr(distances, "_kept_memory", Watched(distances._kept_memory))
    mine.release()
    threads[0].join()
    following = take(64, 64)
    assert following.matrix.data_ptr() != taken[0].matrix.data_ptr()
