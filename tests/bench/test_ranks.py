"""bench/ranks.py: its arithmetic; bench/completion.py at the smallest setting."""

import sys
from argparse import Namespace

import pytest
import torch

from bench import completion, harness, ranks
from heptapod_fast.runs import load_run
from tests.running import train_here


def test_ranks_are_compared_round_by_round():
    """Noise meets those of one round alike: the ratio is that of each round, then the median."""
    rates = {"one rank": [1.0, 2.0, 4.0], "2 ranks, ddp": [0.5, 2.0, 6.0]}
    options = Namespace(size="B", batch=8, ranks=2, steps=5)
    row = ranks.row("2 ranks, ddp", rates, options)
    found = row["extra_info"]
    assert found["images/s"] == 2.0
    assert found["of one rank's"] == 1.0
    assert (found["of one rank's, least"], found["of one rank's, most"]) == (0.5, 1.5)
    assert row["stats"]["median"] == pytest.approx(8 / 2.0)
    assert ranks.row("one rank", rates, options)["extra_info"]["of one rank's"] == 1.0


def test_every_part_is_completed_and_measured(tmp_path):
    train_here(tmp_path, image_size=24, images=16)
    rows = completion.measure(load_run(tmp_path, device="cpu"), count=5)
    assert len(rows) == len(completion.KEEPS) * len(completion.PER_STEP)
    assert rows[0]["name"] == "completion, left-half, 1 at a step"
    for row in rows:
        found = row["extra_info"]
        assert found["given tokens unchanged"] == "True"
        assert 0 <= found["symmetry accuracy"] <= 1
        assert row["stats"]["rounds"] == len(completion.SEEDS)
    assert rows[0]["extra_info"]["given tokens"] == 18


def test_a_completion_that_changes_what_was_given_is_seen(tmp_path, monkeypatch):
    train_here(tmp_path, image_size=24, images=16)
    loaded = load_run(tmp_path, device="cpu")
    original = type(loaded.system).complete
    monkeypatch.setattr(
        type(loaded.system),
        "complete",
        lambda self, given, *rest: (original(self, given, *rest) + 1) % 16,
    )
    monkeypatch.setattr(completion, "KEEPS", ("centre",))
    rows = completion.measure(loaded, count=5)
    assert {row["extra_info"]["given tokens unchanged"] for row in rows} == {"False"}


def test_other_pictures_have_no_symmetry_to_read(tmp_path):
    train_here(tmp_path, data="synthetic", num_classes=3, images=16, logogram_count=None)
    with pytest.raises(SystemExit, match="--data logograms is needed"):
        completion.measure(load_run(tmp_path, device="cpu"), count=5)


def test_files_do_not_say_where_the_project_lies(monkeypatch):
    given = [f"{harness.ROOT}/bench/ranks.py", "--out", f"{harness.ROOT}/bench/results/x.json"]
    monkeypatch.setattr(sys, "argv", given)
    assert harness.machine("cpu")["command"] == "python bench/ranks.py --out bench/results/x.json"
    assert harness.machine("cpu")["torch"] == torch.__version__
