"""`--ema post-hoc`: averages of other lengths, made after the run."""

import json
import shutil

import pytest
import torch

from heptapod_fast import checkpoints, load_run
from heptapod_fast.averages import Average, gamma_of
from heptapod_fast.runs import RunError
from tests.running import command, refused, train_here

STEPS = 64
SETTINGS = {
    "ema": (0.9, "post-hoc"),
    "images": 8 * STEPS,
    "checkpoint_every": 8,
    "keep_checkpoints": STEPS,
    "ema_snapshots": 16,
    "log_every": 64,
    "warmup": 0.0,
    "lr_schedule": "constant",
    "lr_per_256": 0.1,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run whose weights are kept after every step."""
    out = tmp_path_factory.mktemp("post-hoc")
    train_here(out, **SETTINGS)
    return out


def directly(run, length):
    """The average of all steps' weights, as it would have been kept."""
    average = Average("", gamma=gamma_of(length))
    total = {}
    for step, path in enumerate(checkpoints.listed(run / "checkpoints"), 1):
        decay = average.decay_at(step)
        for name, value in checkpoints.load(path).read("model").items():
            before = total.get(name, torch.zeros_like(value))
            total[name] = decay * before + (1 - decay) * value
    return total


def far(found, expected, start):
    """The difference, beside how far training moved."""
    moved = sum(float((expected[n] - start[n]).square().sum()) for n in expected)
    off = sum(float((found[n] - expected[n]).square().sum()) for n in expected)
    return (off / moved) ** 0.5


@pytest.mark.parametrize("length", [0.05, 0.07, 0.1, 0.15])
def test_it_is_the_average_that_was_not_kept(trained, length):
    expected = directly(trained, length)
    start = checkpoints.load(checkpoints.listed(trained / "checkpoints")[0]).read("model")
    run = load_run(trained, ema=f"{length}", device="cpu")
    assert run.weights == f"power-{length}"
    weights = dict(run.system.named_parameters())
    last = dict(load_run(trained, ema="none", device="cpu").system.named_parameters())
    assert far(weights, expected, start) < 0.1 * far(last, expected, start)


def test_of_an_earlier_checkpoint(trained, tmp_path):
    """Only what was kept until then counts."""
    half = load_run(trained, checkpoint=32, ema="0.07", device="cpu")
    assert half.images_seen == 256
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    for path in checkpoints.listed(copy / "averages"):
        if checkpoints.step_of(path) > 32:
            shutil.rmtree(path)
    alone = load_run(copy, checkpoint=32, ema="0.07", device="cpu").system.state_dict()
    whole = load_run(trained, ema="0.07", device="cpu").system.state_dict()
    for name, value in half.system.state_dict().items():
        assert torch.equal(value, alone[name])
    assert any(not torch.equal(value, whole[name]) for name, value in alone.items())


def test_snapshots_are_even_and_the_same_after_a_restart(trained, tmp_path):
    found = checkpoints.listed(trained / "averages")
    assert [checkpoints.step_of(path) for path in found] == list(range(4, STEPS + 1, 4))
    train_here(tmp_path, stop_at=8 * 17, **SETTINGS)
    train_here(tmp_path, **SETTINGS)
    for path in found:
        for file in sorted(path.iterdir()):
            assert (tmp_path / "averages" / path.name / file.name).read_bytes() == file.read_bytes()


def test_the_tools_take_a_length(trained, tmp_path):
    out = tmp_path / "e.json"
    assert command("evaluate", trained, "--count", 5, "--ema", "0.15", "--out", out).code == 0
    assert json.loads(out.read_text())["weights"] == "power-0.15"
    assert command("export", trained, "--out", tmp_path / "a", "--ema", "0.15").code == 0
    assert "power-0.15" in command("export", trained, "--out", tmp_path / "b", "--ema", "0.15").out
    result = command("verify", trained)
    assert result.code == 0 and "averages: 16 snapshots, whole" in result.out


def test_what_cannot_be_made_is_refused(trained, tmp_path):
    refused(command("evaluate", trained, "--ema", "0.3"), "power-0.05, power-0.1", "to 0.25")
    refused(command("evaluate", trained, "--ema", "long"), "keeps ema-0.9")
    train_here(tmp_path / "plain", images=16)
    refused(command("evaluate", tmp_path / "plain", "--ema", "0.15"), "keeps ema-0.9999, and")
    bare = tmp_path / "bare"
    shutil.copytree(trained, bare)
    shutil.rmtree(bare / "averages")
    with pytest.raises(RunError, match="cannot be made at step 64 of the 0 snapshots"):
        load_run(bare, ema="0.2", device="cpu")
    assert load_run(bare, ema="0.1", device="cpu").weights == "power-0.1"


def test_a_damaged_snapshot_is_said(trained, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    file = copy / "averages" / "step-00000032" / "power-0.1.safetensors"
    spoilt = bytearray(file.read_bytes())
    spoilt[-1] ^= 1
    file.write_bytes(spoilt)
    result = command("verify", copy)
    assert result.code == 1 and "averages/step-00000032: power-0.1.safetensors" in result.out
    out = tmp_path / "e.json"
    result = command("evaluate", copy, "--count", 5, "--ema", "0.15", "--out", out)
    assert result.code == 0  # of the other fifteen


def test_another_way_leaves_no_snapshots_of_the_first(trained, tmp_path):
    """Back to an earlier checkpoint, and on with more images: another schedule, other weights."""
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    for path in checkpoints.listed(copy / "checkpoints"):
        if checkpoints.step_of(path) > 18:
            shutil.rmtree(path)
    settings = SETTINGS | {"images": 16 * STEPS}
    train_here(copy, stop_at=8 * 18, **settings)
    found = [checkpoints.step_of(path) for path in checkpoints.listed(copy / "averages")]
    assert found == [4, 8, 12, 16]


def test_a_full_disk_costs_a_snapshot_alone(tmp_path, monkeypatch):
    save = checkpoints.save

    def full(folder, files, state, keep, world):
        if folder.name == "averages" and state["step"] == 4:
            raise checkpoints.CheckpointError("No space left on device")
        return save(folder, files, state, keep, world)

    monkeypatch.setattr(checkpoints, "save", full)
    said = []
    train_here(tmp_path, say=said.append, **SETTINGS | {"images": 256, "ema_snapshots": 8})
    assert any("no snapshot of the averages: No space left" in line for line in said)
    found = checkpoints.listed(tmp_path / "averages")
    assert [checkpoints.step_of(path) for path in found] == list(range(8, 33, 4))
