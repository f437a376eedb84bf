"""Runs of a plan: each once, whatever happens in between, and the table of what there is."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from heptapod_fast.ablations import Ablation, Variant, run_plan, write_table
from heptapod_fast.ablations.plan import Plan, Row
from heptapod_fast.ablations.running import (
    RunFailed,
    jobs_of,
    shares_of_machine,
    slug,
    training_words,
    words_of,
)
from tests.running import ROOT, environment

TRAIN = """
import json, os, pathlib, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = pathlib.Path(flags["--out"])
out.mkdir(parents=True, exist_ok=True)
here = pathlib.Path(__file__).parent
with (here / "calls.txt").open("a") as file:
    file.write(f"train {out.name} {flags['--images']} {flags['--seed']}\\n")
if (here / "fail").exists() and (here / "fail").read_text() == out.name:
    sys.exit("out of luck")
(out / "threads").write_text(os.environ.get("OMP_NUM_THREADS", ""))
stopped = (here / "stop").exists() and (here / "stop").read_text() == out.name
(out / "trained").write_text("7" if stopped else flags["--images"])
if "--evaluate-every" in flags:
    assert flags["--evaluate-metrics"] == "relation" and flags["--evaluate-count"] == "10"
    every, seed = int(flags["--evaluate-every"]), int(flags["--seed"])
    with (out / "metrics.jsonl").open("w") as file:
        for images in range(every, int(flags["--images"]) + 1, every):
            file.write(json.dumps({"images": images, "step_seconds": 2.0 + seed}) + "\\n")
            numbers = {"evaluation/relation_accuracy": images / 1e6 + seed / 10}
            file.write(json.dumps({"images": images, **numbers}) + "\\n")
"""
EVALUATE = """
import json, pathlib, sys
run, *words = sys.argv[1:]
flags = dict(zip(words[::2], words[1::2]))
here = pathlib.Path(__file__).parent
with (here / "calls.txt").open("a") as file:
    file.write(f"evaluate {pathlib.Path(run).name} {flags.get('--temperature', '-')}\\n")
images = int((pathlib.Path(run) / "trained").read_text())
assert flags["--extractor"] == "small"
numbers = {"relation_accuracy": images / 1e4 + int(flags["--seed"]) / 10, "device": "a test"}
numbers |= {"images_seen": images, "torch": "2.13", "symmetry/odd": images / 2000}
if "--temperature" in flags:
    numbers["relation_accuracy"] -= 0.05
