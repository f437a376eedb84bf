"""The fused optimizer step against torch.optim.AdamW, float64, and its own reference."""

import math

import pytest
import torch

from heptapod_fast.ops import dispatch, library
from heptapod_fast.ops.adamw_ema import adamw_ema

SHAPES = [(1,), (3,), (17,), (1000,), (4097,), (), (0,), (33, 65), (2, 40_000)]
BETAS, EPS = (0.9, 0.95), 1e-8


class State:
    """Parameters and everything that goes with them, made from a seed."""

    def __init__(
        self,
        device="cpu",
        decays=(0.99, 0.5),
        copies=True,
        shapes=SHAPES,
        seed=0,
        grad_dtype=torch.float32,
        dtype=torch.float32,
    ):
        self.generator = torch.Generator().manual_seed(seed)
        self.device, self.dtype, self.grad_dtype = device, dtype, grad_dtype
        self.shapes, self.decays = shapes, decays
        self.params = [self.draw(shape) for shape in shapes]
        self.exp_avgs = [torch.zeros_like(p) for p in self.params]
        self.exp_avg_sqs = [torch.zeros_like(p) for p in self.params]
        self.emas = [[p.clone() for p in self.params] for _ in decays]
        self.copies = [p.bfloat16() for p in self.params] if copies else None
        self.weight_decays = [0.1 * (i % 3) for i in range(len(shapes))]

    def draw(self, shape):
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def grads(self):
        return [self.draw(shape).to(self.grad_dtype) for shape in self.shapes]

    def scalar(self, value):
        return torch.tensor(value, device=self.device, dtype=torch.float32)

    def step(self, grads, step, implementation, lr=1e-3, grad_scale=1.0):
        adamw_ema(
            self.params,
            grads,
            self.exp_avgs,
            self.exp_avg_sqs,
            self.emas,
            lr=self.scalar(lr),
            step=self.scalar(float(step)),
            grad_scale=self.scalar(grad_scale),
            ema_decays=self.scalar(list(self.decays)),
            weight_decays=self.weight_decays,
            beta1=BETAS[0],
            beta2=BETAS[1],
            eps=EPS,
            copies=self.copies,
            implementation=implementation,
        )

    def tensors(self):
        lists = [self.params, self.exp_avgs, self.exp_avg_sqs, *self.emas, self.copies or []]
        return [tensor for tensors in lists for tensor in tensors]


def in_float64(state, grads, steps, lr, scale):
    """The formulas of the operation's docstring, in float64; returns params and averages."""
    results = []
    for i, param in enumerate(state.params):
        p = param.double().clone()
        m, v = torch.zeros_like(p), torch.zeros_like(p)
        emas = [p.clone() for _ in state.decays]
        for t in range(1, steps + 1):
            g = grads[t - 1][i].double() * scale
            m = BETAS[0] * m + (1 - BETAS[0]) * g
            v = BETAS[1] * v + (1 - BETAS[1]) * g * g
            root = (v / (1 - BETAS[1] ** t)).sqrt() + EPS
            p = (1 - lr * state.weight_decays[i]) * p - lr / (1 - BETAS[0] ** t) * m / root
            emas = [d * e + (1 - d) * p for d, e in zip(state.decays, emas)]
        results.append((p, emas))
    return results


def device_of(implementation):
    return "cuda" if implementation == "cuda" else "cpu"


