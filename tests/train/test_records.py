"""Where records go: metrics.jsonl, sessions.jsonl, TensorBoard, Weights & Biases."""

import dataclasses
import errno
import importlib.machinery
import importlib.util
import json
import sys
import time
import types

import pytest

from heptapod_fast.train import loop, records
from heptapod_fast.train.loop import train
from heptapod_fast.train.records import (
    JsonLines,
    Recorder,
    TensorBoard,
    WeightsAndBiases,
    check_sinks,
    read_metrics,
)
from heptapod_fast.train.session import Ending
from tests.running import (
    Interrupting,
    command,
    flags,
    refused,
    start_here,
    tiny_config,
    train_here,
)


def written(folder, count):
    """metrics.jsonl with records at 8, 16, ... images."""
    metrics = JsonLines(folder / "metrics.jsonl")
    for number in range(1, count + 1):
        metrics.write({"images": 8 * number, "loss": float(number)})
    return metrics


def images_in(path):
    return [record["images"] for record in read_metrics(path)]


# ------------------------------------------------------------------------- metrics.jsonl


def test_records_come_back(tmp_path):
    metrics = written(tmp_path, 3)
    assert read_metrics(metrics.path)[-1] == {"images": 24, "loss": 3.0}


def test_rewind_drops_what_will_be_written_again(tmp_path):
    metrics = written(tmp_path, 4)
    dropped = metrics.rewind(16)
    assert [record["images"] for record in dropped] == [24, 32]
    assert images_in(metrics.path) == [8, 16]
    metrics.rewind(0)
    assert metrics.path.read_text() == ""


def test_rewind_without_a_file(tmp_path):
    assert JsonLines(tmp_path / "metrics.jsonl").rewind(8) == []
    assert not list(tmp_path.iterdir())


def test_a_last_line_that_was_cut_off_is_left_out_and_mended(tmp_path):
    metrics = written(tmp_path, 2)
    with open(metrics.path, "a") as stream:
        stream.write('{"images": 24, "lo')
    assert images_in(metrics.path) == [8, 16]
    metrics.rewind(100)
    metrics.write({"images": 24})
    assert images_in(metrics.path) == [8, 16, 24]


@pytest.mark.parametrize("line", [b'{"images": 8, "lo', b"\xff\xfe", b"[1, 2]", b'{"loss": 1.0}'])
def test_a_broken_line_in_the_middle_is_named(tmp_path, line):
    metrics = written(tmp_path, 2)
    first, second = metrics.path.read_bytes().splitlines()
    metrics.path.write_bytes(b"\n".join([first, line, second, b""]))
    with pytest.raises(ValueError, match="metrics.jsonl:2 "):
        read_metrics(metrics.path)


def test_numbers_that_are_not_finite_stay_json(tmp_path):
    metrics = written(tmp_path, 1)
    metrics.write({"images": 16, "loss": float("nan"), "grad_norm": float("inf")})

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    last = metrics.path.read_text().splitlines()[-1]
    found = json.loads(last, parse_constant=refuse)
    assert found == {"images": 16, "loss": None, "grad_norm": None}


class Disk:
    """A file's stream on a disk with room for some more bytes."""

    def __init__(self, stream, room):
        self.stream, self.room = stream, room

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stream.close()

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, data):
        """As the system does: what fits is written, and nothing at all is an error."""
        fitting = data[: self.room]
        if not fitting:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(fitting)
        return self.stream.write(fitting)


@pytest.mark.parametrize("room", [0, 20])
def test_a_full_disk_costs_whole_records_and_is_said_once(tmp_path, monkeypatch, room):
    said = []
    metrics = JsonLines(tmp_path / "metrics.jsonl")
    recorder = Recorder(metrics, said.append)
    recorder.write({"images": 8, "text": "x" * 100})
    monkeypatch.setattr(
        records,
        "open",
        lambda *words, **options: Disk(open(*words, **options), room),
        raising=False,
    )
    recorder.write({"images": 16, "text": "x" * 100})
    recorder.write({"images": 16, "text": "x" * 100})
    monkeypatch.undo()
    recorder.write({"images": 24})
    assert images_in(metrics.path) == [8, 24]
    assert len(said) == 1
    assert f"WARNING: cannot write {metrics.path}" in said[0]


def test_sessions_say_what_each_start_ran_on(tmp_path):
    train_here(tmp_path, stop_at=24)
    session, _, _ = train_here(tmp_path)
    first, second = read_metrics(tmp_path / "sessions.jsonl")
    assert first.items() >= {"images": 0, **session.environment}.items()
    assert second.items() >= {"images": 32, **session.environment}.items()
    assert {"device", "ranks", "torch", "activations"} <= first.keys()