pathlib.Path(flags["--out"]).write_text(json.dumps(numbers))
"""
EXTRA = {"extractor": "small"}
ABLATION = Ablation("Two rows", "A test.", lambda scale: [], paper_columns=("FID",))


@pytest.fixture
def tools(tmp_path):
    folder = tmp_path / "tools"
    folder.mkdir()
    (folder / "train.py").write_text(TRAIN)
    (folder / "evaluate.py").write_text(EVALUATE)
    return folder


def plan_of(seeds=(0, 1), points=1):
    one = Variant("one, first", {"width": 32}, x=1, paper=(19.2,))
    two = Variant("two", {"width": 64}, x=2)
    cold = Variant("two, cold", {"width": 64}, sampling={"temperature": 0.5}, of="two", x=3)
    rows = (Row(one, 1000, 10, 2e9, 0.1), Row(two, 500, 11, 4e9, 0.2), Row(cold, 0, 0, 0.0, 0.0))
    return Plan(
        "two",
        rows,
        seeds,
        "compute",
        ("relation",),
        10,
        points,
        EXTRA,
        {},
        "python x",
        "2026-01-02",
    )


def calls(tools):
    path = tools / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []


def test_seeds_come_one_after_the_other_and_rows_share_runs(tools, tmp_path):
    said = []
    run_plan(plan_of(), tmp_path / "out", tools, said.append)
    assert calls(tools) == [
        "train one-first-seed0 1000 0",
        "evaluate one-first-seed0 -",
        "train two-seed0 500 0",
        "evaluate two-seed0 -",
        "evaluate two-seed0 0.5",
        "train one-first-seed1 1000 1",
        "evaluate one-first-seed1 -",
        "train two-seed1 500 1",
        "evaluate two-seed1 -",
        "evaluate two-seed1 0.5",
    ]
    assert [line[:5] for line in said] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    assert "about" in said[0] and "left" in said[0] and "left" not in said[-1]


def test_nothing_is_repeated_and_the_table_is_the_same(tools, tmp_path):
    plan, whole, broken = plan_of(), tmp_path / "whole", tmp_path / "broken"
    run_plan(plan, whole, tools, lambda text: None)
    write_table(ABLATION, plan, whole)
    (tools / "calls.txt").unlink()
    (tools / "fail").write_text("one-first-seed1")
    with pytest.raises(RunFailed, match="(?s)one, first, seed 1 ended with exit code 1.*of luck"):
        run_plan(plan, broken, tools, lambda text: None)
    before = calls(tools)
    # A table of what there is says so.
    write_table(ABLATION, plan, broken)
    page = (broken / "table.md").read_text()
    assert "Not all seeds are there yet: one, first, two, two, cold." in page
    (tools / "fail").unlink()
    (tools / "calls.txt").unlink()
    said = []
    run_plan(plan, broken, tools, said.append)
    assert said[0] == "2 of 4 runs are done already"
    again = calls(tools)
    assert again[0] == "train one-first-seed1 1000 1"  # goes on with what had failed
    assert not {call for call in before if "seed0" in call} & set(again)
    write_table(ABLATION, plan, broken)
    for name in ("table.md", "table.json", "chart.png"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name
    (tools / "calls.txt").unlink()
    run_plan(plan, broken, tools, said.append)
    assert calls(tools) == [] and said[-1] == "4 of 4 runs are done already"


def test_a_run_that_was_stopped_is_not_measured_for_a_whole_one(tools, tmp_path):
    """Training that was told to stop ends without an error."""
    plan = plan_of((0,))
    (tools / "stop").write_text("two-seed0")
    with pytest.raises(RunFailed, match="two, seed 0 was stopped after 7 of 500 images"):
        run_plan(plan, tmp_path, tools, print)
    job = jobs_of(plan, tmp_path)[1]
    assert json.loads(job.evaluation(plan.rows[1]).read_text())["images_seen"] == 7
    write_table(ABLATION, plan, tmp_path)  # which does not take the 7 for 500
    assert "| two | 1.1e-05 M | 4 | 500 |  |" in (tmp_path / "table.md").read_text()
    (tools / "stop").unlink()
    run_plan(plan, tmp_path, tools, print)
    assert json.loads(job.evaluation(plan.rows[1]).read_text())["images_seen"] == 500


WAITING = """
import pathlib, signal, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = pathlib.Path(flags["--out"])
out.mkdir(parents=True, exist_ok=True)

def save(number, frame):
    (out / "trained").write_text("7")
    sys.exit(0)

