"""bench/gpu.py without a GPU: what it merges, judges and calls pending."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu as gpu_driver
from bench import gpu_files, measuring, process
from bench.case import Case
from bench.pages import judging, pending_page
from bench.pages.gpu_page import ceilings_of, gpu_page, section_lines
from bench.roofline import UNKNOWN, Ceilings
from bench.sections import OPERATIONS, SECTIONS, suites
from bench.sections.operations import cases_of
from bench.sections.work import OutOfTime, Unavailable, Work, case_name
from bench.timer import Timing

ROOT = Path(__file__).resolve().parents[2]


def gpu(*arguments):
    return subprocess.run(
        [sys.executable, "bench/gpu.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def contender(name, seconds, why="", missing=False):
    return {
        name: dict(
            contender=name,
            seconds=seconds,
            quartiles=None,
            launched=None,
            why=why,
            missing=missing,
        )
    }


def result(date="2026-01-02", **sections):
    return {
        "gpu": "NVIDIA Test",
        "date": date,
        "multiprocessors": 1,
        "versions": {"torch": "2.11"},
        "command": "python bench/gpu.py",
        "sections": {name.replace("_", "-", 1): section for name, section in sections.items()},
    }


def section(rows=(), status="done", why="", code="aaa"):
    return {"status": status, "seconds": 1.0, "rows": list(rows), "why": why, "code": code}


CEILINGS = section(
    [
        dict(
            case="ceilings: copy 1024 MB",
            bytes=4e9,
            flops=0,
            gate="",
            aim="",
            contenders=contender("copy", 1e-3),
        ),
        dict(
            case="ceilings: product square, 1 x 1 x 1",
            bytes=0,
            flops=8e11,
            gate="",
            aim="",
            contenders=contender("cuBLAS", 1e-3),
        ),
    ]
)


def row(ours, peers, gate, flops=0.0, case="a case"):
    contenders = contender("ours", ours)
    for name, seconds in peers.items():
        contenders |= contender(
            name, seconds, "" if seconds else "not installed", missing=seconds is None
        )
    return dict(case=case, bytes=4e9, flops=flops, gate=gate, aim="", contenders=contenders)


@pytest.mark.parametrize(
    "ours, peers, gate, expected",
    [
        (2e-3, {"eager": 4e-3, "compiled": 3e-3}, ">= 1.5x best peer", True),
        (2e-3, {"eager": 4e-3, "compiled": 2.9e-3}, ">= 1.5x best peer", False),
        (2e-3, {"eager": None}, ">= 1.5x best peer", None),
        (1.25e-3, {}, ">= 75% of copy bandwidth", True),
        (1.5e-3, {}, ">= 75% of copy bandwidth", False),
        (1.1e-3, {"eager": 1.6e-3}, "1.4x best peer; 85% of copy bandwidth", True),
        (1.2e-3, {"eager": 9e-3}, "1.4x best peer; 85% of copy bandwidth", False),
        (2e-3, {"eager": 2e-3, "compiled": 3e-3}, ">= 1.5x compiled", True),
        (2e-3, {"eager": 9e-3}, ">= 1.5x compiled", None),
        (2e-3, {"eager": 3e-3, "flex": 4e-3}, ">= 2x flex", True),
        (1e-3, {"eager": 3e-3, "flex": 4e-3}, ">= 4x best peer", False),
        (None, {"eager": 9e-3}, ">= 1.5x best peer", None),
    ],
)
def test_gates_are_judged_by_the_best_peer_and_the_measured_copy(ours, peers, gate, expected):
    ceilings = ceilings_of(result(ceilings=CEILINGS))
    assert ceilings == Ceilings(copy=4e12, product=8e14)
    assert judging.judged(row(ours, peers, gate), ceilings).gate is expected


def test_a_broken_peer_leaves_a_gate_open_and_a_missing_one_does_not():
    ceilings = Ceilings(copy=4e12, product=8e14)
    found = row(2e-3, {"eager": 4e-3, "liger": None}, ">= 1.5x best peer")
    assert judging.judged(found, ceilings).gate is True
    found["contenders"] |= contender("compiled", None, "RuntimeError: broke")
    assert judging.judged(found, ceilings).gate is None
    found["gate"] = ">= 9x best peer"
    assert judging.judged(found, ceilings).gate is False


def test_the_page_says_which_peers_did_not_run_and_why():
    rows = [row(2e-3, {"eager": 4e-3, "liger": None}, "", case=name) for name in ("one", "two")]
    rows[1]["contenders"] |= contender("flex", None, "RuntimeError: broke\nand more")
    lines = section_lines("op-adaln", section(rows), UNKNOWN)
    assert lines[-2:] == [
        "- liger: not installed (2 cases)",
        "- flex: FAILED, RuntimeError: broke and more (two)",
    ]


def test_a_missed_gate_says_where_it_stands():
    found = row(2e-3, {"eager": 1e-3, "flex": 5e-3}, "")
    found = judging.judged(found, Ceilings(copy=4e12))
    assert judging.standing(found, ">= 3x flex") == "2.50x flex"
    assert judging.standing(found, ">= 1.2x best peer, 65% of copy bandwidth") == (
        "0.50x the best peer, eager, 50% of copy bandwidth"
    )


def test_ceilings_of_another_day_serve_the_same_gpu():
    first, second = result(ceilings=CEILINGS), result("2026-01-03", op_adaln=section())
    assert ceilings_of(second, [first, second]).copy == 4e12
    assert ceilings_of({**second, "gpu": "other"}, [first, second]) == UNKNOWN


def test_the_floor_is_the_longer_of_bytes_and_products():
    ceilings = Ceilings(copy=4e12, product=8e14)
    moving, computing = row(2e-3, {}, ""), row(4e-3, {}, "", flops=1.6e12)
    assert judging.judged(moving, ceilings).share == pytest.approx(0.5)
    assert judging.judged(computing, ceilings).share == pytest.approx(0.5)


def test_pages_of_a_measurement(tmp_path):
    gated = next(case for case in cases_of("layer_norm") if case.gate)
    rows = [row(1e-3, {"eager": 3e-3, "liger": None}, gated.gate, case=case_name(gated))]
    rows[0]["contenders"]["ours"]["launched"] = 2e-3
    rows[0]["contenders"]["eager"]["launched"] = 5e-3
    measured = result(
        ceilings=CEILINGS,
        op_layer_norm=section(rows),
        op_adaln=section([], "partial", "some\nout of time"),
        tests=section([dict(case="tests", passed=False, summary="1 failed")]),
    )
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(measured))
    done = gpu("--merge", path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out/GPU.md").read_text()
    line = f"| {case_name(gated)} | 1000.0 | 100% | eager | 3000.0 | 3.00 | 2.50 | {gated.gate}: "
    assert line + "met |" in page
    assert "partial: out of time" in page and "tests: FAILED, 1 failed" in page
    pending = (tmp_path / "out/PENDING.md").read_text()
    assert "`op-layer_norm`" not in pending and "`op-layer_norm-LH`" in pending
    assert "`op-adaln`" in pending and "`step-B`" in pending
    assert case_name(gated) not in pending and "layer_norm: add_layer_norm" in pending
    assert "adaln" in pending.split("## Gates")[1]


def test_runs_add_up_and_a_cut_off_one_loses_nothing(tmp_path):
    one, two = row(1e-3, {}, "", case="one"), row(1e-3, {}, "", case="two")
    cut = row(1e-3, {}, "", case="one")
    cut["contenders"] |= contender("eager", None, "no time left")
    files = [
        result(ceilings=CEILINGS),
        result(op_adaln=section([one], "partial", "out of time")),
        result(op_adaln=section([cut], "partial", "out of time")),
        result(op_adaln=section([], "failed", "broke")),
        result(op_adaln=section([two])),
        result(ceilings=section([], "failed", "broke", code="bbb")),
    ]
    for content in files:
        gpu_files.merge(content, tmp_path)
    whole = json.loads((tmp_path / "gpu/nvidia-test-2026-01-02.json").read_text())
    assert whole["sections"]["op-adaln"] == section([one, two])
    # Other code is another matter: its failure is news.
    assert whole["sections"]["ceilings"] == section([], "failed", "broke", code="bbb")


# -------------------------------------------------------------------------------- running sections

CASE = Case(
    "add",
    "small",
    lambda: torch.randn(8),
    {"ours": lambda x: lambda: x + x, "eager": lambda x: lambda: x * 2},
    bytes=64,
)


def work(tmp_path, seconds=100.0, **state):
    path = tmp_path / "rows.jsonl"
    path.touch()
    return Work(path, time.monotonic() + seconds, **state)


def lines_of(work):
    return [json.loads(line) for line in work.rows.read_text().splitlines()]


def test_a_section_measures_what_is_not_done(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.sections.work.device_here", lambda: "cpu")
    todo = work(tmp_path)
    todo.measure(CASE)
    *tried, written = lines_of(todo)
    assert tried == [{"trying": ["add: small", "ours"]}, {"trying": ["add: small", "eager"]}]
    assert written["case"] == "add: small" and written["contenders"]["ours"]["seconds"] > 0
    work(tmp_path, done={"add: small"}).measure(CASE)
    assert len(lines_of(todo)) == 3
    with pytest.raises(OutOfTime):
        work(tmp_path, seconds=-1).measure(CASE)


def test_a_case_that_was_cut_off_is_written_and_ends_the_section(tmp_path, monkeypatch):
    results = [
        measuring.Result("ours", Timing((1.0, 1.0), 1, 0.0)),
        measuring.Result("eager", None, measuring.NO_TIME),
    ]
    monkeypatch.setattr("bench.sections.work.measure", lambda *arguments, **named: results)
    todo = work(tmp_path)
    with pytest.raises(OutOfTime):
        todo.measure(CASE)
    (written,) = lines_of(todo)
    assert not gpu_files.is_whole(written)


def fake_processes(monkeypatch, *endings):
    """bench/gpu.py's processes: (what is written, exit code, output) of each; returns the states
    that they are given."""
    states = []

    def run(command, deadline):
        rows, state = (Path(command[command.index(flag) + 1]) for flag in ("--rows", "--state"))
        states.append(json.loads(state.read_text()))
        written, code, output = endings[len(states) - 1]
        rows.write_text(written)
        return code, output

    monkeypatch.setattr(gpu_driver, "run", run)
    return states


def lines(*rows):
    return "".join(json.dumps(each) + "\n" for each in rows)


FIRST, SMALL = {"case": "first"}, {"case": "add: small"}
TRYING = {"trying": ["add: small", "eager"]}


def test_what_ends_a_process_is_left_out_by_the_next(monkeypatch):
    torn = lines(FIRST, TRYING)
    states = fake_processes(monkeypatch, (torn, -11, "Segmentation fault\n"), (lines(SMALL), 0, ""))
    found = gpu_driver.run_section(SECTIONS["ceilings"], 1000, [{"case": "before"}])
    assert [r["case"] for r in found["rows"]] == ["before", "first", "add: small"]
    assert found["status"] == "done" and found["why"] == ""
    left_out = {"add: small": {"eager": "Segmentation fault"}}
    assert states == [
        {"done": ["before"], "failed": {}},
        {"done": ["before", "first"], "failed": left_out},
    ]


@pytest.mark.parametrize(
    "written, code, status",
    [
        (lines(FIRST, TRYING), gpu_driver.OUT_OF_TIME, "partial"),
        (lines(FIRST, TRYING), process.CUT_OFF, "partial"),
        (lines(FIRST) + '{"case": "to', 1, "partial"),
        ("", 1, "failed"),
        ("", gpu_driver.UNAVAILABLE, "failed"),
    ],
)
def test_no_second_process_where_a_section_ends_otherwise(monkeypatch, written, code, status):
    states = fake_processes(monkeypatch, (written, code, "the reason"))
    found = gpu_driver.run_section(SECTIONS["ceilings"], 1000, [])
    assert len(states) == 1
    assert found["status"] == status and found["why"] == "the reason"
    assert [r["case"] for r in found["rows"]] == (["first"] if status == "partial" else [])


def test_a_section_is_a_process_of_this_file(tmp_path, monkeypatch):
    """The worker's side: tests that cannot run say what is missing, with an exit code."""
    rows, state = tmp_path / "rows.jsonl", tmp_path / "state.json"
    rows.touch()
    state.write_text(json.dumps({"done": ["smoke"], "failed": {}}))
    flags = ("--rows", rows, "--state", state, "--seconds", 100)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--worker", "smoke", *map(str, flags)])
    assert gpu_driver.main() == 0 and not rows.read_text()
    state.write_text(json.dumps({"done": [], "failed": {}}))
    done = gpu(*("--worker", "smoke", "--rows", rows, "--state", state, "--seconds", -1))
    assert done.returncode == gpu_driver.OUT_OF_TIME and "out of time" in done.stdout