def test_equals_torch_adamw(implementation):
    state = State(device_of(implementation))
    twins = [p.clone().requires_grad_() for p in state.params]
    groups = [{"params": [p], "weight_decay": wd} for p, wd in zip(twins, state.weight_decays)]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=BETAS, eps=EPS, foreach=False)
    for step in range(1, 8):
        grads = state.grads()
        for twin, grad in zip(twins, grads):
            twin.grad = grad.clone()
        optimizer.step()
        state.step(grads, step, implementation)
    for i, twin in enumerate(twins):
        theirs = optimizer.state[twin]
        torch.testing.assert_close(state.params[i], twin.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(state.exp_avgs[i], theirs["exp_avg"], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(state.exp_avg_sqs[i], theirs["exp_avg_sq"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decays", [(), (0.999,), (0.0, 0.9, 0.99, 0.9999)])
def test_against_float64(implementation, decays, grad_dtype):
    state = State(device_of(implementation), decays, grad_dtype=grad_dtype)
    grads = [state.grads() for _ in range(5)]
    expected = in_float64(state, grads, 5, lr=3e-2, scale=0.25)
    for step in range(1, 6):
        state.step(grads[step - 1], step, implementation, lr=3e-2, grad_scale=0.25)
    for i, (param, emas) in enumerate(expected):
        # A few roundings of 6e-8 per step, of numbers of size 1 to 4.
        torch.testing.assert_close(state.params[i].double(), param, rtol=1e-6, atol=1e-6)
        for ours, average in zip(state.emas, emas):
            torch.testing.assert_close(ours[i].double(), average, rtol=1e-6, atol=1e-6)
        assert torch.equal(state.copies[i], state.params[i].bfloat16())
        if 0.0 in decays:
            assert torch.equal(state.emas[0][i], state.params[i])


def test_compiled_is_within_roundings_of_the_reference(implementation):
    ours, theirs = State(device_of(implementation)), State(device_of(implementation))
    for step in range(1, 4):
        grads = ours.grads()
        ours.step(grads, step, implementation)
        theirs.step(grads, step, "reference")
    for mine, other in zip(ours.tensors(), theirs.tensors()):
        tolerance = 2**-7 if mine.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_a_zero_grad_scale_changes_no_bit(implementation, bad):
    state = State(device_of(implementation))
    state.step(state.grads(), 1, implementation)
    before = [tensor.clone() for tensor in state.tensors()]
    grads = [torch.full_like(grad, bad) for grad in state.grads()]
    state.step(grads, 2, implementation, grad_scale=0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, state.tensors()))
    state.step(state.grads(), 2, implementation, grad_scale=1.0)
    assert not torch.equal(before[3], state.params[3])


def test_bad_gradients_are_not_hidden(implementation):
    state = State(device_of(implementation))
    grads = state.grads()
    grads[3][5] = math.nan
    # This NaN's bits overflow into a zero if a copy is rounded without looking at them.
    state.params[3][7:8].view(torch.int32).fill_(0x7FFFFFFF)
    state.step(grads, 1, implementation)
    for tensors in (state.params, state.copies, state.emas[1]):
        assert tensors[3].isnan().nonzero().flatten().tolist() == [5, 7]


def test_same_bits_every_time_and_at_every_alignment(implementation):
    device = device_of(implementation)
    results = []
    for offset, threads in ((0, 2), (1, 1), (0, 1)):
        state = State(device)
        grads = state.grads()

        def shifted(tensor, offset=offset):
            flat = torch.zeros(tensor.numel() + offset, device=device, dtype=tensor.dtype)[offset:]
            return flat.copy_(tensor.flatten()).view(tensor.shape)

        state.params = [shifted(tensor) for tensor in state.params]
        grads = [shifted(grad) for grad in grads]
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            state.step(grads, 1, implementation)
        finally:
            torch.set_num_threads(before)
        results.append(state.tensors())
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others))


def test_same_bits_at_every_alignment_and_tail_after_several_steps(implementation):
    """Every element goes through the same arithmetic, wherever it is in memory.

    From zero moments a first step would hide a contracted product: 0 * beta2 rounds to nothing.
    """
    device = device_of(implementation)
    whole = State(device, shapes=[(67,)])
    whole.weight_decays = [0.1]
    whole.exp_avgs[0].copy_(whole.draw((67,)))
    whole.exp_avg_sqs[0].copy_(whole.draw((67,)).square())
    grads = [whole.grads()[0] for _ in range(4)]
    slices = [(begin, end) for begin in range(5) for end in (62, 63, 64, 67)]
    parts = []
    for begin, end in slices:
        part = State(device, shapes=[(end - begin,)])
        part.weight_decays = [0.1]
        for mine, tensor in zip(part.tensors(), whole.tensors()):
            room = torch.zeros_like(tensor)  # of the same alignment
            room[begin:end] = tensor[begin:end]
            mine.set_(room[begin:end])
        parts.append(part)
    for step, grad in enumerate(grads, start=3):
        whole.step([grad], step, implementation)
        for (begin, end), part in zip(slices, parts):
            part.step([grad.clone()[begin:end]], step, implementation)
    for (begin, end), part in zip(slices, parts):
        for mine, tensor in zip(part.tensors(), whole.tensors()):
            assert torch.equal(mine, tensor[begin:end]), (begin, end)


def test_many_tensors_take_several_launches(implementation):
    shapes = [(1 + 7 * i % 50,) for i in range(700)]
    ours = State(device_of(implementation), shapes=shapes)
    theirs = State(device_of(implementation), shapes=shapes)
    grads = ours.grads()
    ours.step(grads, 1, implementation)
    theirs.step(grads, 1, "reference")
    for mine, other in zip(ours.params, theirs.params):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [5, 8, 9])
