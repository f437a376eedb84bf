"""From a configuration to an outcome: what is said, what is left behind, what may follow."""

import dataclasses
import signal

import pytest

from heptapod_fast.data import Logograms, write_folder
from heptapod_fast.ops.dispatch import Unavailable
from heptapod_fast.runs import RunDir, RunError
from heptapod_fast.train import launch as module
from heptapod_fast.train import loop
from heptapod_fast.train import session as session_module
from heptapod_fast.train.launch import launch
from heptapod_fast.train.session import Ending
from tests.running import CPU, command, final_files, flags, silent, tiny_config


def launch_here(out, say=silent, **settings):
    return launch(tiny_config(out, **settings), CPU, say)


def is_free(out):
    """Whether the run directory can be claimed, as another process would."""
    directory = RunDir(out)
    config = directory.read_config()
    try:
        directory.claim(config)
    except RunError:
        return False
    directory.release()
    return True


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(directory, outcome, what was said) of a whole run."""
    said = []
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, launch_here(out, said.append), said


def test_the_outcome_says_how_it_ended(finished):
    out, outcome, said = finished
    assert outcome.ending is Ending.FINISHED
    assert outcome.directory == out
    assert outcome.images == 64
    assert outcome.seconds > 0
    assert said[-1].startswith("finished  64 images in ")
    assert said[-1].endswith(str(out))


def test_the_directory_can_be_used_again(finished):
    out, _, _ = finished
    assert is_free(out)


def test_a_finished_run_says_so_and_changes_nothing(finished):
    out, _, _ = finished
    before = final_files(out)
    metrics = (out / "metrics.jsonl").read_text()
    said = []
    outcome = launch_here(out, said.append)
    assert outcome.ending is Ending.ALREADY_FINISHED
    assert outcome.images == 64
    assert len(said) == 1
    assert f"{out} is finished: 64 images" in said[0]
    assert f"tools/sample.py {out}" in said[0]
    assert final_files(out) == before
    assert (out / "metrics.jsonl").read_text() == metrics
    assert is_free(out)


def test_the_command_of_a_finished_run_ends_with_0(finished):
    out, _, _ = finished
    result = command("train", *flags(out=out))
    assert result.code == 0
    assert "is finished: 64 images" in result.out


def test_two_launches_in_one_process_continue_each_other(tmp_path, finished):
    """The second is of the same run, with more images; the directory is let go of between."""
    first = launch_here(tmp_path / "run", minutes=1e-9)
    assert first.ending is Ending.OUT_OF_TIME
    assert first.images == 8
    said = []
    second = launch_here(tmp_path / "run", said.append)
    assert second.ending is Ending.FINISHED
    assert "resumed   at 8 images (step 1)" in said
    out, _, _ = finished
    assert final_files(tmp_path / "run") == final_files(out)


@pytest.fixture
def handlers():
    """Handlers of this test, for the signals that stop a run; those before come back."""

    def nothing(number, frame):
        """Take note of nothing."""

    stopping = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, nothing) for number in stopping}
    yield dict.fromkeys(stopping, nothing)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_process_can_be_interrupted_after_a_launch(tmp_path, handlers):
    launch_here(tmp_path, images=8)
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_a_process_that_ends_with_it_cannot_be_interrupted_any_more(tmp_path, monkeypatch):
    set_to = {}
    monkeypatch.setattr(module.signal, "signal", lambda number, to: set_to.update({number: to}))
    monkeypatch.setattr(module, "train", lambda session, state: Ending.FINISHED)
    launch(tiny_config(tmp_path), CPU, silent, ends_process=True)
    assert set_to == {signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.SIG_IGN}


def test_an_error_lets_go_of_the_directory(tmp_path, monkeypatch):
    """Also while the error is still held, as by a notebook that shows it."""

    def fail(session, state):
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(module, "train", fail)
        with pytest.raises(RuntimeError, match="broken") as held:
            launch_here(tmp_path)
    assert held.value.__traceback__ is not None
    assert is_free(tmp_path)
    assert launch_here(tmp_path).ending is Ending.FINISHED


def test_a_run_in_use_is_refused_and_stays_in_use(tmp_path):
    holder = RunDir(tmp_path)
    holder.claim(tiny_config(tmp_path))
    with pytest.raises(RunError, match="is in use by process"):
        launch_here(tmp_path)
    assert not is_free(tmp_path)
    holder.release()
    assert is_free(tmp_path)


def test_a_setting_that_changed_is_said(tmp_path):
    launch_here(tmp_path, images=16)
    said = []
    outcome = launch_here(tmp_path, said.append, images=32)
    assert "continuing with --images 32 (was 16)" in said
    assert outcome.images == 32


def test_the_end_of_the_time_is_said_with_its_flag(tmp_path):
    said = []
    launch_here(tmp_path, said.append, minutes=1e-9)
    assert said[-1].startswith("--minutes 1e-09 are over at 8 images, all saved")
    assert "the same command continues" in said[-1]


def test_a_signal_is_said(tmp_path, monkeypatch):
    load = loop.load

    def interrupted(source, first, buffers):
        if first == 16:
            signal.raise_signal(signal.SIGTERM)
        load(source, first, buffers)

    monkeypatch.setattr(loop, "load", interrupted)
    said = []
    outcome = launch_here(tmp_path, said.append)
    assert outcome.ending is Ending.STOPPED
    assert said[-1].startswith("stopped by a signal at 24 images, all saved")


@pytest.mark.parametrize(
    "settings, error, named",
    [
        ({"batch": 9, "micro_batch": 2}, ValueError, "--micro-batch 2"),
        ({"adamw_ema": "cuda"}, Unavailable, "--adamw-ema cuda"),
        ({"attention": "flash"}, Unavailable, "--attention flash"),
    ],
)
def test_what_cannot_run_makes_nothing(tmp_path, settings, error, named):
    out = tmp_path / "run"
    with pytest.raises(error, match=named):
        launch_here(out, **settings)
    assert not out.exists()


@pytest.mark.parametrize(
    "settings, error, named",
    [
        ({"num_classes": 9}, ValueError, "--num-classes"),
        ({"data": "no/such/folder", "logogram_count": None}, FileNotFoundError, "no/such/folder"),
    ],
)
def test_a_start_that_fails_over_its_data_leaves_what_it_found(tmp_path, settings, error, named):
    for out in (tmp_path / "new", tmp_path / "there"):
        if out.name == "there":
            out.mkdir()
        with pytest.raises(error, match=named):
            launch_here(out, **settings)
        assert out.exists() is (out.name == "there")


def test_a_start_that_fails_after_its_codebook_was_fitted_keeps_it(tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("broken")

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(module, "train", fail)
        with pytest.raises(RuntimeError, match="broken"):
            launch_here(out)
    assert RunDir(out).codebook.exists()
    assert is_free(out)


def test_a_folder_of_images_with_other_classes_is_refused_before_it_is_encoded(
    tmp_path, monkeypatch
):
    write_folder(Logograms(24, 10), tmp_path / "images", "png")
    monkeypatch.setattr(session_module, "open_tokens", lambda *words: pytest.fail("it encoded"))
    with pytest.raises(ValueError, match="--num-classes 9: .* has 5 classes"):
        launch_here(
            tmp_path / "run", data=str(tmp_path / "images"), logogram_count=None, num_classes=9
        )
    assert not (tmp_path / "run").exists()


def test_a_rank_that_does_not_write_claims_nothing(finished):
    out, _, _ = finished
    holder = RunDir(out)
    holder.claim(holder.read_config())
    other_rank = dataclasses.replace(CPU, rank=1)
    outcome = launch(tiny_config(out), other_rank, silent)
    assert outcome.ending is Ending.ALREADY_FINISHED
    holder.release()