def test_tests_need_pytest(tmp_path, monkeypatch):
    monkeypatch.setattr(suites, "NEEDED", ("pytest", "no_such_package"))
    with pytest.raises(Unavailable, match="no_such_package is not installed"):
        suites.SMOKE.measure(work(tmp_path))


def test_a_run_of_tests_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(suites, "run", lambda command, deadline: (1, "x\n== 1 failed, 2 passed =="))
    todo = work(tmp_path)
    suites.LADDER.measure(todo)
    (row,) = lines_of(todo)
    assert row["case"] == "ladder" and not row["passed"]
    assert suites.LADDER.table([row], UNKNOWN) == ["- ladder: FAILED, 1 failed, 2 passed"]
    monkeypatch.setattr(suites, "run", lambda command, deadline: (process.CUT_OFF, ""))
    with pytest.raises(OutOfTime):
        suites.LADDER.measure(todo)
    assert lines_of(todo)[-1]["case"] == "ladder, cut off"


def test_commands_end_at_their_deadline_with_everything_they_started():
    begin, nap = time.monotonic(), f"sleep 77.{os.getpid()}"  # no other run's
    code, output = process.run(["bash", "-c", f"echo here; {nap} & {nap}"], begin + 1.5)
    assert code == process.CUT_OFF and "here" in output and time.monotonic() - begin < 10
    left = subprocess.run(["pgrep", "-f", f"^{nap}$"], capture_output=True, text=True)
    assert not left.stdout


