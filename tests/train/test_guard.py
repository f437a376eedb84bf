"""Which steps are bad, and what a run does that has too many of them."""

import math
import statistics

import pytest
import torch

from heptapod_fast import checkpoints
from heptapod_fast.runs.directory import RunError
from heptapod_fast.train.guard import FIRST_JUDGED, FORGIVEN_AFTER, WINDOW, Guard
from heptapod_fast.train.optimizer import Optimizer
from heptapod_fast.train.records import read_metrics
from heptapod_fast.train.session import Ending
from tests.running import final_files, final_tensors, train_here

CPU = torch.device("cpu")


def judged(guard, norms):
    """Verdicts on a row of norms."""
    found = []
    for norm in norms:
        is_good = guard.judge(torch.tensor(float(norm)))
        guard.note(is_good)
        found.append(bool(is_good))
    return found


def calm(count, seed=0):
    """Norms of a run that goes well."""
    generator = torch.Generator().manual_seed(seed)
    return (1 + 0.1 * torch.randn(count, generator=generator)).tolist()


def by_definition(norms, sigmas):
    """The verdicts, with lists and Python's statistics."""
    window = []
    found = []
    for norm in norms:
        limit = math.inf
        if len(window) >= FIRST_JUDGED:
            last = window[-WINDOW:]
            limit = statistics.fmean(last) + sigmas * statistics.pstdev(last)
        found.append(math.isfinite(norm) and norm <= limit)
        if math.isfinite(norm):
            window.append(min(norm, limit))
    return found


def test_verdicts_are_those_of_the_definition():
    norms = calm(400)
    for place in (10, 63):
        norms[place] = 2.5
    for place in (64, 70, 71, 72, 200):
        norms[place] = 5.0
    norms[100], norms[101] = math.nan, math.inf
    norms[250:] = [3 * norm for norm in norms[250:]]  # a level that stays
    expected = by_definition(norms, 6)
    assert judged(Guard(CPU, 6.0), norms) == expected
    assert expected[10] and expected[63]  # too early
    assert not any(expected[place] for place in (64, 70, 71, 72, 100, 101, 200))
    assert not expected[250] and all(expected[390:])


def test_without_a_limit_only_what_is_not_finite_is_bad():
    norms = [*calm(100), 1e30, math.nan, math.inf, 1.0]
    assert judged(Guard(CPU), norms) == [True] * 101 + [False, False, True]


