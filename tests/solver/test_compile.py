"""Compiled and eager code choose the same codes, and what changes from step to step does not compile again."""

import importlib
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import optvq_hf
from grids import slow
from optvq_hf import OptVQQuantizer, nearest
from optvq_hf.sinkhorn import nearest_assign, plan_rows, potentials_assign, sinkhorn_assign
from reference import PAPER, points


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


def functions(solution):
    return {
        "nearest": nearest_assign,
        "potentials": lambda z, c: potentials_assign(z, c, solution.potentials, solution.scale),
        "sinkhorn": lambda z, c: sinkhorn_assign(z, c, **PAPER).codes,
        "warm": lambda z, c: sinkhorn_assign(z, c, **PAPER, potentials=solution.potentials).codes,
        "robust": lambda z, c: sinkhorn_assign(z, c, **{**PAPER, "normalization": "robust"}).codes,
        "streamed": lambda z, c: sinkhorn_assign(z, c, **PAPER, memory_budget=0).codes,
        "unbalanced": lambda z, c: (
            sinkhorn_assign(z, c, **PAPER, balance=0.5, target_marginals=torch.arange(1, 65)).codes
        ),
    }


@pytest.mark.parametrize(
    "name", ["nearest", "potentials", "sinkhorn", slow("warm"), slow("robust"), slow("streamed"), slow("unbalanced")]
)
def test_one_graph_with_the_same_codes(name):
    """Also of crowded codes, which rounding cannot tell apart, and for batches of any size with one graph more."""
    features, codebook = points(300, 64, 8)
    codebook[1::2] = codebook[::2] + 1e-6
    function = functions(sinkhorn_assign(features, codebook, **PAPER))[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for num_rows in (300, 7, 64, 129, 2):
        assert torch.equal(compiled(features[:num_rows], codebook), function(features[:num_rows], codebook))
    assert counter.frame_count <= 2


def test_the_checks_are_in_the_graph():
    compiled = torch.compile(nearest_assign, fullgraph=True, backend="aot_eager")
    compiled(*points(5, 3, 2))
    with pytest.raises(ValueError, match="NaN or inf in features"):
        compiled(torch.full((5, 2), torch.nan), torch.zeros(3, 2))


@pytest.mark.parametrize("assignment", ["nearest", slow("potentials"), slow("sinkhorn")])
@pytest.mark.parametrize("backend", ["aot_eager", slow("inductor")])
def test_a_quantizer_at_inference(assignment, backend):
    torch.manual_seed(0)
    quantizer = OptVQQuantizer(codebook_size=64, dim=8, num_heads=2, inference_assignment=assignment)
    quantizer(torch.randn(4, 8, 6, 6))
    quantizer.eval()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(quantizer, fullgraph=True, backend=counter)
    for batch_size in (4, 3, 7, 5, 2):  # a batch of 1 is a graph of its own, always, to PyTorch
        features = torch.randn(batch_size, 8, 6, 6)
        with torch.no_grad():
            assert torch.equal(compiled(features).codes, quantizer(features).codes)
    assert counter.frame_count <= 2


def test_an_epsilon_schedule_does_not_compile_again():
    torch.manual_seed(0)
    quantizer = OptVQQuantizer(codebook_size=64, dim=8).train()
    counter = CompileCounter()
    compiled = torch.compile(quantizer, backend=counter)
    counts = []
    for step in range(12):
        quantizer.epsilon, quantizer.balance = 10.0 * 1.2**step, 1 - 0.02 * step
        compiled(torch.randn(2, 8, 6, 6))
        counts.append(counter.frame_count)
    assert counts[-1] <= 2


def test_another_copy_of_the_code_has_operators_of_its_own(monkeypatch):
    """As remote code of a repository, beside the package."""
    copy = ModuleType("optvq_copy")
    copy.__path__ = [str(Path(optvq_hf.__file__).parent)]
    monkeypatch.setitem(sys.modules, "optvq_copy", copy)
    other = importlib.import_module("optvq_copy.nearest")
    monkeypatch.setattr(other, "best_codes", lambda features, *_: torch.full((len(features),), 7))
    features, codebook = points(30, 5, 4)
    for module, expected in ((other, torch.full((30,), 7)), (nearest, nearest_assign(features, codebook))):
        compiled = torch.compile(module.nearest_assign, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(features, codebook), expected)


def test_a_start_is_not_returned_itself():
    features, codebook = points(30, 5, 4, torch.float64)
    start = torch.zeros(5, dtype=torch.float64)
    solve = partial(sinkhorn_assign, features, codebook, **{**PAPER, "iterations": 0}, potentials=start)
    assert solve().potentials.data_ptr() != start.data_ptr()
    assert torch.equal(torch.compile(solve, backend="aot_eager")().potentials, start)


@pytest.mark.parametrize("cost", ["squared_euclidean", "cosine"])
def test_other_costs_choose_the_same_codes(cost):
    features, codebook = points(60, 10, 4)

    def codes_of(features):
        solution = sinkhorn_assign(features, codebook, cost=cost, **PAPER)
        stored = potentials_assign(features, codebook, solution.potentials, solution.scale, cost=cost)
        return solution.codes, stored, nearest_assign(features, codebook, cost=cost)

    compiled = torch.compile(codes_of, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(features), codes_of(features)))


@pytest.mark.parametrize("cost", ["euclidean", slow("squared_euclidean"), "cosine"])
@pytest.mark.parametrize("by_potentials", [False, slow(True)])
def test_exported_in_operators_of_torch_alone(cost, by_potentials):
    features, codebook = points(300, 64, 8)
    solution = sinkhorn_assign(features, codebook, cost=cost, **PAPER)

    def search(features, codebook):
        if by_potentials:
            return potentials_assign(features, codebook, solution.potentials, solution.scale, cost=cost)
        return nearest_assign(features, codebook, cost=cost)

    class Nearest(torch.nn.Module):
        def forward(self, features, codebook):
            return search(features, codebook)

    rows = torch.export.Dim("rows", min=1, max=4096)
    exported = torch.export.export(Nearest(), (features, codebook), dynamic_shapes=({0: rows}, None))
    assert "optvq_hf" not in exported.graph_module.code
    for num_rows in (300, 1, 17):
        codes = exported.module()(features[:num_rows], codebook)
        assert torch.equal(codes, search(features[:num_rows], codebook))


def test_four_threads_at_once():
    """The same codes, and the process's precision of matrix products is what it was before."""
    torch.manual_seed(0)
    quantizer = OptVQQuantizer(codebook_size=64, dim=8, inference_assignment="sinkhorn").eval()
    inputs = [torch.randn(2, 8, 12, 12) for _ in range(24)]
    features, codebook = points(500, 64, 8)

    def work(pixels):
        solution = sinkhorn_assign(features, codebook, **PAPER)
        return (
            quantizer(pixels).codes,
            solution.codes,
            plan_rows(features[:9], codebook, solution.potentials, solution.scale),
        )

    expected = [work(pixels) for pixels in inputs]
    backends = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        backends[0].fp32_precision = "bf16"
        for _ in range(5):
            with ThreadPoolExecutor(4) as pool:
                found = list(pool.map(work, inputs))
            assert backends[0].fp32_precision == "bf16" and backends[1].fp32_precision == before[1]
            for result, other in zip(found, expected):
                assert all(map(torch.equal, result, other))
    finally:
        for backend, precision in zip(backends, before):
            backend.fp32_precision = precision