def test_a_section_is_measured_again_when_its_code_changes(tmp_path, monkeypatch):
    for name in gpu_files.COMMON:
        place = tmp_path / name
        folder = place.parent if place.suffix else place
        folder.mkdir(parents=True, exist_ok=True)
        if place.suffix:
            place.write_text(name)
    for name in ("adaln", "diffusion_mlp", "layer_norm"):
        (tmp_path / f"bench/bench_{name}.py").write_text(name)
    (tmp_path / "tests").mkdir()
    (tmp_path / "csrc/table.cuh").write_text("1")
    monkeypatch.setattr(gpu_files, "ROOT", tmp_path)
    sections = ("op-adaln", "op-adaln-LH", "op-layer_norm", "tests")
    before = [gpu_files.digest(SECTIONS[name]) for name in sections]

    def changed(path):
        (tmp_path / path).write_text("2")
        after = [gpu_files.digest(SECTIONS[name]) for name in sections]
        found = {name for name, old, new in zip(sections, before, after) if old != new}
        before[:] = after
        return found

    assert changed("bench/bench_diffusion_mlp.py") == {"op-adaln", "op-adaln-LH"}
    assert changed("tests/test_new.py") == {"tests"}
    assert changed("csrc/table.cuh") == set(sections)
    about = dict(gpu="NVIDIA Test", versions={"torch": "2.11"})
    adaln = SECTIONS["op-adaln"]
    (tmp_path / "gpu").mkdir()
    kept = section([row(1e-3, {}, "")], code=gpu_files.digest(adaln))
    (tmp_path / "gpu/a.json").write_text(json.dumps(result(op_adaln=kept)))
    assert gpu_files.stored(adaln, about, [tmp_path])["status"] == "done"
    assert not gpu_files.stored(adaln, about | {"versions": {}}, [tmp_path])
    changed("bench/bench_adaln.py")
    assert not gpu_files.stored(adaln, about, [tmp_path])


