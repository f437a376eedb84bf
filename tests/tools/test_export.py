"""tools/export.py: what it writes is read by others, and by --init-from."""

import errno
import json
import os
import shutil
import stat

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from heptapod_fast import load_run
from heptapod_fast.exports import files
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


def test_a_file_needs_no_tokenizer_and_is_not_private(run, tmp_path):
    """What was trained from a cache may be far from the tokenizer's weights."""
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    before = os.umask(0o027)
    try:
        folder = command("export", moved, "--out", tmp_path / "folder", "--no-samples")
        (moved / "tokenizer.safetensors").unlink()
        file = command("export", moved, "--out", tmp_path / "w.safetensors")
    finally:
        os.umask(before)
    assert folder.code == 0, folder.err
    assert file.code == 0, file.err
    for path in (tmp_path / "w.safetensors", tmp_path / "folder" / "model.safetensors"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


def test_a_full_disk_leaves_nothing_behind(run, tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    for out in ("weights.pt", "weights.safetensors"):
        with pytest.raises(OSError, match="No space left"):
            files.export_weights(run, tmp_path / out)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_may_have_a_dot_in_its_name(run, tmp_path):
    result = command("export", run, "--out", tmp_path / "run-0.5", "--no-samples")
    assert result.code == 0, result.err
    assert (tmp_path / "run-0.5" / "model.safetensors").is_file()
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
    alone = ("--out", tmp_path / "w.pt", "--tokenizer-weights", "kl16.ckpt")
    refused(command("export", run, *alone), "--tokenizer-weights kl16.ckpt", "weights alone")
    assert not (tmp_path / "new").exists()


# --------------------------------------------------------------------------- what others do with it


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    """A folder with samples."""
    out = tmp_path_factory.mktemp("exported") / "folder"
    result = command("export", run, "--out", out, "--device", "cpu")
    assert result.code == 0, result.err
    assert f"sample from it with: python tools/sample.py {out}" in result.out
    return out


def arrays(source, out, *words):
    """Images that tools/sample.py draws of a run or a folder."""
    words = ("--count", 6, "--out", out.with_suffix(".png"), "--save-npz", out, *words)
    result = command("sample", source, *words)
    assert result.code == 0, result.err
    with np.load(out) as data:
        return data["arr_0"]


def test_sample_draws_what_it_draws_of_the_run(run, folder, tmp_path):
    words = ("--seed", 3, "--top-k", 5)
    expected = arrays(run, tmp_path / "run.npz", *words)
    assert np.array_equal(arrays(folder, tmp_path / "folder.npz", *words), expected)
    assert not np.array_equal(arrays(folder, tmp_path / "other.npz", "--seed", 4), expected)


def test_options_are_those_of_its_system(folder, tmp_path):
    result = command("sample", folder, "--help")
    assert result.code == 0 and "--guidance-schedule" in result.out
    refused(command("sample", folder, "--positions-per-step", 2), "--positions-per-step")
    # It is found behind a switch too.
    words = ("--no-paste", folder, "--guidance", 2, "--count", 2, "--out", tmp_path / "g.png")
    assert command("sample", *words).code == 0


def test_what_it_does_not_hold_is_refused(folder):
    refused(command("sample", folder, "--checkpoint", 1), "--checkpoint 1", "step-00000002 alone")
    for tool in ("sample", "evaluate"):
        refused(command(tool, folder, "--ema", "none"), "--ema none", "holds ema-0.9 alone")


def test_evaluate_measures_it_as_the_run(run, folder, tmp_path):
    """And writes beside its files, which stay whole."""
    copy = tmp_path / "folder"
    shutil.copytree(folder, copy)
    words = ("--count", 10, "--device", "cpu")
    assert command("evaluate", run, *words, "--out", tmp_path / "run.json").code == 0
    result = command("evaluate", copy, *words)
    assert result.code == 0, result.err
    found = json.loads((copy / "evaluation.json").read_text())
    expected = json.loads((tmp_path / "run.json").read_text())
    for name in ("symmetry_accuracy", "copy_distance", "checkpoint", "weights", "images_seen"):
        assert found[name] == expected[name]
    assert (copy / "evaluation.png").exists()
    assert load_run(copy, device="cpu").images_seen == 16


def test_evaluate_says_where_images_of_elsewhere_are_named(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text())
    config["data"] |= {"data": "/home/somebody/flowers", "logogram_count": None}
    (copy / "config.json").write_text(json.dumps(config))
    assert command("export", copy, "--out", tmp_path / "folder", "--no-samples").code == 0
    asked = ("--metrics", "fid", "--extractor", "small")
    named = ("flowers: no such folder", "are not here", "--reference")
    refused(command("evaluate", tmp_path / "folder", *asked), *named)


def test_verify_reads_every_byte(folder, tmp_path):
    copy = tmp_path / "folder"
    shutil.copytree(folder, copy)
    result = command("verify", copy)
    assert result.code == 0 and "whole, 3 files as they were written" in result.out
    assert "export.json: llamagen tiny, ema-0.9 of step-00000002, 16 images" in result.out
    data = bytearray((copy / "tokenizer.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "tokenizer.safetensors").write_bytes(data)
    result = command("verify", copy)
    assert result.code == 1
    assert "damaged: tokenizer.safetensors has another SHA-256" in result.out


def test_a_run_does_not_train_into_it(folder):
    words = ("--size", "tiny", "--system", "llamagen", "--out", folder, "--device", "cpu")
    refused(command("train", *words), "no place for a run", "--init-from")
