"""Steps that are recorded once and replayed, with a recorder that does on a CPU what a CUDA graph
does: it keeps the operators that ran and the tensors they read and wrote, and no number of the
host."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from heptapod_fast.rng import Rng, SteppedRng
from heptapod_fast.sampling import Given
from heptapod_fast.sampling.replay import WARM_UP, Entering, Steps, recorder_for
from tests.sampling.test_sampling import quick

RNG, TOKENS = Rng(4), 16
CLASSES, INDEX = torch.tensor([0, 2, 1]), torch.tensor([5, 0, 9])


class Tape(TorchDispatchMode):
    """Every operator with its arguments and what it gave."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert "_local_scalar_dense" not in str(operator), "the host looks at a value"
        assert "nonzero" not in str(operator), "a shape depends on values"
        out = operator(*args, **kwargs)
        self.calls.append((operator, args, kwargs, out))
        return out


def memory(tensor):
    """Where it lies."""
    return tensor.untyped_storage().data_ptr()


class Recorder:
    """A CUDA graph in Python: tensors keep their memory, and a replay writes to it again."""

    def __init__(self):
        self.tapes = {}
        self.replays = 0

    def __contains__(self, name):
        return name in self.tapes

    def warm_up(self, work):
        work()

    def capture(self, name, work):
        """Records without lasting effects: what was written in place is put back, as a capture
        executes nothing."""
        tape = Tape()
        before = {}

        class Saving(TorchDispatchMode):
            def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
                if operator._schema.is_mutable:
                    for argument, value in zip(operator._schema.arguments, args, strict=False):
                        if argument.alias_info is not None and argument.alias_info.is_write:
                            storage = value.untyped_storage()
                            before.setdefault(storage.data_ptr(), (storage, storage.clone()))
                return operator(*args, **(kwargs or {}))

        with Saving(), tape:
            work()
        for storage, saved in before.values():
            storage.copy_(saved)
        self.tapes[name] = tape.calls

    def replay(self, name):
        self.replays += 1
        for operator, args, kwargs, out in self.tapes[name]:
            again = operator(*args, **kwargs)
            for old, new in zip(tree_flatten(out)[0], tree_flatten(again)[0], strict=True):
                is_tensor = isinstance(old, torch.Tensor)
                if (
                    is_tensor
                    and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr()
                ):
                    old.copy_(new)


def test_the_stand_in_keeps_numbers_of_the_host_and_reads_tensors_anew():
    """Or it would prove nothing."""
    number, tensor, out = [1], torch.ones(1), torch.zeros(2)
    recorder = Recorder()

    def work():
        out.copy_(torch.stack((tensor * number[0], tensor + 1))[:, 0])

    recorder.capture("a", work)
    assert out.tolist() == [0, 0]
    number[0] = 5
    tensor.fill_(2)
    recorder.replay("a")
    assert out.tolist() == [2, 3]


CASES = {
    "global": ("discrete", {}, {}, 15),
    "two at a step": ("discrete", {}, {"positions_per_step": 2}, 6),
    "uneven groups": ("discrete", {}, {"positions_per_step": 3}, 4),
    "cosine": (
        "discrete",
        {},
        {"positions_per_step": 2, "position_schedule": "cosine"},
        None,
    ),
    "local": ("discrete", {"head": "local", "window": 4}, {}, 15),
    "local, two": ("discrete", {"head": "local", "window": 4}, {"positions_per_step": 2}, 6),
    "top": ("discrete", {}, {"top_k": 5, "top_p": 0.9}, 15),
    "ddpm": ("continuous", {}, {}, 15),
    "fewer later": ("continuous", {}, {"diffusion_steps": 4, "late_diffusion_steps": 1}, None),
    "flow": ("continuous", {"token_loss": "flow"}, {}, 15),
    "1d-raster": ("discrete", {"system": "1d-raster"}, {}, 15),
    "1d-random": ("continuous", {"system": "1d-random"}, {}, 15),
    "1d, fewer later": (
        "continuous",
        {"system": "1d-random"},
        {"diffusion_steps": 4, "late_diffusion_steps": 1},
        None,
    ),
    "llamagen": ("discrete", {"system": "llamagen"}, {"guidance": 1.0}, 16),
    "guided": ("discrete", {"system": "llamagen"}, {"guidance": 2.0}, 16),
    "guided, linear": (
        "discrete",
        {"system": "llamagen"},
        {"guidance": 3.0, "guidance_schedule": "linear"},
        16,
    ),
}


