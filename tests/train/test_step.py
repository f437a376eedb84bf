"""A step as three functions over fixed buffers: load, forward_backward, update."""

import pytest
import torch

from heptapod_fast.ops.dispatch import Operators
from heptapod_fast.rng import Rng
from heptapod_fast.systems import Loss
from heptapod_fast.train.loop import begin_phase, training_step
from heptapod_fast.train.metrics import Meter
from heptapod_fast.train.optimizer import Optimizer
from heptapod_fast.train.parallelize import Parallel
from heptapod_fast.train.step import Buffers, forward_backward, load, update
from tests.conftest import small_batch, small_config, small_system
from tests.running import CPU, start_here, train_here

KINDS = {
    "codes": {"tokens": "discrete"},
    "vectors": {"tokens": "continuous"},
    "local": {"tokens": "discrete", "head": "local", "window": 4},
    # The sum of weights of a batch is not the expected one.
    "uniform steps": {"tokens": "discrete", "steps": "uniform"},
    "1d": {"tokens": "discrete", "system": "1d-random"},
}
PLAIN = Operators({"adamw_ema": "reference", "global_norm": "reference"})


class Source:
    """Gives `small_batch` of a system."""

    def __init__(self, system):
        self.system = system

    def batch(self, index):
        """The batch of these global sample indices."""
        return small_batch(self.system, len(index), int(index[0]))


def buffers_of(system, micro_batch):
    return Buffers.allocate(system.spec, micro_batch, torch.device("cpu"))


def phase_of(system):
    return system.phase(0, 64)


def gradients(system, micro_batch, batch=8):
    """(the sums of a step's micro-batches, its gradients) without an optimizer."""
    buffers = buffers_of(system, micro_batch)
    phase = phase_of(system)
    expected = system.expected_count(batch, phase)
    source = Source(system)
    for first in range(0, batch, micro_batch):
        load(source, first, buffers)
        forward_backward(system, buffers, Rng(0), expected, phase)
    found = {name: parameter.grad.clone() for name, parameter in system.named_parameters()}
    system.zero_grad(set_to_none=True)
    return buffers.sums.clone(), found


def optimizer_of(system):
    return Optimizer(system, small_config(clip=0.0).recipe, PLAIN)


# ------------------------------------------------------------------------------------- the buffers


@pytest.mark.parametrize("kind", ["codes", "vectors"])
def test_buffers_have_the_shape_of_a_micro_batch(kind):
    system = small_system(**KINDS[kind])
    buffers = buffers_of(system, 4)
    batch = small_batch(system, 4)
    for name in ("tokens", "labels", "index"):
        fixed, given = getattr(buffers.batch, name), getattr(batch, name)
        assert fixed.shape == given.shape
        assert fixed.dtype == given.dtype
    assert buffers.sums.dtype == torch.float64
    assert buffers.sums.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", ["codes", "vectors"])
def test_load_fills_them_with_the_samples_from_an_index_on(kind):
    system = small_system(**KINDS[kind])
    buffers = buffers_of(system, 4)
    load(Source(system), 12, buffers)
    expected = small_batch(system, 4, first=12)
    assert torch.equal(buffers.batch.tokens, expected.tokens)
    assert torch.equal(buffers.batch.labels, expected.labels)
    assert buffers.batch.index.tolist() == [12, 13, 14, 15]


def test_load_keeps_no_tensor_of_the_source():
    """A source may hand out parts of what it holds: nothing that is done to the buffers may reach
    it."""
    system = small_system()
    buffers = buffers_of(system, 4)
    batch = small_batch(system, 4)
    given = batch.tokens.clone()

    class Constant:
        """Always the same tensors."""

        def batch(self, index):
            return batch

    load(Constant(), 0, buffers)
    buffers.batch.tokens.zero_()
    assert torch.equal(batch.tokens, given)


def addresses(session):
    """{name: where it lies} of all that a step reads and writes, gradients aside."""
    buffers, optimizer = session.buffers, session.optimizer
    tensors = {**vars(buffers.batch), "sums": buffers.sums}
    for file, named in optimizer.files().items():
        for name, tensor in named.items():
            tensors[f"{file}.{name}"] = tensor
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


def test_every_step_uses_the_same_addresses(tmp_path):
    """What a graph of a step needs: the tensors that it reads and writes do not move."""
    session, state = start_here(tmp_path, micro_batch=4)
    phase = begin_phase(session, state, Meter(64, None, 1))
    before = addresses(session)
    assert len(before) > 20
    last_loaded = []
    for _ in range(3):
        training_step(session, state, phase)
        last_loaded.append(session.buffers.batch.index.tolist())
    assert addresses(session) == before
    # Of each step the second micro-batch.
    assert last_loaded == [[4, 5, 6, 7], [12, 13, 14, 15], [20, 21, 22, 23]]


# ------------------------------------------------------------------------------------ the gradients


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_add_up_to_the_gradient_of_the_whole_batch(kind):
    system = small_system(**KINDS[kind])
    sums, whole = gradients(system, micro_batch=8)
    for micro_batch in (2, 4):
        part_sums, parts = gradients(system, micro_batch)
        torch.testing.assert_close(part_sums, sums, rtol=1e-5, atol=0)
        assert parts.keys() == whole.keys()
        largest = max(float(gradient.abs().max()) for gradient in whole.values())
        for name, gradient in whole.items():
            torch.testing.assert_close(
                parts[name], gradient, rtol=1e-3, atol=1e-5 * largest, msg=name
            )


