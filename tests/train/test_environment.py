"""A run that goes on on another kind of machine says so."""

import json

import torch

from heptapod_fast.world import processor_kind
from tests.running import train_here


def sessions(out) -> list[dict]:
    """The lines of sessions.jsonl."""
    return [json.loads(line) for line in (out / "sessions.jsonl").read_text().splitlines()]


def resumed_after(out, **changes) -> list[str]:
    """What a resumed run says of its machine, after the last session's record is changed."""
    train_here(out, stop_at=16)
    *earlier, last = sessions(out)
    records = [*earlier, last | changes]
    (out / "sessions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    said = []
    train_here(out, say=said.append)
    return [line for line in said if line.startswith("moved")]


def test_sessions_say_what_they_run_on(tmp_path):
    """Device, ranks, torch, dtype of activations, kind of processor."""
    train_here(tmp_path, stop_at=16)
    (session,) = sessions(tmp_path)
    assert session["processor"] == processor_kind()
    assert session["torch"] == torch.__version__
    assert session["ranks"] == 1
    assert session["images"] == 0


def test_the_same_machine_is_not_worth_a_word(tmp_path):
    """Nothing is said."""
    assert resumed_after(tmp_path) == []


def test_another_kind_of_processor_is_said(tmp_path):
    """With what it was, and what it is."""
    (line,) = resumed_after(tmp_path, processor="NEON")
    assert f"processor {processor_kind()} (was NEON)" in line
    assert "not bit for bit" in line


def test_every_difference_is_named(tmp_path):
    """And only the differences."""
    (line,) = resumed_after(tmp_path, torch="2.0.0", ranks=8)
    assert f"torch {torch.__version__} (was 2.0.0)" in line
    assert "ranks 1 (was 8)" in line
    assert "processor" not in line


def test_lost_notes_do_not_stop_a_run(tmp_path):
    """sessions.jsonl may be gone, or spoilt."""
    train_here(tmp_path / "gone", stop_at=16)
    (tmp_path / "gone" / "sessions.jsonl").unlink()
    train_here(tmp_path / "gone")
    train_here(tmp_path / "spoilt", stop_at=16)
    (tmp_path / "spoilt" / "sessions.jsonl").write_text("no json\nno json\n")
    _, state, _ = train_here(tmp_path / "spoilt")
    assert state.images == 64