signal.signal(signal.SIGINT, signal.SIG_DFL)  # nobody but the runner is to tell it
signal.signal(signal.SIGTERM, save)
(out / "ready").touch()
time.sleep(600)
"""
RUNNER = """
import sys
from pathlib import Path
from heptapod_fast.ablations import run_plan
from tests.ablations.test_running import plan_of
out, tools, at_once = sys.argv[1:]
run_plan(plan_of(), Path(out), Path(tools), print, at_once=int(at_once))
"""


@pytest.mark.parametrize("at_once, number", [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_lets_all_runs_save_and_nothing_is_measured(tools, tmp_path, at_once, number):
    (tools / "train.py").write_text(WAITING)
    out = tmp_path / "out"
    words = [sys.executable, "-c", RUNNER, str(out), str(tools), str(at_once)]
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    folders = [job.folder for job in jobs_of(plan_of(), out)][:at_once]
    while not all((folder / "ready").exists() for folder in folders):
        assert process.poll() is None, process.stdout.read().decode()
        time.sleep(0.05)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert f"{number.name}: runs save what they have" in said.decode()
    assert "KeyboardInterrupt: stopped: give the command again" in said.decode()
    assert [(folder / "trained").read_text() for folder in folders] == ["7"] * at_once
    assert calls(tools) == []  # no run was measured, and none but these begun
    assert len(list((out / "runs").glob("*/ready"))) == at_once


def test_numbers_of_a_part_are_none(tools, tmp_path):
    """An evaluation that was cut off, and one of a run that had not seen all of its images."""
    plan = plan_of((0,))
    run_plan(plan, tmp_path, tools, print)
    whole = {path: path.read_text() for path in tmp_path.glob("runs/*/evaluation-*.json")}
    one, two, cold = whole
    one.write_text("")
    two.write_text(whole[two][:20])
    part = json.loads(whole[cold]) | {"images_seen": 7}
    cold.write_text(json.dumps(part))
    said = []
    run_plan(plan, tmp_path, tools, said.append)
    assert "are done already" not in said[0]
    assert {path: path.read_text() for path in whole} == whole


def test_a_table_is_there_after_the_first_run(tools, tmp_path):
    plan = plan_of((0,))
    pages = []

    def look():
        write_table(ABLATION, plan, tmp_path)
        pages.append((tmp_path / "table.md").read_text())

    run_plan(plan, tmp_path, tools, print, after_each=look)
    assert ["Not all seeds are there yet: two, two, cold." in page for page in pages] == [
        True,
        False,
    ]


def test_several_at_once_have_a_gpu_each(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    shares = shares_of_machine(3)
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == ["0", "1", "0"]
    assert shares_of_machine(1) == [{}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares_of_machine(2)] == ["5", "7"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert "CUDA_VISIBLE_DEVICES" not in shares_of_machine(2)[0]


def test_a_point_that_a_seed_lacks_is_left_out(tools, tmp_path):
    plan = plan_of(points=3)
    run_plan(plan, tmp_path, tools, lambda text: None)
    metrics = jobs_of(plan, tmp_path)[0].folder / "metrics.jsonl"
    lines = [line for line in metrics.read_text().splitlines() if '"images": 668' not in line]
    null = {"images": 668, "evaluation/relation_accuracy": None}
    metrics.write_text("\n".join([*lines, json.dumps(null)]) + "\n")
    write_table(ABLATION, plan, tmp_path)
    one, *_ = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [point["images"] for point in one["curve"]] == [334, 1000]


def test_the_first_failure_stops_those_that_have_not_begun(tools, tmp_path):
    (tools / "fail").write_text("one-first-seed0")
    with pytest.raises(RunFailed):
        run_plan(plan_of(), tmp_path, tools, print, at_once=2)
    begun = {call.split()[1] for call in calls(tools)}
    assert "two-seed1" not in begun


def test_a_lost_evaluation_is_made_again_alone(tools, tmp_path):
    plan = plan_of((0,))
    run_plan(plan, tmp_path, tools, lambda text: None)
    job = jobs_of(plan, tmp_path)[1]
    job.evaluation(plan.rows[2]).unlink()
    (tools / "calls.txt").unlink()
    run_plan(plan, tmp_path, tools, lambda text: None)
    # Training is asked for again, and says that it is done; what was measured stays.
    assert calls(tools) == ["train two-seed0 500 0", "evaluate two-seed0 0.5"]


def test_several_at_once_share_the_threads(tools, tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run_plan(plan_of(), tmp_path, tools, lambda text: None, at_once=2)
    for job in jobs_of(plan_of(), tmp_path):
        assert (job.folder / "threads").read_text() == "4"
    assert len(calls(tools)) == 10


def test_a_launcher_starts_training_alone(tools, tmp_path):
    starter = tmp_path / "start.py"
    starter.write_text("import runpy, sys\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0])\n")
    run_plan(plan_of((0,)), tmp_path, tools, print, launcher=(sys.executable, str(starter)))
    log = (tmp_path / "runs" / "two-seed0-log.txt").read_text().splitlines()
    assert log[0].startswith(f"$ {sys.executable} {starter} ") and "train.py" in log[0]
    assert log[1].startswith(f"$ {sys.executable} {tools}/evaluate.py")


def test_a_table_has_means_and_spreads(tools, tmp_path):
    plan = plan_of()
    run_plan(plan, tmp_path, tools, lambda text: None)
    written = write_table(ABLATION, plan, tmp_path)
    assert [path.name for path in written] == ["table.md", "table.json", "chart.png"]
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    # Seeds give 0.1 and 0.2, and 0.05 and 0.15.
    assert [row["mean"]["relation_accuracy"] for row in rows] == pytest.approx([0.15, 0.1, 0.05])
    assert rows[0]["deviation"]["relation_accuracy"] == pytest.approx(0.1 / 2**0.5)
    assert [row["of_classes"] for row in rows] == [
        {"symmetry": {"odd": odd}} for odd in (0.5, 0.25, 0.25)
    ]
    assert rows[2]["parameters"] == 11 and rows[2]["images"] == 500  # of the runs it samples
    page = (tmp_path / "table.md").read_text()
    assert "| one, first | 1e-05 M | 2 | 1,000 | 0.15 ± 0.071 | 19.2 |" in page
    assert "| two, cold | 1.1e-05 M | 4 | 500 | 0.05 ± 0.071 |  |" in page
    assert "Not alike: parameters, one, first = 1: two 1.10." in page
    assert "Not alike: FLOPs of an image, one, first = 1: two 2.00." in page
    assert "compute of a run" not in page
    assert (
        "*mean ± deviation of 2 seeds; `python x`, begun 2026-01-02, a test, torch 2.13.*" in page
    )


def test_numbers_on_the_way_are_curves(tools, tmp_path):
    """Two points on the way of three; what training says of the end is not the end's number."""
    plan = plan_of(points=3)
    run_plan(plan, tmp_path, tools, lambda text: None)
    write_table(ABLATION, plan, tmp_path)
    one, two, cold = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [point["images"] for point in one["curve"]] == [334, 668, 1000]
    assert one["curve"][1]["relation_accuracy"] == pytest.approx([0.000668, 0.100668])
    assert one["curve"][-1]["relation_accuracy"] == pytest.approx([0.1, 0.2])
    assert [point["images"] for point in two["curve"]] == [167, 334, 500]
    assert cold["curve"] == []  # its run is measured as `two`
    assert one["seconds"] == two["seconds"] == cold["seconds"] == 2 * 2.5
    assert (tmp_path / "chart.png").is_file()


