"""Every operation at the shapes of its benchmark, which on a GPU are the model's: the kernels agree
with the reference, give the same bits again, and give them from a captured graph too.

Without a GPU the benchmarks' small shapes show that this test itself is right.
"""

import importlib

import pytest
import torch

from bench.gpu_sections import OPERATIONS, SIZED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


def all_cases():
    found = []
    for operation in OPERATIONS:
        for case in importlib.import_module(f"bench.bench_{operation}").cases(DEVICE):
            # The optimizer changes its inputs; it has tests of its own. Size B stands for all.
            if case.operation != "adamw_ema" and "eager" in case.contenders:
                if not SIZED.search(case.name):
                    found.append(pytest.param(case, id=f"{case.operation}, {case.name}"))
    return found


def tensors(tree):
    if torch.is_tensor(tree):
        return [tree.detach()]
    return [x for part in tree for x in tensors(part)] if isinstance(tree, tuple | list) else []


@pytest.mark.parametrize("case", all_cases())
def test_ours_is_eager_and_the_same_every_time(case):
    inputs = case.inputs()
    ours, eager = (case.contenders[name](inputs) for name in ("ours", "eager"))
    first, plain = tensors(ours()), tensors(eager())
    # Contenders may return more than the gradients, which come last.
    for found, expected in (
        zip(first, plain) if len(first) == len(plain) else [(first[-1], plain[-1])]
    ):
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