def test_sessions_say_how_long_their_start_and_their_end_took(tmp_path, monkeypatch):
    """The last checkpoint and the last grid come after the last record."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    session, state = start_here(tmp_path, images=16, checkpoint_every=10**6)
    now[0] += 7
    take = {"begin_save": 3.0, "sample_grid": 2.0}
    for name, seconds in take.items():
        done = getattr(loop, name)

        def slow(*arguments, done=done, seconds=seconds):
            now[0] += seconds
            return done(*arguments)

        monkeypatch.setattr(loop, name, slow)
    config = session.config.replace(sample_every=8)
    loop.train(dataclasses.replace(session, config=config, tokenizer=None), state)
    (found,) = read_metrics(tmp_path / "sessions.jsonl")
    assert found["start_seconds"] == 7.0
    assert found["lost_seconds"] == 0.0
    assert found["checkpoint_seconds"] == 3.0
    assert found["sampling_seconds"] == 2.0
    assert found["other_seconds"] == 5.0
    between = [record["other_seconds"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert between == [0.0, 2.0]


def test_steps_that_are_done_again_are_lost_time(tmp_path, monkeypatch):
    """A session that failed after its checkpoint leaves records that the next one drops."""

    def fail():
        raise RuntimeError("out of luck")

    session, state = start_here(tmp_path)
    source = Interrupting(session.source, 40, fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        loop.train(dataclasses.replace(session, source=source), state)
    dropped = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["images"] > 32]
    assert [record["images"] for record in dropped] == [40]
    train_here(tmp_path)
    first, second = read_metrics(tmp_path / "sessions.jsonl")
    assert "step_seconds" not in first  # it had no end to speak of
    seconds = dropped[0]["step_seconds"] + dropped[0]["other_seconds"]
    assert second["lost_seconds"] == pytest.approx(seconds, abs=0.001) and seconds > 0
    images = [record["images"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert images == list(range(8, 65, 8))


def test_a_session_whose_line_cannot_take_its_end_says_so(tmp_path, monkeypatch):
    def full(path, more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(JsonLines, "amend", full)
    said = []
    _, _, ending = train_here(tmp_path, say=said.append, images=8)
    assert ending is loop.Ending.FINISHED
    (warning,) = [line for line in said if line.startswith("WARNING")]
    assert "sessions.jsonl" in warning and "No space left" in warning


# ------------------------------------------------------------------------- TensorBoard


def scalars(folder):
    """{name: [(images, value)]} of all event files in a folder, as TensorBoard shows them."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_tensorboard_has_every_number_of_every_record(tmp_path):
    pytest.importorskip("tensorboard")
    train_here(tmp_path, log="tensorboard")
    found = scalars(tmp_path / "tensorboard")
    expected = read_metrics(tmp_path / "metrics.jsonl")
    assert len(expected) == 8
    for name in ("loss", "grad_norm", "lr", "step", "images_per_second"):
        images, values = zip(*found[name], strict=True)
        assert list(images) == [record["images"] for record in expected]
        assert list(values) == pytest.approx([record[name] for record in expected], rel=1e-6)
    assert "images" not in found


def test_tensorboard_forgets_what_a_session_did_not_save(tmp_path):
    pytest.importorskip("tensorboard")
    first = TensorBoard(tmp_path, images=0)
    for images in (8, 16, 24):
        first.write({"images": images, "loss": 1.0})
    first.close()
    resumed = TensorBoard(tmp_path, images=8)
    resumed.write({"images": 16, "loss": 2.0})
    resumed.close()
    assert scalars(tmp_path)["loss"] == [(8, 1.0), (16, 2.0)]


def test_tensorboard_is_told_at_once(tmp_path):
    """A process that is killed loses nothing that was written."""
    pytest.importorskip("tensorboard")
    sink = TensorBoard(tmp_path, images=0)
    sink.write({"images": 8, "loss": 1.0})
    assert scalars(tmp_path)["loss"] == [(8, 1.0)]
    sink.close()


# ------------------------------------------------------------------------- Weights & Biases


