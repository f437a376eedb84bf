"""Two ranks give what one gives; stops and refusals reach all of them."""

import os
import signal

import pytest
import torch

from heptapod_fast.checkpoints import listed
from heptapod_fast.train import parallelize
from heptapod_fast.train.parallelize import gradients_of
from heptapod_fast.train.records import read_metrics
from heptapod_fast.train.session import Ending
from heptapod_fast.world import choose_device
from tests.conftest import small_system
from tests.running import CPU, final_tensors, finish, flags, start, torchrun, train_here, wait_for

FP32 = {"precision": "fp32", "checkpoint_every": 32, "dropout": 0.1}


def distance(a: dict, b: dict) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_a_world_of_one_needs_no_group():
    value = torch.ones(2)
    assert CPU.main
    assert CPU.any(True, False) == (True, False)
    assert torch.equal(CPU.sum(value), torch.ones(2))
    CPU.barrier()


def test_a_parameter_that_a_step_did_not_use_has_a_gradient_of_zeros():
    """As parts of a model that another phase uses: ranks would not add up the same list."""
    used, unused = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    used.sum().backward()
    first, second = gradients_of([used, unused])
    assert torch.equal(first, torch.ones(2))
    assert torch.equal(second, torch.zeros(3))
    assert unused.grad is second


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
    assert result.code == 0, result.out
    assert "2 ranks" in result.out
    first = tmp_path / "two" / "checkpoints" / "step-00000008"
    for path in first.iterdir():  # the second half again, with one rank
        path.unlink()
    first.rmdir()
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in two], rel=1e-4)
    assert [r["images"] for r in one] == [r["images"] for r in two]
    _, _, ending = train_here(tmp_path / "two", **FP32)
    assert ending is Ending.FINISHED
    ours, theirs = final_tensors(tmp_path / "one"), final_tensors(tmp_path / "two")
    train_here(tmp_path / "start", **FP32 | dict(images=8))
    moved = distance(ours, final_tensors(tmp_path / "start"))
    assert distance(ours, theirs) < 0.02 * moved


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_and_the_run_goes_on(tmp_path):
    words = flags(out=tmp_path, checkpoint_every=10**6)
    process = start("train", *words, launcher=torchrun(2), HEPTAPOD_FAULT="wait@step=3")
    for _ in range(2):  # both ranks
        wait_for(process, "waiting at step=3")
    process.send_signal(signal.SIGTERM)
    result = finish(process)
    assert "stopped by a signal" in result.out, result.out
    assert listed(tmp_path / "checkpoints")[-1].name == "step-00000003"
    result = finish(start("train", *words, launcher=torchrun(2)))
    assert result.code == 0, result.out
    assert "resumed   at 24 images (step 3)" in result.out


@pytest.mark.slow
def test_sigusr1_to_one_rank_saves_on_all(tmp_path):
    # More images than will be trained on: it is ended by the test.
    words = flags(out=tmp_path, images=10**7, checkpoint_every=10**7, keep_checkpoints=9)
    process = start("train", *words, launcher=torchrun(2))
    wait_for(process, "images         64/")
    holder = int((tmp_path / ".lock").read_text().split()[1])
    os.kill(holder, signal.SIGUSR1)
    while not listed(tmp_path / "checkpoints"):
        assert process.poll() is None
        wait_for(process, "images")
    process.send_signal(signal.SIGTERM)
    result = finish(process)
    assert "stopped by a signal" in result.out, result.out
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


@pytest.mark.slow
@pytest.mark.parametrize("what", ["a damaged codebook", "other classes", "damaged checkpoints"])
def test_an_error_of_all_or_of_rank_0_is_said_once(tmp_path, what):
    out = tmp_path / "run"
    settings = {"images": 32}
    line = f"{out}/tokenizer.safetensors is damaged"
    if what == "other classes":
        settings["num_classes"] = 9
        line = "--num-classes"
    else:
        train_here(out, images=16)
    if what == "a damaged codebook":
        (out / "tokenizer.safetensors").write_bytes(b"no tensors")
    if what == "damaged checkpoints":
        line = "no checkpoint in"
        for path in (out / "checkpoints").glob("step-*"):
            (path / "state.json").unlink()
    result = finish(start("train", *flags(out=out, **settings), launcher=torchrun(2)))
    assert result.code != 0
    said = [text for text in result.out.splitlines() if text.startswith("error:")]
    assert len(said) == 1 and line in said[0], result.out
    assert "Connection closed by peer" not in result.out
    assert out.exists() is (what != "other classes")


@pytest.mark.parametrize("steps", ["antithetic", "uniform"])
def test_ddp_tries_a_micro_batch_that_the_system_takes(steps):
    """Antithetic steps come in pairs."""
    system = small_system(steps=steps)
    assert parallelize._unused_in(system, system.phase(0, 8)) == []
    assert all(parameter.grad is None for parameter in system.parameters())
