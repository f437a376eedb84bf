"""--cuda-graph without a GPU: what is run, captured and replayed, and that nothing depends on it.

A stand-in for `capture.Graphs` treats work as a GPU does: a capture changes nothing, a replay runs
the work again and overwrites what the capture returned.
"""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from heptapod_fast.runs import RunError
from heptapod_fast.train import capture, memory
from heptapod_fast.train.capture import Captured, Choice, Graphs, choose, executor_of
from heptapod_fast.train.loop import train, training_step
from heptapod_fast.train.step import Eager
from tests.running import (
    NO_HEAD,
    command,
    final_tensors,
    flags,
    refused,
    start_here,
    tiny_config,
)
from tests.train.test_loop import records

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
VECTORS = {"tokenizer": "patch", "codes": None, "diffusion_blocks": 1, "diffusion_width": 16}
CASES = {
    "codes": {},
    "micro-batches, dropout": {"micro_batch": 4, "dropout": 0.1, "steps": "uniform"},
    "spikes, averages": {"skip_spikes": 3.0, "ema": (0.99, 0.9)},
    "vectors": VECTORS | {"clip": 0.0},
    "npp": {"system": "npp", "patches": (3, 1), "shares": (0.5, 0.5)} | NO_HEAD,
    "sar": {"system": "sar"} | NO_HEAD | VECTORS,
}
LAST = ("forward_backward", True)
MORE = ("forward_backward", False)


class Fake:
    """See above. state: all tensors that work may change; fails: names whose capture fails."""

    made: "list[Fake]" = []

    def __init__(self, device):
        self.calls = []
        self.fails = {}
        self.recorded = {}
        self.state = list
        Fake.made.append(self)

    def __contains__(self, name):
        return name in self.recorded

    def warm_up(self, work):
        self.calls.append("warm up")
        return work()

    def capture(self, name, work):
        self.calls.append(("capture", name))
        if name in self.fails:
            raise self.fails[name]
        changed = self.state()
        before = [tensor.clone() for tensor in changed]
        result = work()
        with torch.no_grad():
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)
        self.recorded[name] = (work, result)

    def replay(self, name):
        self.calls.append(("replay", name))
        work, result = self.recorded[name]
        fresh = work()
        for old, new in zip(result or (), fresh or (), strict=True):
            old.copy_(new)
        return result

    def drop(self):
        self.calls.append("drop")
        self.recorded.clear()


def state_of(session):
    """Everything that the device's part of a step changes."""
    optimizer, guard = session.optimizer, session.optimizer.guard
    named = [tensor for file in optimizer.files().values() for tensor in file.values()]
    gradients = [parameter.grad for parameter in optimizer.parameters]
    rest = [session.buffers.sums, guard.strain, guard.norms, guard.seen]
    return [*named, *gradients, *rest]


@pytest.fixture
def on_a_gpu(monkeypatch):
    """This machine counts as one whose steps can be captured."""
    monkeypatch.setattr(capture, "why_not", lambda device, mode: None)
    monkeypatch.setattr(capture, "Graphs", Fake)
    monkeypatch.setattr(Fake, "made", [])


def start(out, **settings):
    """(session, state, what it captures with)."""
    session, state = start_here(out, images=128, checkpoint_every=128, **settings)
    fake = Fake.made[-1]
    fake.state = lambda: state_of(session)
    session.system.train()
    return session, state, fake


def steps(session, state, count, phase=None):
    found = []
    for _ in range(count):
        of_now = session.system.phase(state.images, session.config.recipe.images)
        found.append(training_step(session, state, phase or of_now))
    return found


# ------------------------------------------------------------------------------------- the weights


@pytest.mark.parametrize("name", CASES)
def test_a_captured_run_is_the_eager_one_bit_for_bit(tmp_path, on_a_gpu, name):
    for graph in ("off", "auto"):
        settings = {"images": 128, "checkpoint_every": 128, "cuda_graph": graph} | CASES[name]
        session, state = start_here(tmp_path / graph, **settings)
        if graph == "auto":
            Fake.made[-1].state = lambda session=session: state_of(session)
        train(session, state)
    (fake,) = Fake.made
    assert fake.calls.count(("replay", "update")) >= 10
    for file in ("model", "optimizer"):
        eager, captured = (final_tensors(tmp_path / graph, file) for graph in ("off", "auto"))
        assert eager.keys() == captured.keys()
        for key, value in eager.items():
            assert torch.equal(captured[key], value), key
    assert records(tmp_path / "auto") == records(tmp_path / "off")


def test_losses_and_norms_are_not_overwritten_by_later_steps(tmp_path, on_a_gpu):
    session, state, _ = start(tmp_path / "a")
    found = steps(session, state, 8)
    eager, state = start_here(tmp_path / "b", images=128, cuda_graph="off")
    eager.system.train()
    for captured, expected in zip(found, steps(eager, state, 8), strict=True):
        assert captured[0] == expected[0]
        assert captured[1] == expected[1]


