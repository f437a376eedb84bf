"""tools/export.py: what it writes is read by others, and by --init-from."""

import errno
import os
import shutil
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from heptapod_fast import load_run
from heptapod_fast.runs import export
from heptapod_fast.runs.initial import find_weights
from heptapod_fast.storage import read_numbers
from tests.running import NO_HEAD, command, final_tensors, refused, start_here, train_here

LLAMAGEN = NO_HEAD | {"system": "llamagen", "images": 16, "ema": (0.9,)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with an average."""
    out = tmp_path_factory.mktemp("run")
    train_here(out, **LLAMAGEN)
    return out


@pytest.mark.parametrize("ema, file", [(None, "ema-0.9"), ("none", "model")])
def test_weights_in_a_folder(run, tmp_path, ema, file):
    words = [] if ema is None else ["--ema", ema]
    result = command("export", run, "--out", tmp_path / "folder", *words)
    assert result.code == 0, result.err
    found = load_file(tmp_path / "folder" / "model.safetensors")
    expected = final_tensors(run, file)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    with safe_open(tmp_path / "folder" / "model.safetensors", "pt") as opened:
        about = opened.metadata()
    assert (about["system"], about["weights"], about["images_seen"]) == ("llamagen", file, "16")


def test_the_layout_of_published_files(run, tmp_path):
    """{"model": state dict}, float32, names of gpt.py (tests/systems/test_llamagen.py has them)."""
    file = tmp_path / "c2i_tiny.pt"
    result = command("export", run, "--out", file)
    assert result.code == 0, result.err
    found = read_numbers(file)
    assert list(found) == ["model"]
    assert found["model"]["layers.0.attention.wqkv.weight"].dtype == torch.float32
    system = load_run(run, device="cpu").system
    assert found["model"].keys() == dict(system.named_parameters()).keys()


@pytest.mark.parametrize("out", ["folder", "weights.safetensors", "weights.pt"])
def test_a_run_starts_from_it(run, tmp_path, out):
    assert command("export", run, "--out", tmp_path / out).code == 0
    said = []
    session, _ = start_here(
        tmp_path / "next", said.append, **LLAMAGEN | {"init_from": str(tmp_path / out)}
    )
    for name, value in load_run(run, device="cpu").system.state_dict().items():
        assert torch.equal(session.system.state_dict()[name], value), name
    is_wrapped = any("from model of" in line for line in said)
    assert is_wrapped == out.endswith(".pt")


def test_it_says_its_classes_and_its_tokenizer(run, tmp_path):
    """As a run does: classes go by name, another codebook is a warning."""
    assert command("export", run, "--out", tmp_path).code == 0
    said = []
    settings = LLAMAGEN | {"init_from": str(tmp_path), "logogram_count": 65}
    start_here(tmp_path / "next", said.append, **settings)
    assert any("another codebook" in line for line in said)
    assert not any("does not name them" in line for line in said)
    weights = find_weights(str(tmp_path))
    assert weights.class_names == load_run(run, device="cpu").class_names


def test_neither_tokenizer_nor_private_files(run, tmp_path):
    """What was trained from a cache may be far from the tokenizer's weights."""
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    (moved / "tokenizer.safetensors").unlink()
    before = os.umask(0o027)
    try:
        result = command("export", moved, "--out", tmp_path / "new")
    finally:
        os.umask(before)
    assert result.code == 0, result.err
    mode = stat.S_IMODE((tmp_path / "new" / "model.safetensors").stat().st_mode)
    assert mode == 0o640


def test_a_full_disk_leaves_nothing_behind(run, tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "sync", full)
    for out in ("weights.pt", "weights.safetensors"):
        with pytest.raises(OSError, match="No space left"):
            export.export_run(run, tmp_path / out)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_may_have_a_dot_in_its_name(run, tmp_path):
    assert export.export_file(tmp_path / "run-0.5") == tmp_path / "run-0.5" / "model.safetensors"
    (tmp_path / "notes").write_text("mine")
    refused(command("export", run, "--out", tmp_path / "notes"), "exists; move it away")


def test_bad_input(run, tmp_path):
    taken = tmp_path / "weights.pt"
    taken.write_bytes(b"mine")
    refused(command("export", run, "--out", taken), "exists; move it away")
    assert taken.read_bytes() == b"mine"
    refused(command("export", run, "--out", tmp_path / "weights.bin"), ".safetensors or .pt")
    refused(command("export", run, "--out", tmp_path / "new", "--ema", "0.5"), "keeps ema-0.9")
    refused(command("export", tmp_path / "nothing", "--out", tmp_path / "new"), "nothing")
    assert not (tmp_path / "new").exists()
