"""tools/verify.py: whole runs pass, any damage is named and fails."""

import pytest

from tests.running import command, refused, train_here


@pytest.fixture
def trained(tmp_path):
    """A finished run with two checkpoints."""
    train_here(tmp_path, images=32)
    return tmp_path


def test_a_whole_run_passes(trained):
    result = command("verify", trained)
    assert result.code == 0, result.err
    for text in (
        "config.json: heptapod tiny on logograms",
        "metrics.jsonl: 4 records",
        "step-00000002: whole, 16 images",
        "step-00000004: whole, 32 images",
        "tokenizer: patch-vq",
    ):
        assert text in result.out


@pytest.mark.parametrize(
    "file",
    [
        "model.safetensors",
        "ema-0.9999.safetensors",
        "state.json",
        "optimizer.safetensors",
        "MANIFEST.json",
    ],
)
def test_one_flipped_bit_fails_and_changes_nothing(trained, file):
    path = trained / "checkpoints" / "step-00000002" / file
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    result = command("verify", trained)
    assert result.code == 1 and f"step-00000002: {file}" in result.out
    assert "step-00000004: whole" in result.out and path.exists()


def test_a_codebook_that_changed_fails(trained):
    path = trained / "tokenizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    refused(command("verify", trained), "tokenizer.safetensors", "restore it")


def test_a_run_without_checkpoints_fails(trained):
    for path in (trained / "checkpoints").iterdir():
        path.rename(path.with_suffix(".corrupt"))
    result = command("verify", trained)
    assert result.code == 1 and "no checkpoints" in result.out


def test_damaged_settings_or_metrics_fail(trained):
    text = (trained / "metrics.jsonl").read_text()
    (trained / "metrics.jsonl").write_text("?" + text)
    refused(command("verify", trained), "metrics.jsonl:1")
    (trained / "config.json").write_text("{")
    refused(command("verify", trained), "config.json cannot be read")


def test_no_run(tmp_path):
    refused(command("verify", tmp_path), "is not a run directory")
