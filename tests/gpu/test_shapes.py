"""Every operation at the shapes of its benchmark, which on a GPU are the model's: the kernels agree
with the reference in float32, give the same bits again, and give them from a captured graph too.

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


def in_float32(tree):
    """The same inputs with bfloat16 tensors widened.

    PyTorch's own operators in bfloat16 may sum the gradients of a norm's parameters in bfloat16
    (6 % off at 4,736 rows on some processors), so in bfloat16 they are no measure.
    """
    if isinstance(tree, tuple | list):
        make = getattr(type(tree), "_make", type(tree))  # a named tuple takes its parts one by one
        return make([in_float32(part) for part in tree])
    if not torch.is_tensor(tree) or tree.dtype != torch.bfloat16:
        return tree
    return tree.detach().float().requires_grad_(tree.requires_grad)


@pytest.mark.parametrize("case", all_cases())
def test_ours_is_eager_and_the_same_every_time(case):
    inputs = case.inputs()
    ours = case.contenders["ours"](inputs)
    first = tensors(ours())
    dtypes = [x.dtype for x in tensors(case.contenders["eager"](inputs)())]
    plain = tensors(case.contenders["eager"](in_float32(inputs))())
    if len(first) != len(plain):  # a peer keeps more on the way; the gradient comes last
        first_to_compare, plain, dtypes = first[-1:], plain[-1:], dtypes[-1:]
    else:
        first_to_compare = first
    for found, expected, dtype in zip(first_to_compare, plain, dtypes, strict=True):
        assert found.shape == expected.shape and found.dtype == dtype
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