def test_any_number_of_averages(implementation, count):
    """More than one pass takes: the same bits as each average has by itself."""
    decays = tuple(1 - 0.7**e for e in range(count))
    ours = State(device_of(implementation), decays)
    alone = [State(device_of(implementation), decays[e : e + 1]) for e in range(count)]
    for step in range(1, 3):
        grads = ours.grads()
        ours.step(grads, step, implementation)
        for state in alone:
            state.step(grads, step, implementation)
    for e, state in enumerate(alone):
        assert all(map(torch.equal, ours.params, state.params))
        assert all(map(torch.equal, ours.emas[e], state.emas[0])), f"average {e}"
    before = [tensor.clone() for tensor in ours.tensors()]
    ours.step(grads, 3, implementation, grad_scale=0.0)
    assert all(map(torch.equal, before, ours.tensors()))


def test_a_graph_that_needs_the_old_values_finds_out(implementation):
    state = State("cuda" if implementation == "cuda" else "cpu", shapes=[(5,)])
    param = state.params[0].requires_grad_()
    loss = (param**2).sum()
    state.params = [param.detach()]
    state.step(state.grads(), 1, implementation)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_scalars_that_are_no_tensors_are_refused(implementation):
    device = "cuda" if implementation == "cuda" else "cpu"
    state = State(device, shapes=[(5,)])
    state.scalar = lambda value: value
    with pytest.raises(ValueError, match="lr as a float32 tensor.*got float"):
        state.step(state.grads(), 1, implementation)


def test_no_parameters_no_copies(implementation):
    State(device_of(implementation), shapes=[]).step([], 1, implementation)
    state = State(device_of(implementation), copies=False, decays=())
    before = state.params[3].clone()
    state.step(state.grads(), 1, implementation)
    assert not torch.equal(before, state.params[3])


@pytest.mark.parametrize("layout", ["column", "expanded", "every other"])
def test_strides_of_the_decays_do_not_matter(implementation, layout):
    decays = (0.9, 0.9) if layout == "expanded" else (0.9, 0.25)
    plain, strided = (State(device_of(implementation), decays) for _ in range(2))
    table = plain.scalar([[0.9, 0.1], [0.25, 0.7]])
    column = table[:, 0]
    same = plain.scalar(0.9).expand(2)
    wide = plain.scalar([0.9, 0.1, 0.25])[::2]
    found = {"column": column, "expanded": same, "every other": wide}[layout]
    assert not found.is_contiguous() and found.tolist() == plain.scalar(list(decays)).tolist()

    make = strided.scalar
    strided.scalar = lambda value: found if isinstance(value, list) else make(value)
    grads = plain.grads()
    plain.step(grads, 1, implementation)
    strided.step(grads, 1, implementation)
    assert all(map(torch.equal, plain.tensors(), strided.tensors()))


@pytest.mark.parametrize(
    "place, change, message",
    [
        (6, torch.Tensor.double, "lr, step and grad_scale are float32"),
        (7, lambda x: x.repeat(2), "one element each"),
        (8, torch.Tensor.half, "lr, step and grad_scale are float32"),
        (9, torch.Tensor.double, "ema_decays are float32 and contiguous"),
        (9, lambda x: x.repeat_interleave(2)[::2], "ema_decays are float32 and contiguous"),
    ],
)
def test_the_operator_refuses_what_it_would_misread(implementation, place, change, message):
    if implementation == "reference":
        pytest.skip("the reference is plain PyTorch, no operator of its own")
    state = State(device_of(implementation), shapes=[(5,)])
    given = list(arguments(state, state.emas))
    given[place] = change(given[place])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.heptapod_fast.adamw_ema.default(*given)


def test_weight_decay_is_not_rounded_before_it_is_used(implementation):
    """lr * decay is 1 - 2^-24 here, and 1 with the decay as a float32: p would become 0."""
    state = State(device_of(implementation), shapes=[(5,)], decays=())
    before = state.params[0].clone()
    state.weight_decays = [1 - 2**-26]
    grads = [torch.zeros_like(before)]
    state.step(grads, 1, implementation, lr=1.0)
    assert torch.equal(state.params[0], before * 2**-26)


def spoil(state, grads, what):
    """One wrong argument each; the message must name what is supported."""
    if what == "non-contiguous params":
        state.params[7] = state.params[7].t().contiguous().t()
    elif what == "float16 grads":
        grads[0] = grads[0].half()
    elif what == "mixed grads":
        grads[1] = grads[1].bfloat16()
    elif what == "float32 copies":
        state.copies[2] = state.copies[2].float()
    elif what == "short list":
        state.exp_avgs.pop()
    elif what == "wrong shape":
        state.exp_avg_sqs[3] = state.exp_avg_sqs[3][:-1]
    elif what == "short average":
        state.emas[1].pop()
    elif what == "decays":
        state.decays = (0.9,)