def test_a_step_that_is_repeated_has_the_same_bits():
    """Nothing of the host comes in: no counter, no clock, no generator that moves on."""
    system = small_system(dropout=0.1)
    system.train()
    first_sums, first = gradients(system, micro_batch=4)
    torch.manual_seed(1234)
    second_sums, second = gradients(system, micro_batch=4)
    assert torch.equal(first_sums, second_sums)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_host_does_not_look_at_what_the_device_has():
    """No number comes back to the host between load and update: meta tensors have none to give."""
    spec = small_system().spec
    buffers = Buffers.allocate(spec, 4, torch.device("meta"))
    parameter = torch.nn.Parameter(torch.ones(3, device="meta"))

    def alone(batch, rng, phase):
        """A model of one parameter, whose loss needs nothing of the batch."""
        total = parameter.sum()
        return Loss(total, total.detach())

    forward_backward(alone, buffers, Rng(0), 8.0, None)
    assert parameter.grad.shape == (3,)
    assert buffers.sums.shape == (2,)


# ------------------------------------------------------------------------------------ the update


@pytest.mark.parametrize("kind", KINDS)
def test_the_update_uses_the_gradient_of_the_mean_over_the_global_batch(kind):
    """Whatever was expected: the gradient of sum(total) / sum(count), and its norm."""
    system = small_system(**KINDS[kind])
    batch = small_batch(system, 8)
    phase = phase_of(system)
    loss = system.loss(batch, Rng(0), phase)
    named = dict(system.named_parameters())
    plain = torch.autograd.grad(loss.mean, list(named.values()), allow_unused=True)
    used = [gradient for gradient in plain if gradient is not None]
    norm = torch.stack([gradient.norm() for gradient in used]).norm()
    results = []
    for factor in (1.0, 1.7):
        twin = small_system(**KINDS[kind])
        optimizer = optimizer_of(twin)
        buffers = buffers_of(twin, 4)
        expected = factor * twin.expected_count(8, phase)
        for first in (0, 4):
            load(Source(twin), first, buffers)
            forward_backward(twin, buffers, Rng(0), expected, phase)
        optimizer.begin(1e-2)
        results.append(update(optimizer, CPU, buffers.sums, expected))
    for mean, found in results:
        torch.testing.assert_close(found, norm, rtol=1e-4, atol=1e-6)
        assert float(mean) == pytest.approx(float(loss.mean.detach()), rel=1e-5)


def test_the_sum_of_weights_is_not_the_expected_one_where_steps_are_drawn_alone():
    """Or the correction by expected / true would be shown by nothing."""
    system = small_system(**KINDS["uniform steps"])
    loss = system.loss(small_batch(system, 8), Rng(0), phase_of(system))
    assert float(loss.count) != system.expected_count(8, phase_of(system))


def test_gradients_are_dropped_after_the_update():
    system = small_system()
    optimizer = optimizer_of(system)
    buffers = buffers_of(system, 8)
    load(Source(system), 0, buffers)
    forward_backward(system, buffers, Rng(0), system.expected_count(8), phase_of(system))
    optimizer.begin(1e-2)
    update(optimizer, CPU, buffers.sums, system.expected_count(8))
    assert all(parameter.grad is None for parameter in system.parameters())


def test_a_step_of_training_is_these_three(tmp_path):
    """`training_step` over a session gives what the functions give by hand."""
    settings = {"precision": "fp32", "steps": "uniform", "micro_batch": 2}
    session, state = start_here(tmp_path / "a", **settings)
    phase = begin_phase(session, state, Meter(64, None, 1))
    mean, norm = training_step(session, state, phase)
    assert state.images == 8

    whole, state = start_here(tmp_path / "b", **settings)
    loss = whole.system.loss(whole.source.batch(torch.arange(8)), whole.rng, phase)
    assert float(loss.count) != whole.system.expected_count(8, phase)
    gradients = torch.autograd.grad(loss.mean, whole.optimizer.parameters)
    expected = torch.stack([gradient.norm() for gradient in gradients]).norm()
    torch.testing.assert_close(norm, expected, rtol=1e-4, atol=1e-6)
    assert float(mean) == pytest.approx(float(loss.mean.detach()), rel=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_the_step_does_not_depend_on_micro_batches(tmp_path, micro_batch):
    found = []
    for size in (8, micro_batch):
        settings = {"precision": "fp32", "steps": "uniform", "micro_batch": size}
        session, state = start_here(tmp_path / str(size), **settings)
        phase = begin_phase(session, state, Meter(64, None, 1))
        found.append(training_step(session, state, phase))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------ the wrapper


def test_steps_call_what_wrapping_made_of_the_system(tmp_path, monkeypatch):
    """A wrapper that shards, compiles or captures is not passed by."""
    calls = []

    class Counting(Parallel):
        """Notes what it is called with, and which micro-batch is said to be the last of a step."""

        def __init__(self, system):
            super().__init__(system)
            self.model = self.count

        def count(self, batch, rng, phase):
            calls.append(len(batch))
            return self.system(batch, rng, phase)

        def adding_up(self, is_last):
            calls.append("last" if is_last else "more")
            return super().adding_up(is_last)

    monkeypatch.setattr(
        "heptapod_fast.train.session.spread", lambda system, *how, **more: Counting(system)
    )
    train_here(tmp_path, images=16, micro_batch=4)
    assert calls == ["more", 4, "last", 4] * 2