def recorded(monkeypatch):
    """Sampling that records and replays; the recorders it has used."""
    used = []

    def recorder(options, device):
        used.append(Recorder())
        return used[-1]

    monkeypatch.setattr("heptapod_fast.sampling.replay.recorder_for", recorder)
    return used


@pytest.mark.parametrize("name", CASES)
def test_replayed_steps_draw_the_same_tokens(make_system, monkeypatch, name):
    kind, settings, options, alike = CASES[name]
    system = make_system(kind, **settings).eval()
    if "diffusion_steps" in options:
        chosen = system.options(**options)
    else:
        chosen = quick(system, **options)
    expected = system.sample(CLASSES, RNG, chosen, INDEX)
    used = recorded(monkeypatch)
    found = system.sample(CLASSES, RNG, chosen, INDEX)
    assert torch.equal(found, expected)
    (recorder,) = used
    if alike is not None:
        # A step of another kind before and behind, and those that warm up.
        assert recorder.replays == alike - WARM_UP > 0
        assert len(recorder.tapes) == 1


def test_what_is_given_comes_first_and_the_rest_is_replayed(make_system, monkeypatch):
    known = torch.arange(TOKENS) % 4 == 0
    for settings in ({}, {"system": "1d-random"}):
        system = make_system("discrete", **settings).eval()
        tokens = torch.randint(system.spec.vocabulary, (3, TOKENS))
        given = Given(tokens, known)
        expected = system.complete(given, CLASSES, RNG, None, INDEX)
        with monkeypatch.context() as patch:
            used = recorded(patch)
            found = system.complete(given, CLASSES, RNG, None, INDEX)
        assert torch.equal(found, expected) and used[0].replays == 10 - WARM_UP


def test_by_confidence_no_two_steps_are_alike(make_system, monkeypatch):
    system = make_system().eval()
    options = system.options(position_order="confidence", positions_per_step=2)
    expected = system.sample(CLASSES, RNG, options, INDEX)
    used = recorded(monkeypatch)
    assert torch.equal(system.sample(CLASSES, RNG, options, INDEX), expected)
    assert used[0].replays == 0


@pytest.mark.parametrize("name", ["global", "local", "ddpm", "flow", "1d-raster", "llamagen"])
def test_a_step_asks_nothing_of_the_device(make_system, monkeypatch, name):
    """A look at a value would make the host wait at every step, recorded or not."""
    kind, settings, options, _ = CASES[name]
    system = make_system(kind, **settings).eval()
    chosen = quick(system, **options)
    steps = []

    class Watched(Steps):
        def run(self, step, kind, work):
            with Tape() as tape:
                super().run(step, kind, work)
            steps.append(len(tape.calls))

    monkeypatch.setattr("heptapod_fast.sampling.replay.Steps", Watched)
    system.sample(CLASSES, RNG, chosen, INDEX)
    assert len(steps) == TOKENS and min(steps) > 10


def test_draws_of_all_steps_are_those_of_each():
    index, step = torch.tensor([3, 2**40]), torch.zeros(1, dtype=torch.int64)
    stepped = SteppedRng(7, step_1=step, steps=5)
    for number in (4, 0, 2):
        step.fill_(number)
        for stream in ("a", "b"):
            expected = Rng(7, number).normal(stream, index, 6, torch.tensor([1, 2]))
            assert torch.equal(stepped.normal(stream, index, 6, torch.tensor([1, 2])), expected)
    with pytest.raises(TypeError, match="on the device alone"):
        stepped.key("a")


