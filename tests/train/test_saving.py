"""Checkpoints that are written while training goes on."""

import threading
import types

import pytest
import torch

from heptapod_fast import checkpoints
from heptapod_fast.checkpoints import CheckpointError
from heptapod_fast.train import loop
from heptapod_fast.train.records import read_metrics
from heptapod_fast.train.saving import HostBuffers, Saver
from heptapod_fast.train.session import Ending
from heptapod_fast.world import ALONE, World
from tests.running import final_files, train_here


def files_of(value):
    return {"model": {"a": torch.full((3, 2), value), "b": torch.full((4,), value)}}


def state_of(step):
    return {"step": step, "images": 8 * step}


class Gate:
    """Holds the thread that writes when it has written the tensors."""

    def __init__(self, monkeypatch):
        self.reached = threading.Event()
        self.opened = threading.Event()
        monkeypatch.setattr(checkpoints.faults, "point", self.pass_point)

    def pass_point(self, name):
        if name.startswith("files="):
            self.reached.set()
            assert self.opened.wait(60)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    saver = Saver(ALONE)
    saver.begin(tmp_path, files_of(1.0), state_of(1), 2)
    assert gate.reached.wait(60)
    assert checkpoints.listed(tmp_path) == [] and not saver.failed
    gate.opened.set()
    saver.settle()
    assert [path.name for path in checkpoints.listed(tmp_path)] == ["step-00000001"]


def test_what_is_written_is_the_state_of_the_moment_it_began(tmp_path, monkeypatch):
    """Tensors change before the thread has looked at them."""
    may_write = threading.Event()
    save = checkpoints.save

    def late(*arguments):
        assert may_write.wait(60)
        return save(*arguments)

    monkeypatch.setattr(checkpoints, "save", late)
    files = files_of(1.0)
    saver = Saver(ALONE)
    saver.begin(tmp_path, files, state_of(1), 2)
    for tensor in files["model"].values():
        tensor.zero_()
    may_write.set()
    saver.settle()
    found = checkpoints.load_newest(tmp_path, print).read("model")
    assert all(bool((tensor == 1).all()) for tensor in found.values())


def test_one_is_written_at_a_time(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    saver = Saver(ALONE)
    saver.begin(tmp_path, files_of(1.0), state_of(1), 2)
    assert gate.reached.wait(60)
    second = threading.Thread(target=saver.begin, args=(tmp_path, files_of(2.0), state_of(2), 2))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    gate.opened.set()
    second.join(60)
    saver.settle()
    assert len(checkpoints.listed(tmp_path)) == 2


def refuse(*arguments):
    raise CheckpointError("could not write: No space left on device")


def test_a_failure_is_seen_between_steps_and_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "save", refuse)
    saver = Saver(ALONE)
    saver.begin(tmp_path, files_of(1.0), state_of(1), 2)
    saver._thread.join(60)
    assert saver.failed
    with pytest.raises(CheckpointError, match="No space left"):
        saver.settle()
    assert not saver.failed
    saver.settle()


def test_what_cannot_be_removed_does_not_spoil_what_was_written(tmp_path, monkeypatch):
    def broken(folder, keep):
        raise FileNotFoundError("step-00000001")

    monkeypatch.setattr(checkpoints, "_retain", broken)
    saver = Saver(ALONE)
    saver.begin(tmp_path, files_of(1.0), state_of(2), 1)
    saver.settle()
    assert len(checkpoints.listed(tmp_path)) == 1