# --------------------------------------------------------------------------------------- the order


def test_some_steps_run_one_is_captured_and_the_others_are_replayed(tmp_path, on_a_gpu):
    session, state, fake = start(tmp_path, micro_batch=4)
    steps(session, state, 6)
    step = [MORE, LAST, "update"]
    captured = [(how, name) for name in step for how in ("capture", "replay")]
    replayed = [("replay", name) for name in step]
    warm_up = ["warm up"] * (capture.WARM_UP * 3)
    assert fake.calls == ["drop", *warm_up, *captured, *replayed, *replayed]


def test_every_phase_has_graphs_of_its_own(tmp_path, on_a_gpu):
    session, state, fake = start(tmp_path, **CASES["npp"])
    steps(session, state, 16)
    of_a_phase = ["drop", *["warm up"] * (2 * capture.WARM_UP)]
    of_a_phase += [("capture", LAST), ("replay", LAST), ("capture", "update"), ("replay", "update")]
    of_a_phase += [("replay", LAST), ("replay", "update")] * 4
    assert fake.calls == of_a_phase * 2


def test_ddp_warms_up_for_longer(tmp_path, on_a_gpu, monkeypatch):
    monkeypatch.setattr("heptapod_fast.train.parallelize.Parallel.messages_settle", True)
    session, state, fake = start(tmp_path)
    steps(session, state, 12)
    assert fake.calls.index(("capture", LAST)) == 1 + 2 * 11


def test_gradients_stay_where_they_are_and_are_zero_between_steps(tmp_path, on_a_gpu):
    session, state, _ = start(tmp_path)
    parameters = session.optimizer.parameters
    addresses = [parameter.grad.data_ptr() for parameter in parameters]
    steps(session, state, 5)
    assert [parameter.grad.data_ptr() for parameter in parameters] == addresses
    assert not any(parameter.grad.any() for parameter in parameters)


def test_what_the_host_says_of_a_step_is_new_in_every_one(tmp_path, on_a_gpu):
    session, state, fake = start(tmp_path, lr_schedule="cosine")
    rates = []
    for _ in range(8):
        steps(session, state, 1)
        rates.append(tuple(session.optimizer.scalars.tolist()[:2]))
    assert [step for _, step in rates] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert len({rate for rate, _ in rates[3:]}) == 5
    assert session.buffers.batch.index.tolist() == list(range(56, 64))


# ------------------------------------------------------------------------------------ what can fail

BROKEN = RuntimeError("operation not permitted when stream is capturing\nmore of it")


@pytest.mark.parametrize("name", [LAST, "update"])
def test_a_failed_capture_costs_a_warning_and_nothing_else(tmp_path, on_a_gpu, name):
    lines = []
    session, state = start_here(tmp_path / "a", lines.append, images=128)
    fake = Fake.made[-1]
    fake.state = lambda: state_of(session)
    fake.fails[name] = BROKEN
    session.system.train()
    found = steps(session, state, 7)
    warnings = [line for line in lines if "WARNING" in line]
    assert len(warnings) == 1
    assert "RuntimeError: operation not permitted when stream is capturing;" in warnings[0]
    assert "--cuda-graph off" in warnings[0] and "more of it" not in warnings[0]
    assert fake.calls[-1] == "drop"
    assert fake.calls.count(("capture", name)) == 1
    eager, state = start_here(tmp_path / "b", images=128, cuda_graph="off")
    eager.system.train()
    assert found == steps(eager, state, 7)


def test_what_broke_a_capture_is_named_not_that_its_end_failed(tmp_path, on_a_gpu):
    lines = []
    session, state = start_here(tmp_path, lines.append, images=128)
    ended = RuntimeError("capture was invalidated")
    ended.__context__ = BROKEN
    Fake.made[-1].fails[LAST] = ended
    steps(session, state, 4)
    (warning,) = [line for line in lines if "WARNING" in line]
    assert "operation not permitted" in warning and "invalidated" not in warning


def test_a_failed_capture_that_was_asked_for_is_an_error(tmp_path, on_a_gpu):
    session, state, fake = start(tmp_path, cuda_graph="on")
    fake.fails["update"] = BROKEN
    steps(session, state, 3)
    with pytest.raises(RunError, match="--cuda-graph on: .*not permitted.*--cuda-graph off"):
        steps(session, state, 1)


# ------------------------------------------------------------------------------------- the decision


@pytest.mark.parametrize(
    "asked, device, mode, is_on, why",
    [
        ("auto", CUDA, "single", True, "one launch"),
        ("auto", CUDA, "ddp", True, "one launch"),
        ("on", CUDA, "ddp", True, "asked for"),
        ("off", CUDA, "single", False, "asked for"),
        ("auto", CUDA, "fsdp", False, "fsdp puts the weights of a block together"),
        ("auto", CUDA, "hsdp", False, "hsdp puts the weights of a block together"),
        ("auto", CPU, "single", False, "this trains on cpu"),
        ("off", CPU, "fsdp", False, "asked for"),
    ],
)
def test_who_captures(asked, device, mode, is_on, why):
    choice = choose(asked, device, mode)
    assert choice.is_on is is_on
    assert why in choice.line()
    assert choice.line().startswith(f"graph     {'on' if is_on else 'off'} (")