def test_what_enters_lies_where_as_much_has_lain_before():
    first, second = torch.zeros(2, 1, 3), torch.ones(2, 2, 3)
    entering = Entering(first)
    entering.put(second)
    assert entering.count == 2 and list(entering) == [second]
    entering.put(torch.full((2, 1, 3), 5.0))
    (now,) = entering
    assert now is first and float(now[0, 0, 0]) == 5 and entering.count == 1


def test_groups_that_grow_and_shrink_replay_what_is_there(make_system, monkeypatch):
    """Of 256 tokens the cosine's groups of 2 and 3 come in turns."""
    system = make_system(grid=16).eval()
    options = system.options(positions_per_step=2, position_schedule="cosine")
    expected = system.sample(CLASSES, RNG, options, INDEX)
    used = recorded(monkeypatch)
    assert torch.equal(system.sample(CLASSES, RNG, options, INDEX), expected)
    assert used[0].replays > 60 and len(used[0].tapes) > 2


@pytest.mark.parametrize("name", ["global", "local", "1d-raster"])
def test_a_recording_that_fails_half_way_is_done_again(make_system, monkeypatch, name):
    kind, settings, options, _ = CASES[name]
    system = make_system(kind, **settings).eval()
    expected = system.sample(CLASSES, RNG, quick(system, **options), INDEX)
    recorded(monkeypatch)

    def fail(self, name, work):
        draw = type(system.token_loss).draw

        def broken(*given, **more):
            raise RuntimeError("out of graph")

        monkeypatch.setattr(type(system.token_loss), "draw", broken)
        try:
            work()
        finally:
            monkeypatch.setattr(type(system.token_loss), "draw", draw)

    monkeypatch.setattr(Recorder, "capture", fail)
    assert torch.equal(system.sample(CLASSES, RNG, quick(system, **options), INDEX), expected)


def test_what_the_flag_comes_to(make_system, monkeypatch):
    system = make_system().eval()
    made = []
    monkeypatch.setattr("heptapod_fast.sampling.replay.Graphs", lambda *given: made.append(given))
    monkeypatch.setattr("heptapod_fast.sampling.replay.side_stream", lambda device: "side")
    gpu = torch.device("cuda")
    for asked, count in (("off", 0), ("auto", 1), ("on", 2)):
        recorder_for(system.options(cuda_graph=asked), gpu)
        assert made == [(gpu, "side")] * count
    for asked in ("auto", "off"):
        assert recorder_for(system.options(cuda_graph=asked), torch.device("cpu")) is None
    with pytest.raises(ValueError, match="--cuda-graph on: CUDA graphs need a GPU"):
        system.sample(CLASSES, RNG, system.options(cuda_graph="on"), INDEX)
    with pytest.raises(ValueError, match="--cuda-graph"):
        system.sample(CLASSES, RNG, system.options(cuda_graph="sometimes"), INDEX)


@pytest.mark.parametrize("asked", ["auto", "on"])
def test_a_recording_that_fails(make_system, monkeypatch, caplog, asked):
    """Costs a warning, or is an error where it was asked for."""
    system = make_system().eval()
    expected = system.sample(CLASSES, RNG, None, INDEX)
    used = recorded(monkeypatch)

    def fail(self, name, work):
        raise RuntimeError("operation not permitted\nmore")

    monkeypatch.setattr(Recorder, "capture", fail)
    options = system.options(cuda_graph=asked)
    if asked == "on":
        with pytest.raises(ValueError, match="--cuda-graph on: .*operation not permitted. Take"):
            system.sample(CLASSES, RNG, options, INDEX)
        return
    assert torch.equal(system.sample(CLASSES, RNG, options, INDEX), expected)
    assert used[0].replays == 0
    (warning,) = caplog.messages
    assert "cannot be recorded in a CUDA graph: operation not permitted; sampling" in warning
