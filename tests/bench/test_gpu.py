"""bench/gpu.py without a GPU: what it merges, judges and calls pending."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import gpu_report
from bench.gpu_sections import OPERATIONS, SECTIONS, case_name

ROOT = Path(__file__).resolve().parents[2]


def gpu(*arguments):
    return subprocess.run([sys.executable, "bench/gpu.py", *map(str, arguments)], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)


def contender(name, seconds, why=""):
    return {name: dict(contender=name, seconds=seconds, quartiles=None, ungraphed=None, why=why)}


def result(date="2026-01-02", code="aaa", **sections):
    return {"gpu": "NVIDIA Test", "date": date, "multiprocessors": 1, "code": code,
            "versions": {"torch": "2.11"}, "command": "python bench/gpu.py",
            "sections": {name.replace("_", "-", 1): section for name, section in sections.items()}}


def section(rows=(), status="done", why=""):
    return {"status": status, "seconds": 1.0, "rows": list(rows), "why": why}


CEILINGS = section([
    dict(case="copy 1024 MB", bytes=4e9, flops=0, gate="", aim="",
         contenders=contender("copy", 1e-3)),
    dict(case="product square, 1 x 1 x 1", bytes=0, flops=8e11, gate="", aim="",
         contenders=contender("cuBLAS", 1e-3))])


def row(ours, peers, gate, flops=0.0, case="a case"):
    contenders = contender("ours", ours)
    for name, seconds in peers.items():
        contenders |= contender(name, seconds, "" if seconds else "not installed")
    return dict(case=case, bytes=4e9, flops=flops, gate=gate, aim="", contenders=contenders)


@pytest.mark.parametrize("ours, peers, gate, expected", [
    (2e-3, {"eager": 4e-3, "compiled": 3e-3}, ">= 1.5x best peer", True),
    (2e-3, {"eager": 4e-3, "compiled": 2.9e-3}, ">= 1.5x best peer", False),
    (2e-3, {"eager": None}, ">= 1.5x best peer", None),
    (1.25e-3, {}, ">= 75% of copy bandwidth", True),
    (1.5e-3, {}, ">= 75% of copy bandwidth", False),
    (1.1e-3, {"eager": 1.6e-3}, "1.4x best peer; 85% of copy bandwidth", True),
    (1.2e-3, {"eager": 9e-3}, "1.4x best peer; 85% of copy bandwidth", False),
    (2e-3, {"eager": 2e-3, "compiled": 3e-3}, ">= 1.5x compiled", True),
    (2e-3, {"eager": 9e-3}, ">= 1.5x compiled", None),
    (None, {"eager": 9e-3}, ">= 1.5x best peer", None)])
def test_gates_are_judged_by_the_best_peer_and_the_measured_copy(ours, peers, gate, expected):
    ceilings = gpu_report.ceilings_of(result(ceilings=CEILINGS))
    assert ceilings == {"copy": 4e12, "product": 8e14}
    assert gpu_report.judged(row(ours, peers, gate), ceilings)["gate"] is expected


def test_the_floor_is_the_longer_of_bytes_and_products():
    ceilings = {"copy": 4e12, "product": 8e14}
    assert gpu_report.judged(row(2e-3, {}, ""), ceilings)["share"] == pytest.approx(0.5)
    assert gpu_report.judged(row(4e-3, {}, "", flops=1.6e12), ceilings)["share"] == pytest.approx(
        0.5)


def test_pages_of_a_measurement(tmp_path):
    layer = importlib_cases("layer_norm")
    gated = next(case for case in layer if case.gate)
    rows = [row(1e-3, {"eager": 3e-3, "liger": None}, gated.gate, case=case_name(gated))]
    rows[0]["contenders"]["ours"]["ungraphed"] = 2e-3
    rows[0]["contenders"]["eager"]["ungraphed"] = 5e-3
    measured = result(ceilings=CEILINGS, op_layer_norm=section(rows),
                      op_adaln=section([], "partial", "some\nout of time"),
                      build=section([dict(case="tests", passed=False, summary="1 failed")]))
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
    good = row(1e-3, {}, "")
    files = [result(ceilings=CEILINGS), result(op_adaln=section([good])),
             result(op_adaln=section([], "partial", "out of time")),
             result(code="bbb", ceilings=section([], "failed", "broke"))]
    for i, content in enumerate(files):
        path = tmp_path / f"{i}.json"
        path.write_text(json.dumps(content))
        assert gpu("--merge", path, "--out", tmp_path).returncode == 0
    whole = json.loads((tmp_path / "gpu/nvidia-test-2026-01-02.json").read_text())
    assert whole["sections"]["op-adaln"]["status"] == "done"
    # Other code is another matter: its failure is news.
    assert whole["sections"]["ceilings"] == section([], "failed", "broke") | {"code": "bbb"}


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
    code = ("import sys\n"
            "for name in ('PIL', 'safetensors', 'google_crc32c', 'tyro', 'zarr', 'rich', 'scipy'):"
            " sys.modules[name] = None\n"
            "from bench.gpu_sections import prepared_run\n"
            "from heptapod_fast.train.loop import training_step\n"
            "small = dict(depth=1, head_depth=1, width=32, heads=2, num_classes=5)\n"
            f"small |= {settings!r}\n"
            "if small['tokenizer'] == 'kl16': small |= dict(diffusion_blocks=1, diffusion_width=16)"
            "\nrun, micro, lines = prepared_run('B', small, 'cpu', 2)\n"
            "loss, norm = training_step(run, *micro)\n"
            "assert loss.isfinite() and norm.isfinite() and lines\nprint('fine')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=300)
    assert done.stdout.endswith("fine\n"), done.stderr