def main_of(monkeypatch, *arguments):
    """What bench/gpu.py says when it refuses."""
    monkeypatch.setattr(sys, "argv", ["bench/gpu.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as refused:
        gpu_driver.main()
    return refused.value.code


def test_without_a_gpu_it_says_what_it_can_do(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--merge" in main_of(monkeypatch, "--out", tmp_path)
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    assert "broken.json" in main_of(monkeypatch, "--merge", broken, "--out", tmp_path)
    assert main_of(monkeypatch, "--sections", "nonsense") == 2


def test_it_lists_its_sections():
    listed = gpu("--list")
    assert listed.returncode == 0, listed.stderr
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(SECTIONS)


def test_committed_pages_are_what_the_files_say():
    results = ROOT / "bench/results"
    found = [json.loads(path.read_text()) for path in sorted((results / "gpu").glob("*.json"))]
    assert (results / "PENDING.md").read_text() == pending_page.pending_page(found)
    assert (results / "GPU.md").read_text() == gpu_page(found)


def test_every_operation_with_a_kernel_is_measured():
    tables = {path.stem for path in pending_page.CONFIGS.glob("*.json")}
    assert tables <= set(OPERATIONS)
    assert {f"op-{name}" for name in OPERATIONS} <= SECTIONS.keys()


def test_every_section_is_explained_once():
    names = [found.name for found in SECTIONS.values()]
    assert names == list(SECTIONS) and len({found.about for found in SECTIONS.values()}) == len(
        names
    )
    for found in SECTIONS.values():
        assert all((ROOT / place).exists() for place in (*gpu_files.COMMON, *found.code))


STEP_CODE = """
import sys
absent = 'safetensors google_crc32c tyro zarr rich scipy matplotlib pytest'
sys.modules |= dict.fromkeys(absent.split())
from bench.sections.training import synthetic_step
small = dict(depth=1, head_depth=1, width=32, heads=2, num_classes=5)
step = synthetic_step('B', 'cpu', 2, small | {settings})
loss, norm = step.call()
operators = [line for line in step.lines if line.startswith('operator')]
assert loss.isfinite() and norm.isfinite() and operators and step.flops > 0
print('fine')
"""


@pytest.mark.parametrize(
    "settings",
    [
        dict(tokenizer="kl16", dropout=0.1, diffusion_blocks=1, diffusion_width=16),
        dict(tokenizer="vq16", kernels="reference", attention="sdpa", adamw_ema="reference"),
    ],
)
def test_a_training_step_is_prepared_without_optional_packages(settings):
    """As on a machine that has torch, triton and numpy alone; a tiny model stands in."""
    code = STEP_CODE.replace("{settings}", repr(settings))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.endswith("fine\n"), done.stderr
