"""The checkpoint protocol: whole or not there, verified on reading, never zero good ones."""

import json
import re
import threading
from pathlib import Path

import pytest
import torch

from heptapod_fast import checkpoints
from heptapod_fast.checkpoints import CheckpointError, damage, listed, load_newest, load_step

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["ema-0.9999.safetensors", "model.safetensors", "optimizer.safetensors", "state.json"]


def save(folder, step, keep=2, size=4):
    files = {
        name: {"a": torch.full((size,), float(step)), "b": torch.arange(size)}
        for name in ("model", "ema-0.9999", "optimizer")
    }
    return checkpoints.save(folder, files, {"step": step, "images": 8 * step}, keep)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def steps(folder):
    return [int(path.name.removeprefix("step-")) for path in listed(folder)]


def flip(path, at=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "flipped": lambda path: flip(path),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}


def test_manifest_lists_every_file_and_the_name_is_final(tmp_path):
    path = save(tmp_path, 12)
    assert path.name == "step-00000012" and names(tmp_path) == [path.name]
    manifest = json.loads((path / "MANIFEST.json").read_text())
    assert sorted(manifest) == NAMES and names(path) == ["MANIFEST.json", *NAMES]
    for name, entry in manifest.items():
        assert entry["bytes"] == (path / name).stat().st_size
        assert entry["crc32c"] == checkpoints.checksum(path / name)
    assert damage(path) == []


def test_checksum_is_crc32c(tmp_path):
    (tmp_path / "f").write_bytes(b"123456789")
    assert checkpoints.checksum(tmp_path / "f") == "e3069283"


def test_tensors_come_back(tmp_path):
    save(tmp_path, 3)
    found = load_newest(tmp_path, print)
    assert found.step == 3 and torch.equal(found.read("model")["a"], torch.full((4,), 3.0))
    with pytest.raises(CheckpointError, match="no ema-0.5; there are: ema-0.9999, model, opt"):
        found.read("ema-0.5")


def test_nothing_there_is_a_new_run(tmp_path):
    assert load_newest(tmp_path, print) is None and load_newest(tmp_path / "no", print) is None


