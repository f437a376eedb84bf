"""The loop: resuming bit for bit, micro-batches, order of the data, grids, skipped steps."""

import signal

import pytest
import torch

from heptapod_fast.runs import RunError
from heptapod_fast.train import loop
from heptapod_fast.train.checkpoint import CheckpointError, listed
from heptapod_fast.train.loop import train, training_step
from heptapod_fast.train.metrics import read_metrics
from tests.running import (
    NO_HEAD,
    Interrupting,
    final_files,
    final_tensors,
    start_here,
    train_here,
)

PATCH = dict(tokenizer="patch", codes=None, patch_size=8, diffusion_blocks=1, diffusion_width=16)
SYSTEMS = {
    "heptapod-global": {},
    "heptapod-local": dict(head="local", window=9, dropout=0.1),
    "1d-random": dict(system="1d-random") | NO_HEAD,
    "patch": PATCH,
}
TIMES = ("images_per_second", "seconds", "other_seconds", "eta_seconds", "tflops")


def records(out):
    return [
        {k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(out / "metrics.jsonl")
    ]


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_stopped_run_ends_like_an_undisturbed_one_bit_for_bit(tmp_path, name):
    settings = SYSTEMS[name] | dict(ema=(0.9999, 0.9))
    straight, outcome = train_here(tmp_path / "a", **settings)
    assert outcome == "finished" and straight.images == 64
    run, outcome = train_here(tmp_path / "b", stop_at=24, **settings)
    assert outcome == "stopped" and run.images == 32
    resumed, outcome = train_here(tmp_path / "b", **settings)
    assert outcome == "finished"
    assert final_files(tmp_path / "a") == final_files(tmp_path / "b")
    assert records(tmp_path / "a") == records(tmp_path / "b")
    assert len(records(tmp_path / "a")) == 8


def test_training_learns_something(tmp_path):
    train_here(tmp_path, images=320, lr_per_256=0.1, log_every=64)
    losses = [r["loss"] for r in records(tmp_path)]
    assert losses[-1] < losses[0] - 0.1


def test_another_seed_is_another_run(tmp_path):
    train_here(tmp_path / "a")
    train_here(tmp_path / "b", seed=1)
    assert final_files(tmp_path / "a") != final_files(tmp_path / "b")


@pytest.mark.parametrize("name", SYSTEMS)
def test_micro_batches_change_nothing_but_rounding(tmp_path, name):
    for micro in (2, 8):
        train_here(
            tmp_path / str(micro), micro_batch=micro, precision="fp32", images=24, **SYSTEMS[name]
        )
    a, b = final_tensors(tmp_path / "2"), final_tensors(tmp_path / "8")
    start = start_here(tmp_path / "s", **SYSTEMS[name])
    moved = dict(zip(start.optimizer.names, start.optimizer.parameters, strict=True))
    difference = max(float((a[k] - b[k]).abs().max()) for k in a)
    distance = max(float((a[k] - moved[k].detach()).abs().max()) for k in a)
    assert difference < 0.02 * distance, (difference, distance)


def test_the_gradient_does_not_depend_on_micro_batches(tmp_path):
    norms = []
    for micro in (1, 4):
        run = start_here(tmp_path / str(micro), precision="fp32", steps="uniform")
        norms.append(training_step(run, 8, micro))
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-4, atol=1e-6)


class Spy(Interrupting):
    """Remembers which samples were asked for."""

    def __init__(self, source, seen):
        super().__init__(source, -1, None)
        self.seen = seen

    def batch(self, index):
        batch = self.source.batch(index)
        self.seen += [(int(i), tuple(t)) for i, t in zip(index, batch.tokens.tolist())]
        return batch


def test_order_of_the_data_does_not_depend_on_resuming(tmp_path):
    seen = {"straight": [], "resumed": []}
    for kind, stops in (("straight", [None]), ("resumed", [16, None])):
        for stop in stops:
            run = start_here(tmp_path / kind, images=48, logogram_count=20)
            run.source = Spy(run.source, seen[kind])
            if stop is not None:
                run.source = Interrupting(
                    run.source, stop, lambda: signal.raise_signal(signal.SIGTERM)
                )
            train(run)
    assert seen["straight"] == seen["resumed"]
    assert [i for i, _ in seen["straight"]] == list(range(48))