def test_writing_now_comes_after_what_is_being_written(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    saver = Saver(ALONE)
    saver.begin(tmp_path, files_of(1.0), state_of(1), 9)
    assert gate.reached.wait(60)
    threading.Timer(0.1, gate.opened.set).start()
    saver.write(tmp_path, files_of(2.0), state_of(2), 9)
    assert len(checkpoints.listed(tmp_path)) == 2


def test_an_error_of_any_kind_is_one_of_the_checkpoint(tmp_path, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(checkpoints, "save", broken)
    saver = Saver(ALONE)
    saver.begin(tmp_path, files_of(1.0), state_of(1), 2)
    with pytest.raises(CheckpointError, match="RuntimeError: Connection closed by peer"):
        saver.settle()


def test_waiting_for_it_needs_no_thread_and_no_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(HostBuffers, "copy", refuse)
    saver = Saver(ALONE, in_background=False)
    saver.begin(tmp_path, files_of(1.0), state_of(1), 2)
    assert len(checkpoints.listed(tmp_path)) == 1
    monkeypatch.setattr(checkpoints, "save", refuse)
    with pytest.raises(CheckpointError, match="No space left"):
        saver.begin(tmp_path, files_of(1.0), state_of(2), 2)


def test_copies_stay_where_they_are():
    """The second checkpoint finds its memory there."""
    buffers = HostBuffers(ALONE)
    first = buffers.copy(files_of(1.0))
    addresses = {name: tensor.data_ptr() for name, tensor in first["model"].items()}
    second = buffers.copy(files_of(2.0))
    assert addresses == {name: tensor.data_ptr() for name, tensor in second["model"].items()}
    assert all(bool((tensor == 2).all()) for tensor in second["model"].values())


def test_of_what_all_ranks_have_each_copies_its_share():
    files = {"model": {name: torch.ones(size) for name, size in (("a", 9), ("b", 4), ("c", 4))}}
    copied = []
    for rank in (0, 1):
        copies = HostBuffers(World(rank, 2, torch.device("cpu"))).copy(files)
        named = files["model"].items()
        copied.append([name for name, own in named if copies["model"][name] is not own])
        assert all(torch.equal(copies["model"][name], own) for name, own in named)
    assert copied == [["a"], ["b", "c"]]


def test_the_end_of_a_session_waits_for_what_is_being_written(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    saver = Saver(ALONE)
    saver.begin(tmp_path, files_of(1.0), state_of(1), 2)
    assert gate.reached.wait(60)
    threading.Timer(0.1, gate.opened.set).start()
    saver.close()
    assert len(checkpoints.listed(tmp_path)) == 1


def test_waiting_or_not_writes_the_same_bytes(tmp_path):
    train_here(tmp_path / "beside", images=32)
    train_here(tmp_path / "waiting", images=32, sync_checkpoints=True)
    assert final_files(tmp_path / "beside") == final_files(tmp_path / "waiting")


def test_a_checkpoint_that_another_rank_could_not_write_has_failed_on_this_one(monkeypatch):
    """Or this one would go on, and the other one try again alone."""

    class Other(World):
        """A world whose other rank says yes to everything."""

        def any(self, *flags):
            return (True,) * len(flags)

    monkeypatch.setattr(loop, "begin_save", lambda session, state: None)
    session = types.SimpleNamespace(world=Other(1, 2, torch.device("cpu")), saver=Saver(ALONE))
    assert isinstance(loop.attempt_save(session, None, waits=True), CheckpointError)
    session.world = ALONE
    assert loop.attempt_save(session, None, waits=True) is None


def test_a_run_notices_a_checkpoint_that_failed_beside_it(tmp_path, monkeypatch):
    """At the next step; it is written anew at the next progress line."""
    save = checkpoints.save
    steps = []

    def flaky(folder, files, state, keep, world):
        steps.append(state["step"])
        if len(steps) == 1:
            refuse()
        return save(folder, files, state, keep, world)

    def failed(saver):
        if saver._thread is not None:
            saver._thread.join(60)  # in this test it always knows by the next step
        return saver._error is not None

    monkeypatch.setattr(checkpoints, "save", flaky)
    monkeypatch.setattr(Saver, "failed", property(failed))
    said = []
    _, _, ending = train_here(tmp_path, say=said.append, images=40, keep_checkpoints=9)
    assert ending is Ending.FINISHED
    assert steps == [2, 3, 4, 5]
    assert [path.name[-1] for path in checkpoints.listed(tmp_path / "checkpoints")] == list("345")
    (warning,) = (line for line in said if line.startswith("WARNING"))
    assert "No space left" in warning and "training goes on" in warning
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["images"] for r in records if "checkpoint_failed" in r] == [24]
