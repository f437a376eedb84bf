"""What a bench file is made of: cases, contenders that may be missing or broken, tables, files."""

import importlib
import json
import re
import subprocess
import sys
import time

import pytest
import torch

from bench import figures, harness, measuring, timer
from bench.case import BACKWARD, BOTH, FORWARD, Case, Missing, timed
from bench.process import ROOT
from bench.roofline import UNKNOWN, Ceilings
from bench.sections import OPERATIONS
from heptapod_fast.reports import bench as reports

SCRIPTS = sorted(path.stem for path in (ROOT / "bench").glob("bench_*.py"))
OTHERS = sorted(set(SCRIPTS) - {f"bench_{name}" for name in OPERATIONS})


def absent(made):
    raise Missing("pip install peer")


def broken(made):
    raise RuntimeError("no such kernel")


def make_case(**contenders):
    functions = {"ours": lambda x: lambda: x + x, "eager": lambda x: lambda: x * 2, **contenders}
    return Case("add", "small", lambda: torch.randn(8), functions, bytes=64, flops=8)


def by_name(results):
    return {result.contender: result for result in results}


# ------------------------------------------------------------------------------------------- cases


@pytest.mark.parametrize("direction, calls", [(FORWARD, 1), (BACKWARD, 0), (BOTH, 1)])
def test_a_pass_is_timed_alone_or_with_the_other(direction, calls):
    forwards = []

    def square(x):
        forwards.append(None)
        return x * x

    x = torch.tensor([3.0], requires_grad=True)
    call = timed({"ours": square}, direction)["ours"](((x,), (torch.ones(1),)))
    forwards.clear()
    found = call()
    assert len(forwards) == calls
    expected = 9.0 if direction == FORWARD else 6.0
    value = found if direction == FORWARD else found[0]
    assert value.item() == expected
    assert x.grad is None


def test_inputs_without_gradients_are_left_alone():
    x = torch.ones(2, requires_grad=True)
    arguments = (x, torch.ones(2), None)
    contender = timed({"ours": lambda x, y, mask: (x * y, y)[0]}, BOTH)["ours"]
    (gradient,) = contender((arguments, (torch.ones(2),)))()
    assert gradient.tolist() == [1.0, 1.0]


def test_missing_and_broken_contenders_say_why_and_leave_the_others():
    case = make_case(absent=absent, broken=broken, compiled=broken)
    found = by_name(measuring.measure(case, "cpu", rounds=2))
    assert list(found) == list(case.contenders)
    assert len(found["ours"].timing.samples) == 2
    assert found["absent"].missing and found["absent"].why == "pip install peer"
    assert not found["broken"].missing
    assert found["broken"].why == "RuntimeError: no such kernel"
    assert found["compiled"].missing and "CUDA" in found["compiled"].why


def test_inputs_that_cannot_be_made_are_a_failure_of_all():
    case = Case("add", "huge", lambda: torch.empty(2**60), {"ours": broken, "eager": broken})
    for result in measuring.measure(case, "cpu"):
        assert result.timing is None and not result.missing and "inputs: " in result.why


def test_contenders_that_are_known_to_fail_are_not_tried():
    tried = []
    case = make_case(broken=broken)
    known = {"broken": "ended the process"}
    found = measuring.measure(case, "cpu", rounds=2, failed=known, announce=tried.append)
    assert by_name(found)["broken"].why == "ended the process"
    assert tried == ["ours", "eager"]


def test_without_time_nothing_is_tried():
    found = measuring.measure(make_case(), "cpu", deadline=time.monotonic() - 1)
    assert {result.why for result in found} == {measuring.NO_TIME}


# ------------------------------------------------------------------------------------------ tables


def result(name, *samples):
    return measuring.Result(name, timer.Timing(samples, 1, 0.0))


RESULTS = [
    result("ours", 1e-6, 2e-6, 3e-6),
    result("eager", 4e-6, 4e-6, 4e-6),
    measuring.Result("liger", None, "pip install liger-kernel", missing=True),
    measuring.Result("flex", None, "RuntimeError: broke"),
]


def test_a_table_has_the_rates_the_roofline_and_the_ratio():
    case = make_case()
    ceilings = Ceilings(copy=64e6, product=16e6)  # 1 us for the bytes, half a us for the FLOPs
    table = figures.Table([case], ceilings)
    assert table.heading("add").split() == [
        *("add", "us", "spread", "GB/s", "TFLOP/s", "roofline", "ours", "is")
    ]
    name, ours, eager, flex = table.lines(case, RESULTS)
    assert name == "small"
    assert ours.split() == ["ours", "2.0", "50%", "0.032", "4e-06", "50%"]
    assert eager.split() == ["eager", "4.0", "0%", "0.016", "2e-06", "25%", "2.00x", "(1.67-3.00)"]
    assert flex == "  flex: FAILED, RuntimeError: broke"
    assert figures.missing_lines(RESULTS) == ["not here: liger: pip install liger-kernel"]