class FakeRun:
    """A run of the service, which remembers what it was told."""

    def __init__(self, arguments):
        self.arguments, self.logged, self.axes = arguments, [], []
        self.is_finished = False

    def define_metric(self, name, step_metric=None):
        self.axes.append((name, step_metric))

    def log(self, record):
        self.logged.append(record)

    def finish(self):
        self.is_finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package; `runs` has what was started."""
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.runs = []

    def init(**arguments):
        module.runs.append(FakeRun(arguments))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def test_wandb_has_every_record_and_the_settings(tmp_path, wandb):
    train_here(tmp_path, log="wandb")
    (run,) = wandb.runs
    assert run.logged == read_metrics(tmp_path / "metrics.jsonl")
    assert run.arguments["project"] == "heptapod_fast"
    assert run.arguments["config"]["recipe"]["batch"] == 8
    assert ("*", "images") in run.axes
    assert run.is_finished


def test_a_run_that_gives_up_closes_its_sinks(tmp_path, wandb):
    def fail():
        raise RuntimeError("the data is gone")

    session, state = start_here(tmp_path, log="wandb")
    source = Interrupting(session.source, 16, fail)
    with pytest.raises(RuntimeError, match="the data is gone"):
        train(dataclasses.replace(session, source=source), state)
    assert wandb.runs[0].is_finished


def test_a_resumed_run_goes_on_as_the_same_one_wherever_it_was_moved(tmp_path, wandb):
    train_here(tmp_path / "before", log="wandb", stop_at=24)
    (tmp_path / "before").rename(tmp_path / "moved")
    train_here(tmp_path / "moved", log="wandb")
    train_here(tmp_path / "another", log="wandb")
    first, resumed, other = [run.arguments for run in wandb.runs]
    assert first["id"] == resumed["id"]
    assert first["id"] != other["id"]
    assert first["resume"] == "allow"


def test_the_project_can_be_named(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    WeightsAndBiases(tmp_path, tiny_config(tmp_path))
    assert wandb.runs[0].arguments["project"] == "mine"


def test_both_sinks_are_fed(tmp_path, wandb):
    pytest.importorskip("tensorboard")
    train_here(tmp_path, log="tensorboard,wandb", images=16)
    assert [record["images"] for record in wandb.runs[0].logged] == [8, 16]
    assert [images for images, _ in scalars(tmp_path / "tensorboard")["loss"]] == [8, 16]


# ------------------------------------------------------------------------- sinks that fail


def test_a_sink_that_dies_is_said_once_and_given_up(tmp_path, wandb, monkeypatch):
    def dead(self, record):
        raise RuntimeError("no network")

    monkeypatch.setattr(FakeRun, "log", dead)
    said = []
    _, _, ending = train_here(tmp_path, say=said.append, log="wandb")
    assert ending is Ending.FINISHED
    warnings = [line for line in said if "WARNING" in line]
    assert len(warnings) == 1
    assert "--log wandb: RuntimeError: no network" in warnings[0]
    assert images_in(tmp_path / "metrics.jsonl") == list(range(8, 65, 8))


def test_a_sink_that_cannot_be_opened_is_said_and_left_out(tmp_path, wandb):
    def init(**arguments):
        raise OSError("not logged in")

    wandb.init = init
    said = []
    _, _, ending = train_here(tmp_path, say=said.append, log="wandb", images=16)
    assert ending is Ending.FINISHED
    assert [line for line in said if "WARNING" in line and "not logged in" in line]
    assert images_in(tmp_path / "metrics.jsonl") == [8, 16]


def test_a_sink_that_cannot_be_closed_costs_nothing(tmp_path, wandb, monkeypatch):
    def dead(self):
        raise TimeoutError("no answer")

    monkeypatch.setattr(FakeRun, "finish", dead)
    said = []
    _, _, ending = train_here(tmp_path, say=said.append, log="wandb", images=16)
    assert ending is Ending.FINISHED
    assert len([line for line in said if "WARNING" in line and "no answer" in line]) == 1


def test_a_sink_that_dies_leaves_the_others(tmp_path):
    class Sink:
        """Remembers records; may die at the second."""

        def __init__(self, name, dies):
            self.name, self.dies, self.seen = name, dies, []

        def write(self, record):
            self.seen.append(record["images"])
            if self.dies:
                raise RuntimeError("dead")

        def close(self):
            """Nothing to do."""

    said = []
    recorder = Recorder(JsonLines(tmp_path / "metrics.jsonl"), said.append)
    dying, living = Sink("dying", True), Sink("living", False)
    recorder.add(lambda: dying, "dying")
    recorder.add(lambda: living, "living")
    for images in (8, 16):
        recorder.write({"images": images})
    assert dying.seen == [8]
    assert living.seen == [8, 16]
    assert len(said) == 1


# -------------------------------------------------------------------- packages that are missing


def without(monkeypatch, package):
    """As where a package is not installed."""
    find = importlib.util.find_spec

    def spec(name, *words):
        return None if name == package else find(name, *words)

    monkeypatch.setattr(importlib.util, "find_spec", spec)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_refused_before_anything_is_made(tmp_path, monkeypatch, name):
    without(monkeypatch, name)
    with pytest.raises(ValueError, match=r"pip install 'heptapod_fast\[log\]'"):
        check_sinks([name])
    out = tmp_path / "run"
    result = command("train", *flags(out=out, log=name))
    refused(result, f"--log {name}: {name} is not installed", "pip install 'heptapod_fast[log]'")
    assert not out.exists()


def test_no_sink_needs_no_package(monkeypatch):
    without(monkeypatch, "tensorboard")
    check_sinks([])


def test_a_sink_that_there_is_not_is_refused(tmp_path):
    words = flags(out=tmp_path / "run", log="paper")
    refused(command("train", *words), "--log paper", "tensorboard, wandb")
