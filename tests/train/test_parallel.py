"""Two ranks give what one gives; stops and refusals reach all of them."""

import os
import signal

import pytest
import torch

from heptapod_fast.train.checkpoint import listed
from heptapod_fast.train.metrics import read_metrics
from heptapod_fast.train.parallel import World, choose_device
from tests.running import final_tensors, finish, flags, start, torchrun, train_here, wait_for

FP32 = dict(precision="fp32", checkpoint_every=32, dropout=0.1)


def distance(a: dict, b: dict) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_a_world_of_one_needs_no_group():
    world = World(0, 1, torch.device("cpu"))
    value = torch.ones(2)
    assert world.main and world.any(True, False) == (True, False)
    assert torch.equal(world.sum(value), torch.ones(2))
    world.barrier()


def test_a_rank_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="rank 2 .* has no GPU: there are 2.*--nproc_per_node"):
        choose_device("auto", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda"):
        choose_device("cuda")
    assert choose_device("auto", 2) == torch.device("cpu")


def test_two_ranks_give_what_one_gives_and_continue_each_other(tmp_path):
    train_here(tmp_path / "one", **FP32)
    result = finish(start("train", *flags(out=tmp_path / "two", **FP32), launcher=torchrun(2)))
    assert result.code == 0 and "2 ranks" in result.out, result.out
    first = tmp_path / "two" / "checkpoints" / "step-00000008"
    for path in first.iterdir():  # the second half again, with one rank
        path.unlink()
    first.rmdir()
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in two], rel=1e-4)
    assert [r["images"] for r in one] == [r["images"] for r in two]
    run, outcome = train_here(tmp_path / "two", **FP32)
    assert outcome == "finished"
    ours, theirs = final_tensors(tmp_path / "one"), final_tensors(tmp_path / "two")
    train_here(tmp_path / "start", **FP32 | dict(images=8))
    moved = distance(ours, final_tensors(tmp_path / "start"))
    assert distance(ours, theirs) < 0.02 * moved


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_and_the_run_goes_on(tmp_path):
    settings = dict(images=4096, checkpoint_every=10**6, log_every=64)
    words = flags(out=tmp_path, **settings)
    process = start("train", *words, launcher=torchrun(2))
    wait_for(process, "images   512/")
    process.send_signal(signal.SIGTERM)
    result = finish(process)
    assert "stopped by a signal" in result.out, result.out
    stopped = int(listed(tmp_path / "checkpoints")[-1].name.removeprefix("step-"))
    assert 64 <= stopped < 512
    result = finish(start("train", *words, launcher=torchrun(2)))
    assert result.code == 0 and f"(step {stopped:,})" in result.out, result.out


@pytest.mark.slow
def test_sigusr1_to_one_rank_saves_on_all(tmp_path):
    words = flags(
        out=tmp_path, images=4096, checkpoint_every=10**6, log_every=64, keep_checkpoints=9
    )
    process = start("train", *words, launcher=torchrun(2))
    wait_for(process, "images   512/")
    holder = int((tmp_path / ".lock").read_text().split()[1])
    os.kill(holder, signal.SIGUSR1)
    result = finish(process)
    assert result.code == 0, result.out
    assert len(listed(tmp_path / "checkpoints")) == 2


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_refused_by_all(tmp_path):
    result = finish(
        start("train", *flags(out=tmp_path / "run", batch=9, steps="uniform"), launcher=torchrun(2))
    )
    assert result.code != 0 and "--batch 9 does not divide over 2 ranks" in result.out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_all_ranks_fall_back_to_the_same_checkpoint(tmp_path):
    settings = dict(checkpoint_every=32)
    train_here(tmp_path, **settings)
    path = tmp_path / "checkpoints" / "step-00000008" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    result = finish(start("train", *flags(out=tmp_path, **settings), launcher=torchrun(2)))
    assert result.code == 0 and "resumed   at 32 images" in result.out, result.out
    assert (tmp_path / "checkpoints" / "step-00000008.corrupt").is_dir()
