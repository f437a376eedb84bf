"""tools/compare.py: equal checkouts are equal, and a planted difference is found."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from heptapod_fast.train import dry_run
from tests.running import ROOT, command


@pytest.fixture
def compare(monkeypatch):
    """The module tools/compare.py."""
    spec = importlib.util.spec_from_file_location("compare_tool", ROOT / "tools" / "compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(compare, monkeypatch, *words):
    """Its exit code."""
    monkeypatch.setattr(sys, "argv", ["tools/compare.py", *map(str, words)])
    return compare.main()


# ------------------------------------------------------------------------ what counts as different


def results(folder: Path, loss=1.0, weight=1.0, pixel=7, seconds=1.0) -> Path:
    """What a case leaves behind."""
    step = folder / "checkpoints" / "step-00000001"
    step.mkdir(parents=True)
    record = {"images": 8, "loss": loss, "seconds": seconds, "images_per_second": seconds}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    save_file({"w": torch.full((2,), weight)}, step / "model.safetensors")
    save_file({"m": torch.zeros(2)}, step / "optimizer.safetensors")
    np.savez(folder / "0.npz", arr_0=np.full((1, 2, 2, 3), pixel, np.uint8), labels=np.zeros(1))
    return folder


MODEL = "checkpoints/step-00000001/model.safetensors"
PLANTED = {
    "nothing": ({}, []),
    "the clock": ({"seconds": 9.0}, []),
    "a loss": ({"loss": 1.0000001}, ["metrics.jsonl"]),
    "a weight": ({"weight": 1.0 + 2**-23}, [MODEL]),
    "a pixel": ({"pixel": 8}, ["0.npz"]),
    "all": ({"loss": 2.0, "weight": 2.0, "pixel": 8}, ["metrics.jsonl", MODEL, "0.npz"]),
}


@pytest.mark.parametrize("what", PLANTED)
def test_differences_are_found_to_the_last_bit(compare, tmp_path, what):
    settings, expected = PLANTED[what]
    before, after = results(tmp_path / "before"), results(tmp_path / "after", **settings)
    assert list(compare.differences(before, after)) == expected
    assert list(compare.differences(after, before)) == expected


def test_files_that_only_one_has_are_found(compare, tmp_path):
    before, after = results(tmp_path / "before"), results(tmp_path / "after")
    (after / MODEL).unlink()
    (after / "0.npz").unlink()
    expected = [f"{MODEL} is missing", "0.npz is missing"]
    assert list(compare.differences(before, after)) == expected
    assert list(compare.differences(after, before)) == expected


def test_cases_are_chosen_by_name(compare, monkeypatch, capsys):
    ran = []

    def pretend(checkout, python, case, out):
        ran.append((checkout, case))
        results(out)

    monkeypatch.setattr(compare, "results", pretend)
    python = (sys.executable, sys.executable)
    code = main(compare, monkeypatch, ROOT, ROOT, "--python", *python, "--only", "local, codes")
    assert code == 0
    names = [name for name in compare.CASES if "local, codes" in name]
    assert len(ran) == 2 * len(names) == 4
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == names
    assert all(line.endswith(" equal") for line in lines)
    with pytest.raises(SystemExit, match="--only nothing: no case has this in its name"):
        main(compare, monkeypatch, ROOT, ROOT, "--only", "nothing")


def test_the_exit_code_says_that_something_differs(compare, monkeypatch, capsys):
    losses = iter((1.0, 2.0))
    monkeypatch.setattr(
        compare,
        "results",
        lambda checkout, python, case, out: results(out, loss=next(losses)),
    )
    case = "global, codes, dropout, 2 ranks"
    assert main(compare, monkeypatch, ROOT, ROOT, "--only", case) == 1
    assert "DIFFERS: metrics.jsonl" in capsys.readouterr().out


def test_every_case_is_of_settings_that_there_are(compare, monkeypatch):
    """Each resolves; a flag that was renamed would end the comparison in its middle."""
    monkeypatch.setattr(dry_run, "memory_lines", lambda *given: [])  # which takes its time
    for name, case in compare.CASES.items():
        given = {flag: value for flag, value in case.items() if flag != "ranks"}
        words = compare.words(compare.SMALLEST | given | {"out": "nowhere"})
        result = command("train", *words, "--dry-run")
        assert result.code == 0, (name, result.err)


# ------------------------------------------------------------------------------ two real checkouts


def test_a_command_that_fails_is_shown(compare, tmp_path):
    (tmp_path / "fails.py").write_text("print('the reason'); raise SystemExit(1)")
    with pytest.raises(SystemExit, match="failed:\nthe reason"):
        compare.run(tmp_path, Path(sys.executable), ["fails.py"])


def test_each_checkout_runs_its_own_code(compare, tmp_path):
    """Also where one interpreter serves both, which has one of them installed."""
    package = tmp_path / "heptapod_fast"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('this one')")
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "asks.py").write_text("import heptapod_fast")
    with pytest.raises(SystemExit, match="this one"):
        compare.run(tmp_path, Path(sys.executable), ["tools/asks.py"])


@pytest.mark.slow
def test_a_change_of_the_optimizer_is_found_and_equal_checkouts_are_equal(
    compare, monkeypatch, tmp_path
):
    changed = tmp_path / "changed"
    for folder in ("heptapod_fast", "tools"):
        shutil.copytree(
            ROOT / folder, changed / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    optimizer = changed / "heptapod_fast" / "train" / "optimizer.py"
    text = optimizer.read_text()
    assert text.count("EPS = 1e-8\n") == 1
    optimizer.write_text(text.replace("EPS = 1e-8\n", "EPS = 1.001e-8\n"))

    case = compare.CASES["1d-raster, vectors"] | {"images": 16}
    python = Path(sys.executable)
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    compare.results(ROOT, python, case, first)
    compare.results(ROOT, python, case, second)
    assert list(compare.differences(first, second)) == []
    assert (first / "0.npz").exists()

    monkeypatch.setattr(compare, "SAMPLINGS", ())
    compare.results(changed, python, case, third)
    found = list(compare.differences(first, third))
    assert "checkpoints/step-00000001/model.safetensors" in found


def test_speed_says_how_many_times_as_fast_the_second_one_is(compare, monkeypatch, capsys):
    """In turns, one first and then the other; the first turns do not count."""
    order = []

    class Pretending:
        """The first checkout takes three times as long; both are slow to warm up."""

        def __init__(self, checkout, python, steps, flags, out):
            self.name = checkout.name
            self.turns = 0

        def turn(self):
            order.append(self.name)
            self.turns += 1
            warming_up = 50.0 if self.turns <= compare.WARM_UP_TURNS else 0.0
            return warming_up + {"old": 6.0, "new": 2.0}[self.name]

        def stop(self):
            order.append("stopped")

    monkeypatch.setattr(compare, "Runner", Pretending)
    code = main(compare, monkeypatch, "old", "new", "--speed", "--turns", 3, "--only", "codes")
    assert code == 0
    line = capsys.readouterr().out
    assert line.startswith("codes ")
    assert "300.0 ms a step before, 100.0 after; 3.000 times as fast" in line
    assert order == ["new", "old", "old", "new"] * 2 + ["new", "old", "stopped", "stopped"]


@pytest.mark.slow
def test_speed_of_real_checkouts(compare, monkeypatch, capsys):
    small = "--size tiny --device cpu --images 10000 --logogram-count 64 --codes 16 --batch 8"
    small += " --width 32 --heads 2 --depth 1 --head-depth 1"
    monkeypatch.setattr(compare, "SPEED_CASES", {"small": (2, small)})
    pythons = ("--python", sys.executable, sys.executable)
    main(compare, monkeypatch, ROOT, ROOT, "--speed", "--turns", 3, *pythons)
    assert "median of 3 turns of 2 steps" in capsys.readouterr().out
    monkeypatch.setattr(compare, "SPEED_CASES", {"wrong": (2, f"{small} --head nonsense")})
    with pytest.raises(SystemExit, match="(?s)training ended.*nonsense"):
        main(compare, monkeypatch, ROOT, ROOT, "--speed", *pythons)