def test_a_checkpoint_at_the_end_of_an_epoch_skips_and_repeats_nothing(tmp_path):
    run, _ = train_here(tmp_path, stop_at=24, logogram_count=32)
    assert run.images == 32
    run = start_here(tmp_path, logogram_count=32)
    epochs = [run.source.batch(torch.arange(k, k + 32)) for k in (0, 32)]
    tokens = [sorted(map(tuple, e.tokens.tolist())) for e in epochs]
    assert run.images == 32 and tokens[0] == tokens[1]


def test_grids_are_written_and_the_same_for_the_same_weights(tmp_path):
    from PIL import Image

    def grids(out):
        return {p.name: p.read_bytes() for p in sorted((out / "samples").iterdir())}

    settings = dict(sample_every=32, image_size=12, patch_size=4)
    run, _ = train_here(tmp_path / "a", **settings)
    train_here(tmp_path / "b", stop_at=40, **settings)
    train_here(tmp_path / "b", **settings)
    assert grids(tmp_path / "a") == grids(tmp_path / "b")
    assert list(grids(tmp_path / "a")) == [f"images-{n:012d}.png" for n in (32, 64)]
    with Image.open(tmp_path / "a" / "samples" / "images-000000000064.png") as image:
        classes = min(run.source.num_classes, 8)
        assert image.size == (8 * (96 + 2) + 2, classes * (96 + 2) + 2)


def test_a_grid_that_cannot_be_written_does_not_stop_the_run(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop, "save_grid", full)
    said = []
    run, outcome = train_here(
        tmp_path, say=said.append, images=16, sample_every=16, image_size=12, patch_size=4
    )
    assert outcome == "finished" and run.system.training
    assert any(line.startswith("WARNING") and "No space left" in line for line in said)


def poison(monkeypatch, steps):
    """The gradient of these steps (1 is the first) holds a NaN."""
    from heptapod_fast.train.optimizer import Optimizer

    step = Optimizer.step

    def bad_step(self, *arguments):
        if self.step_count + 1 in steps:
            self.parameters[0].grad.view(-1)[0] = float("nan")
        return step(self, *arguments)

    monkeypatch.setattr(Optimizer, "step", bad_step)


def test_a_run_without_a_single_good_step_is_no_success(tmp_path, monkeypatch):
    poison(monkeypatch, set(range(1, 100)))
    with pytest.raises(RunError, match="nothing was learnt"):
        train_here(tmp_path)


def test_steps_with_a_bad_gradient_are_skipped_and_counted(tmp_path, monkeypatch):
    poison(monkeypatch, {2, 5})
    run, outcome = train_here(tmp_path, max_skips=2)
    assert outcome == "finished" and records(tmp_path)[-1]["skipped"] == 2
    assert [r["skipped"] for r in records(tmp_path)] == [0, 1, 1, 1, 2, 2, 2, 2]
    assert all(t.isfinite().all() for t in final_tensors(tmp_path).values())


def test_too_many_bad_gradients_give_up_and_keep_the_last_checkpoint(tmp_path, monkeypatch):
    poison(monkeypatch, {4, 5})
    with pytest.raises(RunError, match="2 steps had a non-finite gradient.*--max-skips 1"):
        train_here(tmp_path, max_skips=1)
    assert [p.name for p in listed(tmp_path / "checkpoints")] == ["step-00000002", "step-00000004"]
    with pytest.raises(RunError, match="--max-skips 1"):
        train_here(tmp_path, max_skips=1)
    _, outcome = train_here(tmp_path, max_skips=2)
    assert outcome == "finished"
    assert [r["images"] for r in records(tmp_path)] == list(range(8, 65, 8))  # each one once


def failing(monkeypatch, times):
    """Writing a checkpoint fails this many times."""
    from heptapod_fast.train import checkpoint

    save, left = checkpoint.save, [times]

    def flaky(*arguments):
        left[0] -= 1
        if left[0] >= 0:
            raise CheckpointError("could not write: No space left on device")
        return save(*arguments)

    monkeypatch.setattr(checkpoint, "save", flaky)
    monkeypatch.setattr(loop.time, "sleep", lambda seconds: None)


