"""The loop: resuming bit for bit, order of the data, grids, skipped steps, failed checkpoints."""

import dataclasses
import signal

import pytest
import torch

from heptapod_fast import checkpoints
from heptapod_fast.checkpoints import CheckpointError, listed
from heptapod_fast.runs import RunError
from heptapod_fast.train import loop, step
from heptapod_fast.train.loop import train
from heptapod_fast.train.optimizer import Optimizer
from heptapod_fast.train.records import read_metrics
from heptapod_fast.train.session import Ending
from tests.running import (
    NO_HEAD,
    Interrupting,
    final_files,
    final_tensors,
    start_here,
    train_here,
)

PATCH = {
    "tokenizer": "patch",
    "codes": None,
    "patch_size": 8,
    "diffusion_blocks": 1,
    "diffusion_width": 16,
}
SYSTEMS = {
    "heptapod-global": {},
    "heptapod-local": {"head": "local", "window": 9, "dropout": 0.1},
    "1d-random": {"system": "1d-random"} | NO_HEAD,
    "patch": PATCH,
}
SMALL_GRID = {"image_size": 12, "patch_size": 4}
OF_THE_MACHINE = ("images_per_second", "seconds", "tflops", "memory_peak_gb")


def records(out):
    """The run's records without what the machine says."""

    def depends(name: str) -> bool:
        return name in OF_THE_MACHINE or name.endswith("_seconds")

    return [
        {name: value for name, value in record.items() if not depends(name)}
        for record in read_metrics(out / "metrics.jsonl")
    ]


