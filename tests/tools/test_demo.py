"""tools/demo.py: what it runs, and the commands that it ends with."""

import importlib.util
import json
import shlex
import sys

import pytest

from heptapod_fast.train import dry_run
from tests.running import ROOT, command

RESULTS = {
    "symmetry_accuracy": 0.75,
    "samples": 400,
    "copy_share": 0.01,
    "copy_share_fresh": 0.01,
}


def load_demo():
    """The module tools/demo.py."""
    spec = importlib.util.spec_from_file_location("demo_tool", ROOT / "tools" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def demo(monkeypatch, tmp_path):
    """(the module, the commands that it ran) in a project of its own, where nothing is run."""
    module = load_demo()
    run = tmp_path / "runs" / "demo"
    run.mkdir(parents=True)
    (run / "evaluation.png").write_bytes(b"a picture")
    (run / "evaluation.json").write_text(json.dumps(RESULTS))
    steps = []
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "step", lambda *words: steps.append(words))
    return module, steps


def work(demo, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["tools/demo.py", *words])
    demo.work()


def test_it_trains_measures_and_reports(demo, monkeypatch, tmp_path, capsys):
    module, steps = demo
    work(module, monkeypatch)
    assert [words[0] for words in steps] == [
        "tools/train.py",
        "tools/evaluate.py",
        "tools/report.py",
    ]
    assert steps[0][-2:] == ("--images", str(module.IMAGES))
    assert (tmp_path / "demo.png").read_bytes() == b"a picture"
    text = capsys.readouterr().out
    assert "symmetry accuracy  0.750 over 400 samples" in text
    assert "report             runs/demo/report.md" in text


def test_it_ends_with_the_next_commands(demo, monkeypatch, capsys):
    module, _ = demo
    work(module, monkeypatch)
    text = capsys.readouterr().out
    end = text[text.index("\nNext, in this folder:") :]
    assert "source .venv/bin/activate" in end
    assert "python tools/sample.py runs/demo" in end
    assert "{" not in end


def next_commands(module):
    """The words of the commands it ends with, without what explains them."""
    lines = [line.strip() for line in module.NEXT.format(out="runs/demo").splitlines()]
    commands = [line for line in lines if line.startswith("python ")]
    return [shlex.split(line.split("     ")[0]) for line in commands]


def test_the_commands_it_runs_and_names_are_understood(demo, monkeypatch, tmp_path):
    """Training is not begun, but its flags are read; what samples knows all of its flags."""
    module, steps = demo
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(dry_run, "memory_lines", lambda *given: [])  # which takes its time
    work(module, monkeypatch, "--images", "64")
    named = [tuple(words[1:]) for words in next_commands(module)]
    assert len(named) == 4
    for tool, *words in [*steps, *named]:
        assert (ROOT / tool).exists()
        name = tool.removeprefix("tools/").removesuffix(".py")
        if name == "train":
            dry = [] if "--dry-run" in words else ["--dry-run"]
            result = command("train", *words, *dry)
            assert result.code == 0, (words, result.err)
        else:
            text = command(name, "--help").out
            missing = [word for word in words if word.startswith("--") and word not in text]
            assert missing == []


def test_a_step_that_fails_ends_it_with_its_code(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit(3)")
    with pytest.raises(SystemExit) as found:
        load_demo().step(str(script))
    assert found.value.code == 3