def test_columns_that_no_case_fills_are_left_out():
    alone = Case("step", "one", lambda: None, {"ours": broken}, images=3)
    assert figures.Table([alone], UNKNOWN).columns == ["us", "spread", "images/s"]


def test_the_floor_is_the_longer_of_bytes_and_flops():
    assert Ceilings(copy=10.0, product=10.0).floor(20.0, 30.0) == 3.0
    assert Ceilings(copy=10.0, product=100.0).floor(20.0, 30.0) == 2.0
    assert UNKNOWN.floor(20.0, 30.0) == 0.0


# ------------------------------------------------------------------------------------------- files


def test_a_results_file_is_one_that_tables_are_made_of(tmp_path):
    case = make_case()
    rows = harness.rows_of(case, RESULTS)
    path = tmp_path / "here.json"
    harness.write_results(path, rows, harness.machine("cpu"))
    page = reports.bench_table(path)
    assert "| add: small, ours | 0.002 | " in page
    assert "| add: small, eager | 0.004 | 0.004 to 0.004 | us 4," in page
    assert "ours is faster 2," in page.split("add: small, eager")[1]
    assert "liger" not in page


def test_a_case_with_one_contender_is_its_own_name():
    alone = Case("step", "one", lambda: None, {"ours": broken})
    assert harness.entry_name(alone, "ours") == "one"
    assert harness.entry_name(make_case(), "ours") == "small, ours"


def test_pytest_benchmarks_clock_plays_the_samples():
    player = harness.Player()
    player.load([0.5, 0.25])
    seen = []
    for _ in range(3):
        begin = player()
        player.play()
        seen.append(player() - begin)
    assert seen == [0.5, 0.25, 0.0]


# ------------------------------------------------------------------------------- every bench file


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_case_of_an_operation_runs_on_a_cpu(operation, capsys):
    cases = importlib.import_module(f"bench.bench_{operation}").cases("cpu")
    rows = harness.run(cases, "cpu", rounds=2)
    text = capsys.readouterr().out
    assert "FAILED" not in text
    for case in cases:
        assert f"{case.operation}: {harness.entry_name(case, 'ours')}" in {r["name"] for r in rows}
        assert f"\n{case.name}\n  ours " in text


@pytest.mark.parametrize("operation", OPERATIONS)
def test_cases_on_a_gpu_are_listed_without_one(operation):
    cases = importlib.import_module(f"bench.bench_{operation}").cases("cuda")
    names = [f"{case.operation}: {case.name}" for case in cases]
    assert len(set(names)) == len(names) > 0
    assert all(case.bytes > 0 and "ours" in case.contenders for case in cases)


def script(name, *flags, timeout=300):
    return subprocess.run(
        [sys.executable, f"bench/{name}.py", *map(str, flags)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_one_round_is_refused(capsys):
    """There are no quartiles of it."""
    with pytest.raises(SystemExit):
        harness.parser("about").parse_args(["--rounds", "1"])
    assert "--rounds: expected 2 or more, found 1" in capsys.readouterr().err
    assert harness.parser("about").parse_args(["--rounds", "2"]).rounds == 2


def test_a_bench_file_prints_a_table_by_itself(tmp_path):
    path = tmp_path / "out.json"
    flags = ("--device", "cpu", "--rounds", 2, "--only", "layer_norm forward", "--out", path)
    done = script("bench_layer_norm", *flags)
    assert done.returncode == 0, done.stderr
    assert re.search(r"layer_norm +us +spread +GB/s +ours is", done.stdout)
    assert re.search(r"\n  eager +[\d.,]+ +\d+% +[\d.]+ +[\d.]+x", done.stdout)
    assert "backward" not in done.stdout
    assert len(json.loads(path.read_text())["benchmarks"]) == 4
    wrong = script("bench_layer_norm", "--only", "nothing like it")
    assert wrong.returncode != 0 and "no case" in wrong.stderr


HELP_OF_ALL = """
import contextlib, io, json, runpy, sys
from pathlib import Path

said = {}
for name in sys.argv[1:]:
    # As the command line has it: the folder of the script comes first.
    sys.path.insert(0, "bench")
    sys.argv = [f"bench/{name}.py", "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as error:
            assert not error.code, (name, error.code)
    said[name] = out.getvalue()
print(json.dumps(said))
"""


@pytest.mark.slow
def test_every_file_explains_itself():
    """In one process, which imports torch once."""
    done = subprocess.run(
        [sys.executable, "-c", HELP_OF_ALL, *SCRIPTS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert list(said) == list(SCRIPTS)
    for name, text in said.items():
        assert f"python bench/{name}.py" in text, name
        assert "--out" in text, name


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_files_of_data_and_whole_steps_print_their_tables(name, tmp_path):
    if name in ("bench_cache", "bench_loader"):
        for package in ("zarr", "google_crc32c"):
            pytest.importorskip(package)
    few = () if name in ("bench_cache", "bench_decode") else ("--rounds", 2)
    done = script(name, *few, "--out", tmp_path / "out.json", timeout=600)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 5
    assert "median" in reports.bench_table(tmp_path / "out.json")