def checkpoint_names(out):
    return [path.name for path in listed(out / "checkpoints")]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A finished run of the smallest settings."""
    out = tmp_path_factory.mktemp("plain")
    train_here(out)
    return out


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_stopped_run_ends_like_an_undisturbed_one_bit_for_bit(tmp_path, name):
    settings = SYSTEMS[name] | {"ema": (0.9999, 0.9)}
    _, state, ending = train_here(tmp_path / "a", **settings)
    assert (ending, state.images) == (Ending.FINISHED, 64)
    _, state, ending = train_here(tmp_path / "b", stop_at=24, **settings)
    assert (ending, state.images) == (Ending.STOPPED, 32)
    _, state, ending = train_here(tmp_path / "b", **settings)
    assert (ending, state.images) == (Ending.FINISHED, 64)
    assert final_files(tmp_path / "a") == final_files(tmp_path / "b")
    assert records(tmp_path / "a") == records(tmp_path / "b")
    assert len(records(tmp_path / "a")) == 8


def test_training_learns_something(tmp_path):
    train_here(tmp_path, images=320, lr_per_256=0.1, log_every=64)
    losses = [record["loss"] for record in records(tmp_path)]
    assert losses[-1] < losses[0] - 0.1


def test_another_seed_is_another_run(plain, tmp_path):
    train_here(tmp_path, seed=1)
    assert final_files(plain) != final_files(tmp_path)


@pytest.mark.parametrize("name", SYSTEMS)
def test_micro_batches_change_nothing_but_rounding(tmp_path, name):
    settings = SYSTEMS[name] | {"precision": "fp32", "images": 24}
    start, _ = start_here(tmp_path / "start", **settings)
    ends = []
    for micro_batch in (2, 8):
        out = tmp_path / str(micro_batch)
        train_here(out, micro_batch=micro_batch, **settings)
        ends.append(final_tensors(out))
    one, other = ends
    difference = distance = 0.0
    for name, parameter in zip(start.optimizer.names, start.optimizer.parameters, strict=True):
        difference = max(difference, float((one[name] - other[name]).abs().max()))
        distance = max(distance, float((one[name] - parameter.detach()).abs().max()))
    assert difference < 0.02 * distance, (difference, distance)


class Spy(Interrupting):
    """Remembers which samples were asked for."""

    def __init__(self, source, seen):
        super().__init__(source, -1, None)
        self.seen = seen

    def batch(self, index):
        batch = self.inner.batch(index)
        for sample, tokens in zip(index.tolist(), batch.tokens.tolist(), strict=True):
            self.seen.append((sample, tuple(tokens)))
        return batch


def test_order_of_the_data_does_not_depend_on_resuming(tmp_path):
    seen = {"straight": [], "resumed": []}
    for kind, stops in (("straight", [None]), ("resumed", [16, None])):
        for stop in stops:
            session, state = start_here(tmp_path / kind, images=48, logogram_count=20)
            source = Spy(session.source, seen[kind])
            if stop is not None:
                source = Interrupting(source, stop, lambda: signal.raise_signal(signal.SIGTERM))
            train(dataclasses.replace(session, source=source), state)
    assert seen["straight"] == seen["resumed"]
    assert [i for i, _ in seen["straight"]] == list(range(48))


def test_a_checkpoint_at_the_end_of_an_epoch_skips_and_repeats_nothing(tmp_path):
    train_here(tmp_path, stop_at=24, logogram_count=32)
    session, state = start_here(tmp_path, logogram_count=32)
    assert state.images == 32
    epochs = [session.source.batch(torch.arange(first, first + 32)) for first in (0, 32)]
    tokens = [sorted(map(tuple, epoch.tokens.tolist())) for epoch in epochs]
    assert tokens[0] == tokens[1]


def test_grids_are_written_and_the_same_for_the_same_weights(tmp_path):
    from PIL import Image

    def grids(out):
        return {p.name: p.read_bytes() for p in sorted((out / "samples").iterdir())}

    settings = SMALL_GRID | {"sample_every": 32}
    session, _, _ = train_here(tmp_path / "a", **settings)
    train_here(tmp_path / "b", stop_at=40, **settings)
    train_here(tmp_path / "b", **settings)
    assert grids(tmp_path / "a") == grids(tmp_path / "b")
    assert list(grids(tmp_path / "a")) == [f"images-{n:012d}.png" for n in (32, 64)]
    with Image.open(tmp_path / "a" / "samples" / "images-000000000064.png") as image:
        rows = min(session.source.num_classes, 8)
        cell = 96 + 2
        assert image.size == (8 * cell + 2, rows * cell + 2)


def test_a_grid_that_cannot_be_written_does_not_stop_the_run(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop, "save_grid", full)
    said = []
    settings = SMALL_GRID | {"images": 16, "sample_every": 16}
    session, _, ending = train_here(tmp_path, say=said.append, **settings)
    assert ending is Ending.FINISHED
    assert session.system.training
    assert any(line.startswith("WARNING") and "No space left" in line for line in said)


def poison(monkeypatch, steps):
    """The gradient of these steps (1 is the first) holds a NaN."""
    update = Optimizer.update

    def bad_update(self, *arguments):
        if self.step_count in steps:
            self.parameters[0].grad.view(-1)[0] = float("nan")
        return update(self, *arguments)

    monkeypatch.setattr(Optimizer, "update", bad_update)


def test_a_run_without_a_single_good_step_is_no_success(tmp_path, monkeypatch):
    poison(monkeypatch, set(range(1, 100)))
    with pytest.raises(RunError, match="nothing was learnt"):
        train_here(tmp_path)


def test_steps_with_a_bad_gradient_are_skipped_and_counted(tmp_path, monkeypatch):
    poison(monkeypatch, {2, 5})
    _, _, ending = train_here(tmp_path, max_skips=2)
    assert ending is Ending.FINISHED
    assert [record["skipped"] for record in records(tmp_path)] == [0, 1, 1, 1, 2, 2, 2, 2]
    assert all(tensor.isfinite().all() for tensor in final_tensors(tmp_path).values())


def test_records_say_what_the_time_of_a_step_goes_to(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    parts = [(loop, "load", 1.0), (step, "forward_backward", 2.0), (step, "update", 4.0)]
    for module, name, seconds in parts:
        done = getattr(module, name)

        def slow(*arguments, done=done, seconds=seconds):
            now[0] += seconds
            return done(*arguments)

        monkeypatch.setattr(module, name, slow)
    train_here(tmp_path, images=32, log_every=16, micro_batch=4)
    for record in read_metrics(tmp_path / "metrics.jsonl"):
        # Two steps of two micro-batches.
        assert record["data_seconds"] == 4.0
        assert record["forward_backward_seconds"] == 8.0
        assert record["optimizer_seconds"] == 8.0
        assert record["step_seconds"] == 20.0


def test_too_many_bad_gradients_give_up_and_keep_the_last_checkpoint(tmp_path, monkeypatch):
    poison(monkeypatch, {4, 5})
    stubborn = dict(max_skips=1, max_rollbacks=0)
    with pytest.raises(RunError, match="2 steps had a bad gradient.*--max-skips 1"):
        train_here(tmp_path, **stubborn)
    assert checkpoint_names(tmp_path) == ["step-00000002", "step-00000004"]
    with pytest.raises(RunError, match="--max-skips 1"):
        train_here(tmp_path, **stubborn)
    _, _, ending = train_here(tmp_path, max_skips=2)
    assert ending is Ending.FINISHED
    images = [record["images"] for record in records(tmp_path)]
    assert images == list(range(8, 65, 8))  # each one once


def failing(monkeypatch, times):
    """Writing a checkpoint fails this many times."""
    save, left = checkpoints.save, [times]

    def flaky(*arguments):
        left[0] -= 1
        if left[0] >= 0:
            raise CheckpointError("could not write: No space left on device")
        return save(*arguments)

    monkeypatch.setattr(checkpoints, "save", flaky)
    monkeypatch.setattr(loop.time, "sleep", lambda seconds: None)


def test_a_failed_checkpoint_is_tried_again_at_the_next_line(plain, tmp_path, monkeypatch):
    failing(monkeypatch, 1)
    said = []
    _, _, ending = train_here(tmp_path, say=said.append, keep_checkpoints=9, sync_checkpoints=True)
    assert ending is Ending.FINISHED
    assert final_files(plain) == final_files(tmp_path)
    # The one of step 2 came a progress line later.
    assert checkpoint_names(tmp_path) == [f"step-{step:08d}" for step in (3, 4, 6, 8)]
    warnings = [line for line in said if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert "No space left" in warnings[0]
    failed = [record for record in records(tmp_path) if "checkpoint_failed" in record]
    assert [record["images"] for record in failed] == [16]


ONLY_THE_LAST = {"images": 16, "checkpoint_every": 10**6}


def test_the_last_checkpoint_is_tried_three_times(tmp_path, monkeypatch):
    failing(monkeypatch, 2)
    _, _, ending = train_here(tmp_path, **ONLY_THE_LAST)
    assert ending is Ending.FINISHED
    assert checkpoint_names(tmp_path) == ["step-00000002"]


def test_after_the_third_failure_of_the_last_checkpoint_the_error_is_raised(tmp_path, monkeypatch):
    failing(monkeypatch, 3)
    with pytest.raises(CheckpointError, match="No space left.*run the same command"):
        train_here(tmp_path, **ONLY_THE_LAST)
    assert checkpoint_names(tmp_path) == []


def test_out_of_time_is_saved_and_continues(tmp_path):
    _, state, ending = train_here(tmp_path, minutes=1e-9)
    assert (ending, state.images) == (Ending.OUT_OF_TIME, 8)
    _, state, ending = train_here(tmp_path)
    assert (ending, state.images) == (Ending.FINISHED, 64)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_signals_are_one_stop_and_handlers_come_back(tmp_path, number):
    before = signal.getsignal(number)
    session, state = start_here(tmp_path)

    def twice():
        signal.raise_signal(number)
        signal.raise_signal(number)

    source = Interrupting(session.source, 16, twice)
    ending = train(dataclasses.replace(session, source=source), state)
    assert (ending, state.images) == (Ending.STOPPED, 24)
    assert signal.getsignal(number) is before
    assert checkpoint_names(tmp_path)[-1] == "step-00000003"


def test_sigusr1_saves_and_continues(tmp_path):
    session, state = start_here(tmp_path, checkpoint_every=10**6, keep_checkpoints=9)
    source = Interrupting(session.source, 24, lambda: signal.raise_signal(signal.SIGUSR1))
    ending = train(dataclasses.replace(session, source=source), state)
    assert ending is Ending.FINISHED
    assert checkpoint_names(tmp_path) == ["step-00000004", "step-00000008"]


def test_every_grid_has_the_same_classes_and_seeds(tmp_path, monkeypatch):
    asked, drawn = [], {}
    generate = loop.generate

    def spy(system, tokenizer, classes, rng, **options):
        asked.append((classes.tolist(), rng, options))
        for name, parameter in system.named_parameters():
            drawn[name] = parameter.detach().clone()
        return generate(system, tokenizer, classes, rng, **options)

    monkeypatch.setattr(loop, "generate", spy)
    train_here(tmp_path, **SMALL_GRID | {"images": 32, "sample_every": 16})
    assert len(asked) == 2
    assert asked[0] == asked[1]
    assert asked[0][0] == [0] * 8 + [1] * 8
    average = final_tensors(tmp_path, "ema-0.9999")
    assert all(torch.equal(drawn[name], average[name]) for name in average)


def test_ranks_that_see_different_directories_are_refused(tmp_path, monkeypatch):
    """Rank 0 finds the newest checkpoint, and all must see it."""
    train_here(tmp_path, stop_at=16)
    monkeypatch.setattr("heptapod_fast.world.World.sum", lambda world, tensor: tensor + 1)
    with pytest.raises(RunError, match="does not find .*step-00000004.*--out must name a folder"):
        start_here(tmp_path)


def test_the_rate_of_a_step_is_that_of_the_images_after_it(tmp_path):
    """The first step of a warm-up has a rate already, and the last one of the run the lowest."""
    session, state = start_here(tmp_path, images=64, warmup=0.5, lr_schedule="constant")
    rates = []
    begin = session.optimizer.begin
    session.optimizer.begin = lambda lr: (rates.append(lr), begin(lr))
    train(session, state)
    full = session.config.recipe.learning_rate
    assert rates == pytest.approx([full * min(1.0, images / 32) for images in range(8, 65, 8)])