def test_unfinished_ones_are_never_listed_and_cleaned_away(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step-00000002.tmp").mkdir()
    (tmp_path / "step-00000002.tmp" / "model.safetensors").write_bytes(b"half")
    assert steps(tmp_path) == [1] and load_newest(tmp_path, print).step == 1
    checkpoints.clean(tmp_path)
    assert names(tmp_path) == ["step-00000001"]


def test_order_is_by_number(tmp_path):
    for step in (99_999_999, 100_000_001):
        save(tmp_path, step)
    assert steps(tmp_path) == [99_999_999, 100_000_001]


def test_retention_keeps_the_newest(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, keep=3)
    assert names(tmp_path) == [f"step-{k:08d}" for k in (3, 4, 5)]


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the code under test runs."""


@pytest.mark.parametrize(
    "where, kept", [("files=2", [1]), ("manifest=2", [1]), ("rename=2", [1, 2])]
)
def test_killed_between_the_phases(tmp_path, monkeypatch, where, kept):
    save(tmp_path, 1, keep=1)

    def die(name):
        if name == where:
            raise Killed

    monkeypatch.setattr(checkpoints.faults, "point", die)
    with pytest.raises(Killed):
        save(tmp_path, 2, keep=1)
    assert steps(tmp_path) == kept and load_newest(tmp_path, print).step == kept[-1]
    monkeypatch.undo()
    checkpoints.clean(tmp_path)
    save(tmp_path, 2, keep=1)
    save(tmp_path, 3, keep=1)
    assert steps(tmp_path) == [3] and names(tmp_path) == ["step-00000003"]


def test_never_zero_valid_checkpoints(tmp_path):
    save(tmp_path, 1, keep=1)
    done, seen = threading.Event(), []

    def watch():
        while True:
            seen.append(len(listed(tmp_path)))
            if done.is_set():
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    for step in range(2, 12):
        save(tmp_path, step, keep=1, size=1000)
    done.set()
    watcher.join()
    assert min(seen) >= 1


def test_retention_comes_after_the_commit(tmp_path, monkeypatch):
    save(tmp_path, 1, keep=1)
    at_point = {}
    monkeypatch.setattr(
        checkpoints.faults, "point", lambda name: at_point.update({name: steps(tmp_path)})
    )
    save(tmp_path, 2, keep=1)
    assert at_point == {"files=2": [1], "manifest=2": [1], "rename=2": [1, 2]}
    assert steps(tmp_path) == [2]


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("file", [*NAMES, "MANIFEST.json"])
def test_damage_is_found_set_aside_and_the_one_before_taken(tmp_path, file, how):
    save(tmp_path, 1)
    DAMAGE[how](save(tmp_path, 2) / file)
    said = []
    assert load_newest(tmp_path, said.append).step == 1
    assert len(said) == 1 and file in said[0] and "falling back" in said[0]
    assert names(tmp_path) == ["step-00000001", "step-00000002.corrupt"]
    assert save(tmp_path, 2).name == "step-00000002" and load_newest(tmp_path, print).step == 2


@pytest.mark.parametrize("at", [0, 8, -1])
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path, at):
    path = save(tmp_path, 1)
    flip(path / "model.safetensors", at)
    assert any("model.safetensors: checksum" in line for line in damage(path))


def test_a_file_too_many_is_found(tmp_path):
    path = save(tmp_path, 1)
    (path / "extra.safetensors").write_bytes(b"")
    assert damage(path) == ["extra.safetensors: not part of the checkpoint"]


def test_hidden_files_of_file_managers_do_not_count(tmp_path):
    save(tmp_path, 1)
    (listed(tmp_path)[-1] / ".DS_Store").write_text("x")
    assert damage(listed(tmp_path)[-1]) == []


def test_files_follow_the_umask(tmp_path):
    save(tmp_path, 1)
    probe = tmp_path / "probe"
    probe.write_text("")
    modes = {p.stat().st_mode for p in listed(tmp_path)[-1].iterdir()}
    assert modes == {probe.stat().st_mode}


def test_a_peek_reads_the_state_alone(tmp_path):
    assert checkpoints.peek(tmp_path) == {}
    save(tmp_path, 1)
    newest = listed(tmp_path)[-1]
    flip(newest / "model.safetensors")
    assert checkpoints.peek(tmp_path)["step"] == 1
    flip(newest / "state.json")
    assert checkpoints.peek(tmp_path) == {}


def test_all_damaged_is_an_error_now_and_later(tmp_path):
    for step in (1, 2):
        flip(save(tmp_path, step) / "model.safetensors")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="no checkpoint in .* verifies.*--out"):
            load_newest(tmp_path, lambda text: None)
    assert names(tmp_path) == ["step-00000001.corrupt", "step-00000002.corrupt"]


def test_readers_change_nothing(tmp_path):
    save(tmp_path, 1)
    flip(save(tmp_path, 2) / "model.safetensors")
    before = names(tmp_path)
    assert load_step(tmp_path, None).step == 1 and load_step(tmp_path, 1).step == 1
    with pytest.raises(CheckpointError, match="step-00000002 is damaged: model.safetensors"):
        load_step(tmp_path, 2)
    with pytest.raises(CheckpointError, match="--checkpoint 7: .* holds the steps 1, 2"):
        load_step(tmp_path, 7)
    assert names(tmp_path) == before
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_step(tmp_path / "none", None)


def test_a_failed_write_leaves_nothing_and_harms_nothing(tmp_path, monkeypatch):
    save(tmp_path, 1, keep=1)

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "sync", full)
    with pytest.raises(CheckpointError, match="could not write .*step-00000002.*No space left"):
        save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step-00000001"] and load_newest(tmp_path, print).step == 1


def test_saving_a_step_again_keeps_what_is_there(tmp_path):
    manifest = (save(tmp_path, 1, size=4) / "MANIFEST.json").read_bytes()
    assert (save(tmp_path, 1, size=5) / "MANIFEST.json").read_bytes() == manifest


def test_there_is_no_pickle_anywhere():
    forbidden = re.compile(
        r"torch\.(save|load)\(|import (pickle|dill|joblib)|allow_pickle=True"
        r"|pickle\.|distributed import checkpoint|all_gather_object|broadcast_object"
    )
    for folder in ("heptapod_fast", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            if path.name == "storage.py":
                # Published weights come as pickles: read as numbers alone, nothing is executed.
                assert re.findall(r"torch\.load\([^)]*\)", text) == [
                    'torch.load(path, map_location="cpu", weights_only=True)'
                ]
                assert re.findall(r"torch\.save\([^)]*\)", text) == ["torch.save(value, path)"]
                text = text.replace("torch.load(", "").replace("torch.save(", "")
            if path.name == "shards.py":
                # The library pickles by default, what is written by others it does not.
                kinds = re.findall(r"checkpoint\.\w+Storage\w+|import \w+Storage\w+", text)
                assert kinds and all("HuggingFaceStorage" in kind for kind in kinds), kinds
                assert len(re.findall(r"storage_(?:writer|reader)=", text)) == 2
                text = text.replace("distributed import checkpoint", "")
            assert not forbidden.search(text), path
