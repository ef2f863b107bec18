import mmap

import pytest
import torch

from optvq_hf import workspace
from optvq_hf.workspace import Workspace


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(workspace, "_kept", [])


def take(*shape, dtype=torch.float32):
    return Workspace(shape, dtype, torch.device("cpu"))


def test_memory_is_used_again():
    first = take(8, 16)
    address = first.matrix.data_ptr()
    first.matrix.fill_(1.0)
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


def test_a_larger_matrix_gets_memory_of_its_own():
    first = take(8, 8)
    first.release()
    second = take(1024, 1024)
    second.matrix.fill_(1.0)
    second.release()
    [kept] = workspace._kept
    assert len(kept) == 4 * 1024**2


def test_no_rows():
    empty = take(0, 16)
    assert empty.matrix.shape == (0, 16)
    empty.release()
    assert workspace._kept == []


@pytest.mark.parametrize(("elements", "is_kept"), [(256, True), (512, True), (1024, False)])
def test_little_is_kept_where_the_system_cannot_take_it_back(monkeypatch, elements, is_kept):
    monkeypatch.delattr(mmap, "MADV_FREE", raising=False)
    monkeypatch.setattr(workspace, "SMALLEST_FREED", 1024)
    monkeypatch.setattr(workspace, "LARGEST_HELD", 2048)
    take(1, elements).release()
    assert bool(workspace._kept) == is_kept


@pytest.mark.skipif(not hasattr(mmap, "MADV_FREE"), reason="this system cannot mark memory as free to take")
def test_a_large_piece_survives_a_small_matrix(monkeypatch):
    monkeypatch.setattr(workspace, "SMALLEST_FREED", 1024)
    monkeypatch.setattr(workspace, "LARGEST_HELD", 0)
    take(64, 64).release()
    take(4, 4).release()
    assert [len(memory) for memory in workspace._kept] == [4 * 64 * 64]
