"""Captured steps on a GPU: the bits of eager ones, phase after phase."""

import pytest
import torch

from heptapod_fast.train.capture import WARM_UP, Captured
from heptapod_fast.train.loop import training_step
from heptapod_fast.train.step import Eager
from tests.running import NO_HEAD, start_on_gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
STEPS = 20
CASES = {
    "codes, micro-batches": {"micro_batch": 4, "dropout": 0.1},
    "sar": {"system": "sar", "dropout": 0.1} | NO_HEAD,
    "npp": {"system": "npp", "patches": (3, 1), "shares": (0.5, 0.5)} | NO_HEAD,
}


def run(out, graph, **settings):
    """(session, losses and norms of every step)."""
    given = {"images": 8 * STEPS, "cuda_graph": graph} | settings
    session, state = start_on_gpu(out, **given)
    session.system.train()
    found = []
    for _ in range(STEPS):
        phase = session.system.phase(state.images, session.config.recipe.images)
        found.append(training_step(session, state, phase))
    return session, [(float(loss), float(norm)) for loss, norm in found]


@pytest.mark.parametrize("name", CASES)
def test_captured_steps_are_the_eager_ones_bit_for_bit(tmp_path, name):
    # PyTorch's SDPA need not repeat its gradients.
    settings = CASES[name] | {"attention": "reference"}
    eager, expected = run(tmp_path / "eager", "off", **settings)
    captured, found = run(tmp_path / "captured", "on", **settings)
    assert isinstance(eager.executor, Eager) and isinstance(captured.executor, Captured)
    assert found == expected
    of_eager, of_captured = (s.optimizer.files() for s in (eager, captured))
    for file, tensors in of_eager.items():
        for key, value in tensors.items():
            assert torch.equal(of_captured[file][key], value), key


def test_steps_are_replayed_and_every_phase_captures_anew(tmp_path, monkeypatch):
    captures = []
    replays = []
    graph = torch.cuda.graph
    monkeypatch.setattr(
        torch.cuda, "graph", lambda *given, **how: captures.append(1) or graph(*given, **how)
    )
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda self: replays.append(1) or replay(self)
    )
    run(tmp_path, "on", **CASES["npp"])
    assert len(captures) == 2 * 2
    assert len(replays) == 2 * (STEPS - 2 * WARM_UP)


def test_a_capture_that_fails_leaves_a_run_that_trains(tmp_path, monkeypatch):
    """A value that the host reads, in the middle of a step."""
    from heptapod_fast.train.guard import Guard

    note = Guard.note

    def reading(self, is_good):
        bool(is_good)
        note(self, is_good)

    _, expected = run(tmp_path / "eager", "off", attention="reference")
    monkeypatch.setattr(Guard, "note", reading)
    lines = []
    settings = {"images": 8 * STEPS, "attention": "reference"}
    session, state = start_on_gpu(tmp_path / "auto", lines.append, **settings)
    session.system.train()
    phase = session.system.phase(0, 8 * STEPS)
    found = [training_step(session, state, phase) for _ in range(WARM_UP + 3)]
    assert [float(loss) for loss, _ in found] == [loss for loss, _ in expected[: WARM_UP + 3]]
    assert sum("WARNING: the step cannot be captured" in line for line in lines) == 1
