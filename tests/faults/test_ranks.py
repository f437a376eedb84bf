"""Several ranks, of which one dies, hangs or fails: all end within seconds, the message says which,
and the same command ends with the same weights."""

import random
import signal

import pytest

from heptapod_fast.checkpoints import damage, listed
from tests.running import final_files, finish, flags, free_port, start, start_ranks, torchrun

EVERY_STEP = dict(checkpoint_every=8)
SHARDED = EVERY_STEP | dict(parallel="fsdp")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The last checkpoint of a run of two ranks that nothing happened to, by mode."""
    made = {}

    def of(**settings):
        key = tuple(sorted(settings.items()))
        if key not in made:
            out = tmp_path_factory.mktemp("undisturbed")
            results = run_unwatched(out, **settings)
            assert [result.code for result in results] == [0, 0], results[0].out
            made[key] = final_files(out)
        return made[key]

    return of


def run(out, fault="", launcher=None, **settings):
    words = flags(out=out, **settings)
    return finish(start("train", *words, launcher=launcher or torchrun(2), HEPTAPOD_FAULT=fault))


def run_unwatched(out, fault="", **settings):
    """How both ranks ended, without a torchrun that would end one for the other."""
    words = flags(out=out, **settings)
    return [finish(rank) for rank in start_ranks(2, "train", *words, HEPTAPOD_FAULT=fault)]


@pytest.mark.slow
def test_one_rank_is_killed_at_five_random_steps(tmp_path, undisturbed):
    """A checkpoint every step, so that every kill finds the run further on. The other rank finds
    out by itself."""
    steps = sorted(random.Random(3).sample(range(1, 9), 5))
    for number, step in enumerate(steps):
        killed = number % 2
        results = run_unwatched(tmp_path, f"kill9@step={step},rank={killed}", **EVERY_STEP)
        assert results[killed].code == -signal.SIGKILL
        assert results[1 - killed].code not in (0, -signal.SIGKILL)
        assert all(damage(path) == [] for path in listed(tmp_path / "checkpoints"))
    results = run_unwatched(tmp_path, **EVERY_STEP)
    assert [result.code for result in results] == [0, 0], results[0].out
    assert final_files(tmp_path) == undisturbed(**EVERY_STEP)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["files=4", "manifest=4", "rename=4"])
def test_all_ranks_die_while_a_checkpoint_is_written(tmp_path, undisturbed, where):
    results = run_unwatched(tmp_path, f"kill9@{where}")
    assert all(result.code != 0 for result in results)
    assert listed(tmp_path / "checkpoints")
    assert all(damage(path) == [] for path in listed(tmp_path / "checkpoints"))
    assert [result.code for result in run_unwatched(tmp_path)] == [0, 0]
    assert final_files(tmp_path) == undisturbed()


@pytest.mark.slow
def test_torchrun_restarts_what_was_killed(tmp_path, undisturbed):
    launcher = (*torchrun(2), "--max-restarts=1")
    result = run(tmp_path, "kill9@step=6,rank=1", launcher=launcher, **SHARDED)
    assert result.code == 0, result.out
    assert "resumed   at" in result.out
    assert final_files(tmp_path) == undisturbed(**SHARDED)


def test_a_rank_that_hangs_is_named_within_the_timeout(tmp_path):
    words = flags(out=tmp_path, rank_timeout=3)
    waits, hangs = start_ranks(2, "train", *words, HEPTAPOD_FAULT="sleep@step=4,rank=1")
    try:
        result = finish(waits)
    finally:
        hangs.kill()
        finish(hangs)
    assert result.code == 1
    assert "rank 0 waits at step 4, no word from rank 1 (last seen at step 3)" in result.out
    assert "Timed out" in result.out


def test_a_rank_that_fails_says_so_and_the_others_end_with_it(tmp_path):
    result = run(tmp_path, "raise@step=4,rank=1")
    assert result.code != 0
    said = [line for line in result.out.splitlines() if line.startswith("error:")]
    assert said[0] == "error: asked to fail at step=4", result.out
    assert result.out.index("asked to fail") < result.out.index("FAILED")


def test_ranks_of_different_settings_are_refused_before_anything_is_made(tmp_path):
    out = tmp_path / "run"
    meeting = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE="2")
    processes = [
        start("train", *flags(out=out, seed=rank), RANK=str(rank), **meeting) for rank in (0, 1)
    ]
    first, second = (finish(process) for process in processes)
    assert first.code == 1 and second.code == 1
    assert "error: rank 1 has other settings than rank 0" in first.out
    assert "Traceback" not in first.out + second.out
    assert not out.exists()


@pytest.mark.slow
def test_an_out_that_ranks_do_not_share_is_refused(tmp_path):
    """As a folder on the disk of each machine: a checkpoint would lack what the others wrote."""
    meeting = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE="2")
    places = [tmp_path / "first", tmp_path / "second"]
    for place in places:
        place.mkdir()
    processes = [
        start("train", *flags(out="run"), cwd=place, RANK=str(rank), **meeting)
        for rank, place in enumerate(places)
    ]
    first, second = (finish(process) for process in processes)
    assert first.code == 1 and second.code == 1
    where = "run/config.json, which rank 0 does: --out must name a folder that all machines share"
    assert f"error: rank 1 does not find {where}" in second.out
    assert "Traceback" not in first.out + second.out
    assert not (places[0] / "run").exists()
