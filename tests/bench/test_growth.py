"""bench/growth.py: its arithmetic, and all of it at the smallest setting."""

import json
import subprocess
import sys

import pytest

from bench import growth
from bench.growth import Point
from bench.process import ROOT
from bench.timer import Timing
from tests.running import environment

SMALL, LARGE, SHARED = Point(batch=4), Point(batch=8), Point(batch=4, ranks=2)
SWEEPS = {"batch": [SMALL, LARGE], "ranks": [SMALL, SHARED]}
# Seconds of a step, three rounds.
TIMINGS = {
    SMALL: Timing((2.0, 2.0, 4.0), 1, 1.0),
    LARGE: Timing((3.0, 3.0, 3.0), 1, 1.0),
    SHARED: Timing((2.0, 1.0, 1.0), 1, 1.0),
}
FLOPS = {SMALL: 400e6, LARGE: 800e6, SHARED: 400e6}


def test_time_is_set_against_flops_and_the_first_point():
    first, second, *_ = growth.rows(SWEEPS, TIMINGS, FLOPS)
    assert first["extra_info"]["time per FLOP"] == 1
    # Twice the FLOPs in 3 seconds instead of 2.
    notes = second["extra_info"]
    assert notes["time per FLOP"] == pytest.approx(0.75)
    assert notes["time per FLOP, quartiles"] == pytest.approx([0.5625, 0.75])
    assert notes["us an image"] == pytest.approx(3e6 / 8)
    assert notes["MFLOP an image"] == pytest.approx(100)
    assert second["stats"]["median"] == 3.0 and second["stats"]["rounds"] == 3


def test_two_ranks_in_half_the_time_are_perfect_scaling():
    *_, shared = growth.rows(SWEEPS, TIMINGS, FLOPS)
    assert shared["name"] == "2 ranks"
    assert shared["extra_info"]["time per FLOP"] == pytest.approx(1.0)


def test_points_have_names_within_their_sweep():
    point = Point(side=6, batch=4, density=2)
    names = [growth.label_of(sweep, point) for sweep in growth.SWEEPS]
    assert names == ["batch 4", "density 2", "6 x 6 tokens", "1 rank"]
    rows = growth.rows(SWEEPS, TIMINGS, FLOPS)
    assert [row["group"] for row in rows] == ["batch", "batch", "ranks", "ranks"]
    assert [row["extra_info"]["value"] for row in rows] == [4, 8, 1, 2]


def test_one_thing_is_varied_at_a_time_from_6_to_32():
    for sweep, points in growth.SWEEPS.items():
        name = "side" if sweep == "tokens" else sweep
        changed = [{**vars(point), name: None} for point in points]
        assert all(others == changed[0] for others in changed), sweep
        assert growth.BASE in points, sweep
    sides = [point.side for point in growth.SWEEPS["tokens"]]
    assert (sides[0], sides[-1]) == (6, 32)
    assert len(growth.points_of(growth.SWEEPS)) == len(set(growth.points_of(growth.SWEEPS)))


def test_it_runs_at_the_smallest_setting(tmp_path):
    """Two ranks, all sweeps, a file."""
    out = tmp_path / "growth-test.json"
    command = [sys.executable, "bench/growth.py", "--quick", "--rounds", "2", "--out", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(out.read_text())
    names = [row["name"] for row in data["benchmarks"]]
    assert len(names) == 8 and names[-1] == "2 ranks"
    flops = [row["extra_info"]["MFLOP an image"] for row in data["benchmarks"]]
    assert flops[0] == flops[1] and flops[3] > flops[2] and flops[5] > flops[4]
    assert data["machine_info"]["command"].startswith("python bench/growth.py --quick")
    assert data["machine_info"]["network"]["width"] == growth.NETWORK["width"]
