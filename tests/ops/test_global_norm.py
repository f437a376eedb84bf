"""The norm of many tensors against float64, at the ends of float32, and in one order every time."""

import math

import pytest
import torch

from heptapod_fast.ops import dispatch, library
from heptapod_fast.ops.global_norm import global_norm
from tests.numerics import check_compiles, check_operator, poisoned

# Around the kernels' groups (4, 8), threads (1024, 2048 elements) and chunks (16384).
SHAPES = [(1,), (3,), (17,), (1000,), (4097,), (), (0,), (33, 65), (2, 16_384), (16_385,), (7,)]


def device_of(implementation):
    return "cuda" if implementation == "cuda" else "cpu"


def draw(implementation, shapes=SHAPES, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (scale * torch.randn(shape, generator=generator)).to(device_of(implementation), dtype)
        for shape in shapes
    ]


def exact(tensors):
    """Python's own exactly rounded sum."""
    return math.sqrt(math.fsum(x * x for t in tensors for x in t.double().flatten().tolist()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_equals_the_exact_norm_to_one_rounding(implementation, dtype):
    tensors = draw(implementation, dtype=dtype)
    if implementation != "reference" and dtype not in (torch.float32, torch.bfloat16):
        with pytest.raises(dispatch.Unavailable, match="takes torch.float32 and torch.bfloat16"):
            global_norm(tensors, implementation)
        return
    norm = global_norm(tensors, implementation)
    assert norm.shape == () and norm.dtype == torch.float32
    assert norm.device == tensors[0].device and not norm.requires_grad
    assert abs(float(norm) - exact(tensors)) <= 2**-24 * exact(tensors)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_alone(implementation, shape):
    tensors = draw(implementation, [shape], seed=1)
    norm = float(global_norm(tensors, implementation))
    assert abs(norm - exact(tensors)) <= 2**-24 * exact(tensors)


def test_every_element_counts_once(implementation):
    """One element is 1 among zeros, wherever it is."""
    for size in (1, 5, 1024, 1025, 4096, 16_384, 20_000):
        for at in {0, size // 2, size - 1}:
            for dtype in (torch.float32, torch.bfloat16):
                tensor = torch.zeros(size, device=device_of(implementation), dtype=dtype)
                tensor[at] = 3.0
                assert float(global_norm([tensor], implementation)) == 3.0


def test_mixed_dtypes(implementation):
    tensors = [t.bfloat16() if i % 2 else t for i, t in enumerate(draw(implementation))]
    norm = float(global_norm(tensors, implementation))
    assert abs(norm - exact(tensors)) <= 2**-24 * exact(tensors)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_neither_overflow_nor_underflow_inside_float32(implementation, scale):
    tensors = draw(implementation, [(1000,), (30, 30)], scale=scale)
    norm = float(global_norm(tensors, implementation))
    assert abs(norm - exact(tensors)) <= 2**-24 * exact(tensors)


def test_a_norm_beyond_float32_is_infinite(implementation):
    tensors = [torch.full((100,), 3e38, device=device_of(implementation))]
    assert float(global_norm(tensors, implementation)) == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bad_elements_show(implementation, bad, dtype):
    for i, at in ((4, 4096), (3, 0), (9, 16_384)):
        tensors = draw(implementation, dtype=dtype)
        tensors[i].view(-1)[at] = bad
        norm = float(global_norm(tensors, implementation))
        assert math.isnan(norm) if math.isnan(bad) else norm == math.inf
    tensors[0].fill_(math.nan)
    assert math.isnan(float(global_norm(tensors, implementation)))


def test_same_bits_every_time_and_at_every_alignment(implementation):
    tensors = draw(implementation)
    first = global_norm(tensors, implementation)
    before = torch.get_num_threads()
    for threads, offset in ((2, 0), (1, 1), (2, 3)):
        moved = []
        for tensor in tensors:
            room = tensor.new_full((tensor.numel() + offset + 9,), math.nan)
            room[offset : offset + tensor.numel()] = tensor.flatten()
            moved.append(room[offset : offset + tensor.numel()].view(tensor.shape))
        torch.set_num_threads(threads)
        try:
            with poisoned():
                assert torch.equal(first, global_norm(moved, implementation))
        finally:
            torch.set_num_threads(before)


def test_many_tensors_take_several_launches(implementation):
    tensors = draw(implementation, [(1 + 7 * i % 50,) for i in range(2500)])
    norm = float(global_norm(tensors, implementation))
    assert abs(norm - exact(tensors)) <= 2**-24 * exact(tensors)


def test_empty_and_strided_tensors(implementation):
    empty = torch.zeros(0, 4, device=device_of(implementation))
    assert float(global_norm([empty], implementation)) == 0.0
    tensor = draw(implementation, [(40, 60)])[0]
    rows, columns = tensor[::2], tensor.t()
    assert abs(
        float(global_norm([rows, columns, empty], implementation)) - exact([rows, tensor])
    ) <= 2**-24 * exact([rows, tensor])


def test_gradients_of_gradients_are_not_recorded(implementation):
    tensor = draw(implementation, [(5,)])[0].requires_grad_()
    assert not global_norm([tensor], implementation).requires_grad


def test_wrong_arguments_are_refused(implementation):
    tensor = draw(implementation, [(5,)])[0]
    with pytest.raises(ValueError, match="at least one"):
        global_norm([], implementation)
    with pytest.raises(ValueError, match="number 1 is NoneType"):
        global_norm([tensor, None], implementation)
    with pytest.raises(ValueError, match="floating-point tensors; number 0 is torch.int64"):
        global_norm([tensor.long()], implementation)
    with pytest.raises(ValueError, match="one device; number 0 is on .*, number 1 on meta"):
        global_norm([tensor, torch.zeros(3, device="meta")], implementation)
    with pytest.raises(ValueError, match="auto, cuda, cpu, reference"):
        global_norm([tensor], "apex")


def test_auto_takes_the_kernels_where_they_can_run():
    choice = dispatch.choose("global_norm", "cpu", torch.float32)
    assert choice.implementation == ("cpu" if library.available("cpu") else "reference")
    assert dispatch.choose("global_norm", "cpu", torch.float16).implementation == "reference"


@pytest.mark.parametrize("name", ["global_norm", "sum_of_squares"])
def test_the_operators_check_and_compile(implementation, name):
    if implementation == "reference":
        pytest.skip("the reference is plain PyTorch, no operator of its own")
    tensors = draw(implementation, [(3,), (5, 7), (0,)])
    tensors[1] = tensors[1].bfloat16()
    operator = getattr(torch.ops.heptapod_fast, name).default
    check_operator(operator, tensors)
    found = operator(tensors).double()
    wanted = exact(tensors) if name == "global_norm" else exact(tensors) ** 2
    assert abs(float(found) - wanted) <= 1e-6 * wanted
    with pytest.raises(RuntimeError, match="float32 or bfloat16"):
        operator([tensors[0].half()])


def test_compiles_into_one_graph(implementation):
    def clip_scale(a, b):
        norm = global_norm([a, b], implementation)
        return norm, (1.0 / (norm + 1e-6)).clamp(max=1.0)

    check_compiles(clip_scale, draw(implementation, [(40, 7), (3,)]))


@pytest.mark.gpu
def test_a_cuda_graph_captures_it():
    if not (torch.cuda.is_available() and library.available("cuda")):
        pytest.skip("no CUDA device, or no CUDA operators")
    tensors = draw("cuda")
    global_norm(tensors, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = global_norm(tensors, "cuda")
    for scale in (1.0, 0.5):
        for tensor in tensors:
            tensor *= scale
        graph.replay()
        assert torch.equal(norm, global_norm(tensors, "cuda"))


@pytest.mark.gpu
def test_cpu_and_cuda_agree_to_one_rounding():
    if not (torch.cuda.is_available() and library.available("cuda")):
        pytest.skip("no CUDA device, or no CUDA operators")
    tensors = draw("cpu", [(3000, 1001), (5,)])
    there = global_norm([tensor.cuda() for tensor in tensors], "cuda").cpu()
    torch.testing.assert_close(there, global_norm(tensors, "cpu"), rtol=2**-23, atol=0.0)