def test_a_failed_checkpoint_is_tried_again_at_the_next_line(tmp_path, monkeypatch):
    train_here(tmp_path / "plain")
    failing(monkeypatch, 1)
    said = []
    _, outcome = train_here(tmp_path / "run", say=said.append, keep_checkpoints=9)
    assert outcome == "finished"
    assert final_files(tmp_path / "plain") == final_files(tmp_path / "run")
    found = [int(p.name[-2:]) for p in listed(tmp_path / "run" / "checkpoints")]
    assert found == [3, 4, 6, 8]  # the one of step 2 came a progress line later
    assert sum("No space left" in line and "WARNING" in line for line in said) == 1
    failed = [r for r in records(tmp_path / "run") if "checkpoint_failed" in r]
    assert [r["images"] for r in failed] == [16]


@pytest.mark.parametrize("times, good", [(2, True), (3, False)])
def test_the_last_checkpoint_is_tried_three_times(tmp_path, monkeypatch, times, good):
    failing(monkeypatch, times)
    settings = dict(images=16, checkpoint_every=10**6)
    if good:
        assert train_here(tmp_path, **settings)[1] == "finished"
    else:
        with pytest.raises(CheckpointError, match="No space left"):
            train_here(tmp_path, **settings)
        assert listed(tmp_path / "checkpoints") == []


def test_out_of_time_is_saved_and_continues(tmp_path):
    run, outcome = train_here(tmp_path, minutes=1e-9)
    assert outcome == "out of time" and run.images == 8
    assert train_here(tmp_path)[1] == "finished"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_signals_are_one_stop_and_handlers_come_back(tmp_path, number):
    before = signal.getsignal(number)
    run = start_here(tmp_path)

    def twice():
        signal.raise_signal(number)
        signal.raise_signal(number)

    run.source = Interrupting(run.source, 16, twice)
    assert train(run) == "stopped" and run.images == 24
    assert signal.getsignal(number) is before
    assert listed(tmp_path / "checkpoints")[-1].name == "step-00000003"


def test_sigusr1_saves_and_continues(tmp_path):
    run = start_here(tmp_path, checkpoint_every=10**6, keep_checkpoints=9)
    run.source = Interrupting(run.source, 24, lambda: signal.raise_signal(signal.SIGUSR1))
    assert train(run) == "finished"
    assert [p.name for p in listed(tmp_path / "checkpoints")] == ["step-00000004", "step-00000008"]


def test_the_gradient_is_that_of_the_mean_over_the_global_batch(tmp_path):
    run = start_here(tmp_path, precision="fp32", steps="uniform")
    loss = run.system.loss(run.source.batch(torch.arange(8)), run.rng)
    assert float(loss.count) != run.system.expected_count(8)  # or this would show nothing
    gradients = torch.autograd.grad(loss.mean, run.optimizer.parameters)
    expected = torch.stack([g.norm() for g in gradients]).norm()
    mean, norm = training_step(run, 8, 2)
    torch.testing.assert_close(norm, expected, rtol=1e-4, atol=1e-6)
    assert float(mean) == pytest.approx(float(loss.mean.detach()), rel=1e-5)


def test_every_grid_has_the_same_classes_and_seeds(tmp_path, monkeypatch):
    asked, drawn = [], {}
    generate = loop.generate

    def spy(system, classes, rng, options):
        asked.append((classes.tolist(), rng, options))
        drawn.update({n: p.detach().clone() for n, p in system.named_parameters()})
        return generate(system, classes, rng, options)

    monkeypatch.setattr(loop, "generate", spy)
    train_here(tmp_path, images=32, sample_every=16, image_size=12, patch_size=4)
    assert len(asked) == 2 and asked[0] == asked[1]
    assert asked[0][0] == [0] * 8 + [1] * 8
    average = final_tensors(tmp_path, "ema-0.9999")
    assert all(torch.equal(drawn[name], average[name]) for name in average)
