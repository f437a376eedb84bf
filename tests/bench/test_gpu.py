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
from bench import gpu_report, harness
from bench.gpu_sections import OPERATIONS, RESTART, SECTIONS, Work, case_name

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
            ungraphed=None,
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
    ceilings = gpu_report.ceilings_of(result(ceilings=CEILINGS))
    assert ceilings == {"copy": 4e12, "product": 8e14}
    assert gpu_report.judged(row(ours, peers, gate), ceilings)["gate"] is expected


def test_a_broken_peer_leaves_a_gate_open_and_a_missing_one_does_not():
    ceilings = {"copy": 4e12, "product": 8e14}
    found = row(2e-3, {"eager": 4e-3, "liger": None}, ">= 1.5x best peer")
    assert gpu_report.judged(found, ceilings)["gate"] is True
    found["contenders"] |= contender("compiled", None, "RuntimeError: broke")
    assert gpu_report.judged(found, ceilings)["gate"] is None
    found["gate"] = ">= 9x best peer"
    assert gpu_report.judged(found, ceilings)["gate"] is False


def test_the_page_says_which_peers_did_not_run_and_why():
    rows = [row(2e-3, {"eager": 4e-3, "liger": None}, "", case=name) for name in ("one", "two")]
    rows[1]["contenders"] |= contender("flex", None, "RuntimeError: broke\nand more")
    lines = gpu_report.section_table("op-adaln", rows, {})
    assert lines[-2:] == [
        "- liger: not installed (2 cases)",
        "- flex: FAILED, RuntimeError: broke and more (two)",
    ]


def test_a_missed_gate_says_where_it_stands():
    found = row(2e-3, {"eager": 1e-3, "flex": 5e-3}, "")
    found = gpu_report.judged(found, {"copy": 4e12})
    assert gpu_report.standing(found, ">= 3x flex") == "2.50x flex"
    assert gpu_report.standing(found, ">= 1.2x best peer, 65% of copy bandwidth") == (
        "0.50x the best peer, eager, 50% of copy bandwidth"
    )


def test_ceilings_of_another_day_serve_the_same_gpu():
    first, second = result(ceilings=CEILINGS), result("2026-01-03", op_adaln=section())
    assert gpu_report.ceilings_of(second, [first, second])["copy"] == 4e12
    assert gpu_report.ceilings_of({**second, "gpu": "other"}, [first, second]) == {}


def test_the_floor_is_the_longer_of_bytes_and_products():
    ceilings = {"copy": 4e12, "product": 8e14}
    assert gpu_report.judged(row(2e-3, {}, ""), ceilings)["share"] == pytest.approx(0.5)
    assert gpu_report.judged(row(4e-3, {}, "", flops=1.6e12), ceilings)["share"] == pytest.approx(
        0.5
    )


def test_pages_of_a_measurement(tmp_path):
    layer = importlib_cases("layer_norm")
    gated = next(case for case in layer if case.gate)
    rows = [row(1e-3, {"eager": 3e-3, "liger": None}, gated.gate, case=case_name(gated))]
    rows[0]["contenders"]["ours"]["ungraphed"] = 2e-3
    rows[0]["contenders"]["eager"]["ungraphed"] = 5e-3
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


def importlib_cases(operation):
    import importlib

    return importlib.import_module(f"bench.bench_{operation}").cases("cuda")


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
    for i, content in enumerate(files):
        path = tmp_path / f"{i}.json"
        path.write_text(json.dumps(content))
        assert gpu("--merge", path, "--out", tmp_path).returncode == 0
    whole = json.loads((tmp_path / "gpu/nvidia-test-2026-01-02.json").read_text())
    assert whole["sections"]["op-adaln"] == section([one, two])
    # Other code is another matter: its failure is news.
    assert whole["sections"]["ceilings"] == section([], "failed", "broke", code="bbb")