@pytest.mark.parametrize(
    "what, message",
    [
        ("non-contiguous params", r"params contiguous.*params\[7\] is non-contiguous"),
        ("float16 grads", "float32 or bfloat16"),
        ("mixed grads", "all alike"),
        ("float32 copies", "copies contiguous, bfloat16"),
        ("short list", "9 params, 8 exp_avgs"),
        ("wrong shape", "of the params' shapes"),
        ("short average", r"8 emas\[1\]"),
        ("decays", r"ema_decays as float32 of shape \(2,\)"),
    ],
)
def test_wrong_arguments_are_refused(implementation, what, message):
    state = State(device_of(implementation))
    grads = state.grads()
    spoil(state, grads, what)
    before = state.params[3].clone()
    with pytest.raises(ValueError, match=message):
        state.step(grads, 1, implementation)
    assert torch.equal(before, state.params[3])


def test_float64_parameters_and_unknown_names_are_refused():
    state = State(dtype=torch.float64, grad_dtype=torch.float64)
    with pytest.raises(ValueError, match="float32"):
        state.step(state.grads(), 1, "reference")
    with pytest.raises(ValueError, match="auto, cuda, cpu, reference"):
        State().step(State().grads(), 1, "apex")
    if not torch.cuda.is_available():
        with pytest.raises(dispatch.Unavailable, match="cuda tensors"):
            State().step(State().grads(), 1, "cuda")


def arguments(state, emas):
    flat = [average for ema in emas for average in ema]
    return (
        state.params,
        state.grads(),
        state.exp_avgs,
        state.exp_avg_sqs,
        flat,
        state.copies or [],
        state.scalar(1e-3),
        state.scalar(1.0),
        state.scalar(1.0),
        state.scalar(list(state.decays)),
        state.weight_decays,
        *BETAS,
        EPS,
    )


@pytest.mark.parametrize("copies", [True, False])
def test_opcheck(implementation, copies):
    if implementation == "reference":
        pytest.skip("the reference is plain PyTorch, no operator of its own")
    state = State(device_of(implementation), shapes=[(3,), (5, 7)], copies=copies)
    torch.library.opcheck(torch.ops.heptapod_fast.adamw_ema.default, arguments(state, state.emas))


def test_compiles_into_one_graph(implementation):
    ours, theirs = (State(device_of(implementation), shapes=[(3,), (40, 7)]) for _ in range(2))

    def step(state, grads, lr, now, scale, decays):
        adamw_ema(
            state.params,
            grads,
            state.exp_avgs,
            state.exp_avg_sqs,
            state.emas,
            lr=lr,
            step=now,
            grad_scale=scale,
            ema_decays=decays,
            weight_decays=state.weight_decays,
            beta1=BETAS[0],
            beta2=BETAS[1],
            eps=EPS,
            copies=state.copies,
            implementation=implementation,
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for now in range(1, 4):
        grads = ours.grads()
        scalars = (
            ours.scalar(1e-3),
            ours.scalar(float(now)),
            ours.scalar(0.5),
            ours.scalar(list(ours.decays)),
        )
        compiled(ours, grads, *scalars)
        step(theirs, grads, *scalars)
    for mine, other in zip(ours.tensors(), theirs.tensors()):
        if implementation == "reference":  # the compiler rounds lerp and addcdiv differently
            tolerance = 2**-7 if mine.dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(mine, other, rtol=tolerance, atol=1e-6)
        else:
            assert torch.equal(mine, other)


@pytest.mark.gpu
def test_one_cuda_graph_serves_every_step():
    if not (torch.cuda.is_available() and library.available("cuda")):
        pytest.skip("no CUDA device, or no CUDA operators")
    ours, theirs = State("cuda"), State("cuda")
    grads = ours.grads()
    lr, now, scale = ours.scalar(0.0), ours.scalar(0.0), ours.scalar(0.0)
    decays = ours.scalar(list(ours.decays))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adamw_ema(
            ours.params,
            grads,
            ours.exp_avgs,
            ours.exp_avg_sqs,
            ours.emas,
            lr=lr,
            step=now,
            grad_scale=scale,
            ema_decays=decays,
            weight_decays=ours.weight_decays,
            beta1=BETAS[0],
            beta2=BETAS[1],
            eps=EPS,
            copies=ours.copies,
            implementation="cuda",
        )
    for step in range(1, 4):
        lr.fill_(1e-3 / step), now.fill_(step), scale.fill_(1.0)
        graph.replay()
        theirs.step(grads, step, "cuda", lr=1e-3 / step)
    assert all(torch.equal(a, b) for a, b in zip(ours.tensors(), theirs.tensors()))
