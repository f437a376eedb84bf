"""The count of dense supervision's cost."""

import json
from pathlib import Path

import pytest

from bench import dense_cost
from heptapod_fast.systems import build_system, configure
from heptapod_fast.train.metrics import training_flops

COMMITTED = Path(dense_cost.__file__).parent / "results" / "dense-cost.json"


@pytest.fixture(scope="module")
def counted():
    return dense_cost.counted()


def test_the_committed_file_is_up_to_date(counted):
    """Otherwise: python bench/dense_cost.py --out bench/results/dense-cost.json, and
    python tools/report.py bench/results."""
    assert json.loads(COMMITTED.read_text()) == counted


def test_rows_are_what_training_counts(counted):
    """A forward pass is a third of a training step."""
    rows = {row["name"]: row for row in counted["rows"]}
    for name, flags in {
        "n = 1": {"density": 1},
        "n = 8": {"density": 8},
        "n = 8, 16 rows a step": {"density": 8, "rows_per_step": 16},
    }.items():
        system = build_system(configure("L", **flags), 1000, "meta", fill=False)
        assert 3e9 * rows[name]["gflop"]["all"] == pytest.approx(training_flops(system))
    assert rows["n = 1"]["of_first"] == 1


def test_bounds_are_below_all_rows_of_as_many_steps(counted):
    *rows, without_loss, shared = counted["rows"]
    dense = [row["of_first"] for row in rows if row["steps"] == 8]
    assert shared["of_first"] < without_loss["of_first"] < min(dense)
    # Queries, keys and values of 257 elements of width 1,024, once instead of 8 times.
    spared = without_loss["gflop"]["head"] - shared["gflop"]["head"]
    assert spared == pytest.approx(7 * 2 * 3 * 1024**2 * 257 / 1e9)