def test_strain_is_one_a_step_and_made_up_for():
    guard = Guard(CPU)
    judged(guard, [math.nan, math.nan])
    assert float(guard.strain) == 2
    judged(guard, [1.0] * (FORGIVEN_AFTER // 2))
    assert float(guard.strain) == pytest.approx(1.5, abs=1e-4)
    judged(guard, [1.0] * 2 * FORGIVEN_AFTER)
    assert float(guard.strain) == 0


@pytest.mark.parametrize("seen", [0, 5, WINDOW, WINDOW + 37])
def test_a_window_comes_back_from_a_checkpoint(seen):
    before = Guard(CPU, 3.0)
    judged(before, calm(seen))
    after = Guard(CPU, 3.0)
    judged(after, calm(9, seed=7))
    after.load(before.state())
    rest = calm(300, seed=1)
    assert judged(before, rest) == judged(after, rest)
    assert torch.equal(before.norms, after.norms)
    assert before.state() == after.state()


# --------------------------------------------------------------------------------------- whole runs


def poison(monkeypatch, steps, value=float("nan")):
    """The gradient of these steps (1 is the first) holds a NaN, or is this many times as large."""
    update = Optimizer.update

    def bad_update(self, *arguments):
        if self.step_count in steps:
            for parameter in self.parameters:
                parameter.grad.mul_(value)
        return update(self, *arguments)

    monkeypatch.setattr(Optimizer, "update", bad_update)


def test_a_run_goes_back_and_on_with_the_images_that_come_next(tmp_path, monkeypatch):
    """The checkpoint of step 4 is made between two bad steps: that of step 2 is taken."""
    poison(monkeypatch, {4, 5})
    said = []
    _, state, ending = train_here(
        tmp_path, say=said.append, max_skips=1, images=48, keep_checkpoints=9
    )
    assert ending is Ending.FINISHED and state.rollbacks == 1
    (warning,) = (line for line in said if line.startswith("WARNING"))
    assert "2 steps had a bad gradient" in warning and "after 16 images again" in warning
    steps = [checkpoints.step_of(path) for path in checkpoints.listed(tmp_path / "checkpoints")]
    assert steps == [2, 5, 6]  # that of step 4 is of the way it did not go on
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["images"] for r in records if "loss" in r] == [8, 16, 24, 32, 40, 48]
    # What was skipped stays counted, although the checkpoint knows of none.
    assert records[-1]["skipped"] == 2
    assert [(r["images"], r["went_back_to"]) for r in records if "went_back_to" in r] == [(40, 16)]


def test_the_weights_are_those_of_the_good_checkpoint(tmp_path, monkeypatch):
    """As if steps 3 to 5 had not been: the run that skips them ends with the same weights."""
    poison(monkeypatch, {4, 5})
    train_here(tmp_path / "back", max_skips=1, images=40, keep_checkpoints=9)
    monkeypatch.undo()
    train_here(tmp_path / "plain", images=40, keep_checkpoints=9)
    good = checkpoints.load_step(tmp_path / "plain" / "checkpoints", 2).read("model")
    found = final_tensors(tmp_path / "back")
    assert all(torch.equal(good[name], found[name]) for name in good)


def test_a_run_that_went_back_can_be_stopped_and_resumed(tmp_path, monkeypatch):
    settings = dict(max_skips=1, images=64, keep_checkpoints=9)
    poison(monkeypatch, {4, 5})
    train_here(tmp_path / "through", **settings)
    for stop_at in (32, 40, 48):
        out = tmp_path / f"stopped-{stop_at}"
        train_here(out, stop_at=stop_at, **settings)
        _, state, ending = train_here(out, **settings)
        assert ending is Ending.FINISHED and state.rollbacks == 1
        assert final_files(out) == final_files(tmp_path / "through")


def test_what_is_on_the_way_stays_until_the_new_checkpoint_is_there(tmp_path, monkeypatch):
    """Cut off in between, a run comes to the same point and goes back again."""
    poison(monkeypatch, {4, 5})
    save = checkpoints.save
    seen = []

    def watching(folder, files, state, keep, world):
        if state["step"] == 5:
            seen.extend(checkpoints.step_of(path) for path in checkpoints.listed(folder))
        return save(folder, files, state, keep, world)

    monkeypatch.setattr(checkpoints, "save", watching)
    train_here(tmp_path, max_skips=1, images=48, keep_checkpoints=9)
    assert seen == [2, 4]


def test_going_back_after_the_last_images_says_so(tmp_path, monkeypatch):
    poison(monkeypatch, {5, 6})
    said = []
    train_here(tmp_path, say=said.append, max_skips=1, images=48)
    (warning,) = (line for line in said if line.startswith("WARNING"))
    assert "these were the last images: a larger --images goes on" in warning


def test_a_run_gives_up_that_goes_back_too_often(tmp_path, monkeypatch):
    poison(monkeypatch, {3, 5, 7})
    settings = dict(max_skips=0, checkpoint_every=8)
    with pytest.raises(RunError, match="went back to a good checkpoint 2 times.*--lr-per-256"):
        train_here(tmp_path, max_rollbacks=2, **settings)


def test_a_run_without_a_good_checkpoint_gives_up(tmp_path, monkeypatch):
    poison(monkeypatch, {1, 3})
    with pytest.raises(RunError, match="holds no checkpoint from before it"):
        train_here(tmp_path, max_skips=1, checkpoint_every=8)


def test_the_last_good_checkpoint_is_kept_beside_the_newest(tmp_path, monkeypatch):
    poison(monkeypatch, {3})
    train_here(tmp_path, checkpoint_every=8, keep_checkpoints=2)
    steps = [checkpoints.step_of(path) for path in checkpoints.listed(tmp_path / "checkpoints")]
    assert steps == [2, 7, 8]


def test_spikes_are_skipped_where_that_is_asked_for(tmp_path, monkeypatch):
    poison(monkeypatch, {70, 75}, value=1000.0)
    settings = dict(images=640, checkpoint_every=640, log_every=80)
    train_here(tmp_path / "all", **settings)
    train_here(tmp_path / "most", skip_spikes=8, **settings)
    skipped = [read_metrics(tmp_path / name / "metrics.jsonl")[-1] for name in ("all", "most")]
    assert [record["skipped"] for record in skipped] == [0, 2]


def test_a_run_with_a_window_resumes_bit_for_bit(tmp_path, monkeypatch):
    settings = dict(images=640, checkpoint_every=640, log_every=80, skip_spikes=0.5)
    settings |= dict(max_skips=999)
    train_here(tmp_path / "through", **settings)
    train_here(tmp_path / "stopped", stop_at=560, **settings)
    train_here(tmp_path / "stopped", **settings)
    assert final_files(tmp_path / "through") == final_files(tmp_path / "stopped")
    assert read_metrics(tmp_path / "through" / "metrics.jsonl")[-1]["skipped"] > 0
