"""Processes that are killed, at any time: the same command ends with the same bytes."""

import random
import signal

import pytest

from heptapod_fast.checkpoints import damage, listed
from heptapod_fast.train.records import read_metrics
from tests.running import final_files, finish, flags, start, wait_for


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Files of the last checkpoint of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed")
    assert finish(start("train", *flags(out=out))).code == 0
    return final_files(out)


def same_end(out, undisturbed, **settings):
    """The same command, run again, finishes with the files of an undisturbed run."""
    result = finish(start("train", *flags(out=out, **settings)))
    assert result.code == 0, result.out
    assert final_files(out) == undisturbed
    names = [path.name for path in (out / "checkpoints").iterdir()]
    assert not [name for name in names if not name.startswith("step-") or "." in name]
    return result.out


def killed(out, fault, **settings):
    result = finish(start("train", *flags(out=out, **settings), HEPTAPOD_FAULT=fault))
    assert result.code == -signal.SIGKILL, result.out


def test_killed_in_a_step(tmp_path, undisturbed):
    killed(tmp_path, "kill9@step=6", sync_checkpoints=True)
    assert "resumed   at 32 images" in same_end(tmp_path, undisturbed)


@pytest.mark.parametrize("where, resumed", [("files=4", 16), ("manifest=4", 16), ("rename=4", 32)])
def test_killed_while_a_checkpoint_is_written(tmp_path, undisturbed, where, resumed):
    killed(tmp_path, f"kill9@{where}")
    assert all(damage(path) == [] for path in listed(tmp_path / "checkpoints"))
    assert f"resumed   at {resumed} images" in same_end(tmp_path, undisturbed)


@pytest.mark.slow
def test_killed_at_five_random_steps_in_a_row(tmp_path, undisturbed):
    # A checkpoint every step, so that every kill finds the run further on.
    steps = sorted(random.Random(5).sample(range(1, 9), 5))
    for step in steps:
        result = finish(
            start(
                "train",
                *flags(out=tmp_path, checkpoint_every=8),
                HEPTAPOD_FAULT=f"kill9@step={step}",
            )
        )
        assert result.code == -signal.SIGKILL, result.out
    same_end(tmp_path, undisturbed, checkpoint_every=8)


@pytest.mark.slow
def test_killed_before_the_first_checkpoint(tmp_path, undisturbed):
    killed(tmp_path, "kill9@step=1")
    assert "resumed" not in same_end(tmp_path, undisturbed)


def signalled(out, numbers, **settings):
    """How a run ends that gets signals in its third step."""
    process = start("train", *flags(out=out, **settings), HEPTAPOD_FAULT="wait@step=3")
    wait_for(process, "waiting at step=3")
    for number in numbers:
        process.send_signal(number)
    return finish(process)


def stopped(out, numbers):
    """A run that is stopped in its third step: it must end in peace and can be continued."""
    result = signalled(out, numbers)
    assert result.code == 0, result.out
    assert "stopped by a signal at 24 images" in result.out
    assert "the same command continues" in result.out
    assert "Traceback" not in result.out
    assert read_metrics(out / "metrics.jsonl")[-1]["images"] == 24
    assert listed(out / "checkpoints")[-1].name == "step-00000003"


def test_sigint_saves_and_ends_with_0(tmp_path):
    stopped(tmp_path, [signal.SIGINT])


def test_a_signal_after_everything_is_saved_changes_nothing(tmp_path):
    process = start("train", *flags(out=tmp_path), HEPTAPOD_FAULT="wait@step=3")
    wait_for(process, "waiting at step=3")
    process.send_signal(signal.SIGTERM)
    wait_for(process, "stopped by a signal")
    process.send_signal(signal.SIGTERM)
    assert finish(process).code == 0


def test_sigterm_twice_is_one_clean_end_and_continues_exactly(tmp_path, undisturbed):
    stopped(tmp_path, [signal.SIGTERM, signal.SIGTERM])
    assert "resumed   at 24 images" in same_end(tmp_path, undisturbed)


@pytest.mark.slow
def test_terminated_and_then_killed_during_a_checkpoint(tmp_path, undisturbed):
    process = start("train", *flags(out=tmp_path), HEPTAPOD_FAULT="sleep@files=4")
    wait_for(process, "sleeping at files=4")
    process.send_signal(signal.SIGTERM)
    process.kill()
    finish(process)
    assert listed(tmp_path / "checkpoints")[-1].name == "step-00000002"
    assert (tmp_path / "checkpoints" / "step-00000004.tmp").is_dir()
    same_end(tmp_path, undisturbed)


@pytest.mark.slow
def test_sigusr1_saves_and_continues(tmp_path):
    settings = {"checkpoint_every": 10**6, "keep_checkpoints": 9}
    result = signalled(tmp_path, [signal.SIGUSR1], **settings)
    assert result.code == 0, result.out
    assert "finished  64 images" in result.out
    first, last = listed(tmp_path / "checkpoints")
    assert (first.name, last.name) == ("step-00000003", "step-00000008")
    assert damage(first) == []


@pytest.mark.slow
def test_a_run_in_use_is_refused(tmp_path):
    process = start("train", *flags(out=tmp_path), HEPTAPOD_FAULT="wait@step=2")
    wait_for(process, "waiting at step=2")
    second = finish(start("train", *flags(out=tmp_path)))
    process.kill()
    finish(process)
    assert second.code == 1
    assert f"is in use by process {process.pid} on" in second.out
    assert "--out" in second.out
    assert "Traceback" not in second.out
