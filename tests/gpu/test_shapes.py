"""Every operation at the shapes of its benchmark, which on a GPU are the model's: the kernels agree
with the reference, give the same bits again, and give them from a captured graph too.

Without a GPU the benchmarks' small shapes show that this test itself is right.
"""

import pytest
import torch

from bench.sections import OPERATIONS
from bench.sections.operations import FIRST, cases_of, kind_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


def all_cases():
    """Size B stands for all. The optimizer changes its inputs; it has tests of its own."""
    return [
        pytest.param(case, id=f"{case.operation}, {case.name}")
        for operation in OPERATIONS
        for case in cases_of(operation, DEVICE)
        if case.operation != "adamw_ema" and "eager" in case.contenders and kind_of(case) == FIRST
    ]


def tensors(tree):
    if torch.is_tensor(tree):
        return [tree.detach()]
    if not isinstance(tree, tuple | list):
        return []
    return [x for part in tree for x in tensors(part)]


@pytest.mark.parametrize("case", all_cases())
def test_ours_is_eager_and_the_same_every_time(case):
    inputs = case.inputs()
    ours, eager = (case.contenders[name](inputs) for name in ("ours", "eager"))
    first, plain = tensors(ours()), tensors(eager())
    if len(first) != len(plain):  # a peer keeps more on the way; the gradient comes last
        first_to_compare, plain = first[-1:], plain[-1:]
    else:
        first_to_compare = first
    for found, expected in zip(first_to_compare, plain, strict=True):
        assert found.shape == expected.shape and found.dtype == expected.dtype
        assert bool(found.isfinite().all())
        error = (found.double() - expected.double()).norm() / expected.double().norm()
        assert float(error) < 0.05
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(tensors(ours()), first, strict=True))


@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("case", all_cases())
def test_a_captured_graph_gives_the_same_bits(case):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ours = case.contenders["ours"](case.inputs())
        expected = [x.clone() for x in tensors(ours())]
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = tensors(ours())
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