def test_a_run_that_is_not_done_has_no_curve(tools, tmp_path):
    plan = plan_of(points=3)
    run_plan(plan, tmp_path, tools, lambda text: None)
    jobs_of(plan, tmp_path)[0].evaluation(plan.rows[0]).unlink()
    write_table(ABLATION, plan, tmp_path)
    one, *_ = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [len(point["relation_accuracy"]) for point in one["curve"]] == [1, 1, 1]


def test_what_is_measured_on_the_way_is_measured_as_at_the_end():
    plan = plan_of(points=4)
    plan = dataclasses.replace(plan, evaluation={"inception": "i.pth", "reference": "r.npz"})
    words = training_words(plan, jobs_of(plan, Path("out"))[0], Path("tools"))
    flags = dict(zip(words[2::2], words[3::2], strict=True))
    assert flags["--evaluate-every"] == "250"
    assert flags["--evaluate-inception"] == "i.pth" and flags["--evaluate-reference"] == "r.npz"
    once = training_words(plan_of(), jobs_of(plan, Path("out"))[0], Path("tools"))
    assert not any(word.startswith("--evaluate") for word in once)


def test_one_seed_has_no_spread(tools, tmp_path):
    plan = plan_of((3,))
    run_plan(plan, tmp_path, tools, lambda text: None)
    write_table(ABLATION, plan, tmp_path)
    assert "| 0.4 | 19.2 |" in (tmp_path / "table.md").read_text()


def test_words_as_they_are_typed():
    flags = {"lr_per_256": 0.1, "shares": (0.5, 0.5), "flip": True, "allow_upscale": False}
    assert words_of(flags) == [
        "--lr-per-256",
        "0.1",
        "--shares",
        "0.5",
        "0.5",
        "--flip",
        "--no-allow-upscale",
    ]
    assert slug("npp, 2/3 by 2 x 2") == "npp-2-3-by-2-x-2"