@pytest.mark.parametrize("device, mode", [(CPU, "single"), (CUDA, "fsdp"), (CUDA, "hsdp")])
def test_what_cannot_be_is_refused_where_it_is_asked_for(device, mode):
    with pytest.raises(ValueError, match="--cuda-graph on: .*--cuda-graph auto"):
        choose("on", device, mode)


def test_parameters_that_a_phase_leaves_out_of_ddp_are_an_obstacle(tmp_path, on_a_gpu):
    lines = []
    session, _ = start_here(tmp_path, cuda_graph="off")
    eager = session.executor
    assert isinstance(eager, Eager)
    eager.parallel.obstacle = "the host looks for parameters"
    found = executor_of(eager, Choice(True, "auto: yes"), CPU, lines.append)
    assert found is eager
    assert lines == ["graph     off (auto: the host looks for parameters)"]
    with pytest.raises(ValueError, match="--cuda-graph on: the host looks"):
        executor_of(eager, Choice(True, "asked for", is_asked_for=True), CPU, lines.append)
    eager.parallel.obstacle = None
    assert isinstance(executor_of(eager, Choice(True, "auto: yes"), CPU, lines.append), Captured)
    assert len(lines) == 1


def test_gradients_that_stay_count_as_memory():
    config = tiny_config("out")
    work = memory.Work(config, 3, CPU)
    captured = replace(work, is_captured=True)
    parameters = sum(p.numel() for p in work.system().parameters())
    more = memory.estimate(captured).total - memory.estimate(work).total
    assert captured.keeps_gradients and not work.keeps_gradients
    assert 0 < more <= 4 * parameters


def test_the_start_of_a_run_and_a_dry_run_say_so(tmp_path):
    said = []
    start_here(tmp_path, said.append)
    expected = "graph     off (auto: CUDA graphs need a GPU, this trains on cpu)"
    assert said.count(expected) == 1
    words = flags(dry_run=None, out=tmp_path / "b")
    assert f"  {expected}\n" in command("train", "--dry-run", *words).out
    there = command("train", "--dry-run", *words, "--cuda-graph", "on").out
    assert "  graph     refused: --cuda-graph on: CUDA graphs need a GPU" in there


def test_it_is_refused_on_the_command_line(tmp_path):
    words = flags(out=tmp_path, cuda_graph="on")
    refused(command("train", *words), "--cuda-graph on: CUDA graphs need a GPU", "auto")


# ----------------------------------------------------------------------------------------- the seam


class FakeCuda:
    """What `Graphs` asks of torch.cuda."""

    def __init__(self, monkeypatch):
        self.calls = []
        self.end_fails = False
        for name in ("graph", "CUDAGraph", "Stream", "stream", "graph_pool_handle"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        for name in ("current_stream", "set_stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        self.current = self.Stream("main")

    def Stream(self, device):  # noqa: N802
        wait = self.calls.append
        stream = SimpleNamespace(device=device, name=str(device))
        stream.wait_stream = lambda other: wait(f"{stream.name} waits for {other.name}")
        return stream

    def CUDAGraph(self):  # noqa: N802
        return SimpleNamespace(replay=lambda: self.calls.append("replay"))

    def graph_pool_handle(self):
        self.calls.append("pool")
        return self.calls.count("pool")

    def current_stream(self, device=None):
        return self.current

    def set_stream(self, stream):
        self.current = stream

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        self.calls.append((pool, stream.name, capture_error_mode))
        before, self.current = self.current, stream
        try:
            yield
        finally:
            if self.end_fails:
                raise RuntimeError("invalidated")
        self.current = before


def test_graphs_share_a_pool_and_a_stream(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    graphs = Graphs("side")
    assert graphs.warm_up(lambda: cuda.current.name) == "side"
    graphs.capture("a", lambda: cuda.calls.append("work") or 1)
    graphs.capture("b", lambda: 2)
    assert [graphs.replay(name) for name in "aba"] == [1, 2, 1]
    there = (1, "side", "thread_local")
    waits = ["side waits for main", "main waits for side"]
    assert cuda.calls == ["pool", *waits, there, "work", there, *["replay"] * 3]
    assert cuda.current.name == "main"
    graphs.drop()
    assert "a" not in graphs
    graphs.capture("a", lambda: 3)
    assert cuda.calls[-1] == (2, "side", "thread_local")


def test_a_capture_that_fails_leaves_no_stream_behind(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    cuda.end_fails = True
    graphs = Graphs("side")

    def work():
        raise BROKEN

    with pytest.raises(RuntimeError, match="invalidated") as caught:
        graphs.capture("a", work)
    assert caught.value.__context__ is BROKEN
    assert cuda.current.name == "main"
    assert "a" not in graphs