CASE = harness.Case(
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


def test_a_section_measures_what_is_not_done(tmp_path):
    todo = work(tmp_path)
    todo.measure(CASE)
    (written,) = map(json.loads, todo.rows.read_text().splitlines())
    assert written["case"] == "add: small" and written["contenders"]["ours"]["seconds"] > 0
    work(tmp_path, done={"add: small"}).measure(CASE)
    assert len(todo.rows.read_text().splitlines()) == 1
    with pytest.raises(TimeoutError):
        work(tmp_path, seconds=-1).measure(CASE)


def test_a_case_that_was_cut_off_is_written_and_ends_the_section(tmp_path, monkeypatch):
    monkeypatch.setattr(
        harness,
        "measure",
        lambda case, deadline, failed: [
            harness.Result("ours", 1.0),
            harness.Result("eager", None, why=harness.NO_TIME),
        ],
    )
    todo = work(tmp_path)
    with pytest.raises(TimeoutError):
        todo.measure(CASE)
    assert not gpu_driver.whole(json.loads(todo.rows.read_text()))


def test_after_a_failed_capture_a_fresh_process_goes_on(tmp_path, monkeypatch):
    """The worker's side: exit code; then the driver's: what it tells the next process."""

    def fails(case, deadline, failed):
        raise harness.CaptureFailed("eager", "no graph")

    monkeypatch.setattr(harness, "measure", fails)
    todo = work(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        todo.measure(CASE)
    assert stopped.value.code == RESTART
    broken = todo.rows.read_text()
    states = []

    def run(command, deadline):
        rows, state = (Path(command[command.index(flag) + 1]) for flag in ("--rows", "--state"))
        states.append(json.loads(state.read_text()))
        if len(states) == 1:
            rows.write_text(json.dumps({"case": "first"}) + "\n" + broken + '{"case": "to')
            return RESTART, ""
        rows.write_text(json.dumps({"case": "add: small"}) + "\n")
        return 0, ""

    monkeypatch.setattr(gpu_driver, "run", run)
    found = gpu_driver.run_section("ceilings", 1000, [{"case": "before"}])
    assert [r["case"] for r in found["rows"]] == ["before", "first", "add: small"]
    assert found["status"] == "done" and states == [
        {"done": ["before"], "failed": {}},
        {"done": ["before", "first"], "failed": {"add: small": {"eager": "no graph"}}},
    ]
    monkeypatch.undo()
    results = harness.measure(CASE, failed={"eager": "no graph"})
    assert {r.contender: r.why for r in results} == {"ours": "", "eager": "no graph"}


def test_commands_end_at_their_deadline_with_everything_they_started():
    begin, nap = time.monotonic(), f"sleep 77.{os.getpid()}"  # no other run's
    code, output = gpu_driver.run(["bash", "-c", f"echo here; {nap} & {nap}"], begin + 1.5)
    assert code == 124 and "here" in output and time.monotonic() - begin < 10
    left = subprocess.run(["pgrep", "-f", f"^{nap}$"], capture_output=True, text=True)
    assert not left.stdout


def test_a_section_is_measured_again_when_its_code_changes(tmp_path, monkeypatch):
    for folder in gpu_driver.COMMON:
        place = tmp_path / folder
        place.mkdir(parents=True) if "." not in folder else place.parent.mkdir(exist_ok=True)
        if "." in folder:
            place.write_text(folder)
    for name in ("adaln", "diffusion_mlp", "layer_norm"):
        (tmp_path / f"bench/bench_{name}.py").write_text(name)
    (tmp_path / "tests").mkdir()
    (tmp_path / "csrc/table.cuh").write_text("1")
    monkeypatch.setattr(gpu_driver, "ROOT", tmp_path)
    sections = ("op-adaln", "op-adaln-LH", "op-layer_norm", "tests", "step-B")
    before = [gpu_driver.digest(name) for name in sections]

    def changed(path):
        (tmp_path / path).write_text("2")
        after = [gpu_driver.digest(name) for name in sections]
        found = {name for name, old, new in zip(sections, before, after) if old != new}
        before[:] = after
        return found

    assert changed("bench/bench_diffusion_mlp.py") == {"op-adaln", "op-adaln-LH"}
    assert changed("tests/test_new.py") == {"tests"}
    assert changed("csrc/table.cuh") == set(sections)
    about = dict(gpu="NVIDIA Test", versions={"torch": "2.11"})
    (tmp_path / "gpu").mkdir()
    kept = section([row(1e-3, {}, "")], code=gpu_driver.digest("op-adaln"))
    (tmp_path / "gpu/a.json").write_text(json.dumps(result(op_adaln=kept)))
    assert gpu_driver.stored("op-adaln", about, [tmp_path])["status"] == "done"
    assert not gpu_driver.stored("op-adaln", about | {"versions": {}}, [tmp_path])
    changed("bench/bench_adaln.py")
    assert not gpu_driver.stored("op-adaln", about, [tmp_path])


def test_without_a_gpu_it_says_what_it_can_do(tmp_path):
    done = gpu("--out", tmp_path)
    assert done.returncode != 0 and "--merge" in done.stderr and "Traceback" not in done.stderr
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    done = gpu("--merge", broken, "--out", tmp_path)
    assert done.returncode != 0 and "broken.json" in done.stderr and "Trace" not in done.stderr
    listed = gpu("--list")
    assert listed.returncode == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(SECTIONS)
    assert gpu("--sections", "nonsense").returncode == 2


def test_committed_pages_are_what_the_files_say():
    results = ROOT / "bench/results"
    found = [json.loads(path.read_text()) for path in sorted((results / "gpu").glob("*.json"))]
    assert (results / "PENDING.md").read_text() == gpu_report.pending_page(found)
    assert (results / "GPU.md").read_text() == gpu_report.gpu_page(found)


def test_every_operation_with_a_kernel_is_measured():
    tables = {path.stem for path in gpu_report.CONFIGS.glob("*.json")}
    assert tables <= set(OPERATIONS)
    assert {f"op-{name}" for name in OPERATIONS} <= SECTIONS.keys()


@pytest.mark.parametrize("settings", [dict(tokenizer="kl16"), dict(tokenizer="vq16")])
def test_a_training_step_is_prepared_without_optional_packages(settings):
    """As on a machine that has only torch, triton and numpy; a tiny model stands in."""
    code = (
        "import sys\n"
        "for name in ('PIL', 'safetensors', 'google_crc32c', 'tyro', 'zarr', 'rich', 'scipy'):"
        " sys.modules[name] = None\n"
        "from bench.gpu_sections import prepared_run\n"
        "from heptapod_fast.train.loop import training_step\n"
        "small = dict(depth=1, head_depth=1, width=32, heads=2, num_classes=5)\n"
        f"small |= {settings!r}\n"
        "if small['tokenizer'] == 'kl16': small |= dict(diffusion_blocks=1, diffusion_width=16)"
        "\nrun, micro, lines = prepared_run('B', small, 'cpu', 2)\n"
        "loss, norm = training_step(run, *micro)\n"
        "assert loss.isfinite() and norm.isfinite() and lines\nprint('fine')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.endswith("fine\n"), done.stderr
