"""The one loop. It does not know which system it trains."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.profiler import record_function

from heptapod_fast import faults
from heptapod_fast.pictures import save_grid
from heptapod_fast.progress import duration
from heptapod_fast.resolve import share_of_batch
from heptapod_fast.rng import Rng
from heptapod_fast.runs import RunError
from heptapod_fast.sampling import SampleOptions
from heptapod_fast.sampling.generate import generate, spread
from heptapod_fast.train.checkpoint import CheckpointError
from heptapod_fast.train.metrics import (
    Meter,
    MetricsFile,
    peak_flops,
    progress_line,
    training_flops,
)
from heptapod_fast.train.optimizer import learning_rate
from heptapod_fast.train.setup import Run

GRID_CLASSES, GRID_COLUMNS = 8, 8


def train(run: Run) -> str:
    """Train until config.images: returns "finished", "stopped" (by a signal) or "out of time"; all
    is saved in each case.

    Raises CheckpointError if the last checkpoint cannot be written, RunError after too many
    steps with a non-finite gradient.
    """
    config, world = run.config, run.world
    micro = share_of_batch(config, world.size)
    metrics = MetricsFile(run.directory.metrics, run.say)
    if world.main:
        metrics.rewind(run.images)
        sessions = MetricsFile(run.directory.sessions, run.say)
        sessions.write({"images": run.images, **run.environment})
    meter = Meter(config.images, training_flops(run.system), peak_flops(world.device), world.size)
    run.system.train()
    failed_save = False
    with signals() as caught:
        while run.images < config.images:
            loss, norm = training_step(run, *micro)
            meter.add(loss, norm, config.batch)
            late = config.minutes is not None and (
                time.monotonic() - run.started > 60 * config.minutes
            )
            asked, caught.save = caught.save, False
            stop, asked = world.any(caught.stop or late, asked)
            finished = run.images >= config.images
            if due(run, config.log_every) or finished or stop:
                log(run, meter, metrics)
                check_skips(run)
            # Where both are due, saving comes first: a failed grid must not cost the run.
            again = failed_save and due(run, config.log_every)
            if due(run, config.checkpoint_every) or finished or stop or again or asked:
                failed_save = not try_save(run, meter, metrics, last=finished or stop)
            if stop and not finished:
                return "out of time" if late else "stopped"
            if config.sample_every and (due(run, config.sample_every) or finished):
                sample_grid(run, meter)
    return "finished"


def training_step(run: Run, share: int, micro_batches: int) -> tuple[Tensor, Tensor]:
    """One optimizer step over the global batch: (mean loss, gradient norm), both on the device.

    A rank holds a contiguous block of the batch, cut into micro-batches. The loss is divided by the
    expected number of supervised positions at once and by the true one in the optimizer, so that
    neither ranks nor micro-batches change it (--steps mar draws per micro-batch, and is the
    exception).
    """
    world, system, size = run.world, run.system, share // micro_batches
    expected = system.expected_count(run.config.batch)
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    first = run.images + world.rank * share
    for start in range(first, first + share, size):
        with record_function("data"):
            batch = run.source.batch(torch.arange(start, start + size)).to(world.device)
        with record_function("forward"):
            loss = system.loss(batch, run.rng)
        with record_function("backward"):
            (loss.total / expected).backward()
        sums[0] += loss.total.detach()
        sums[1] += loss.count
    faults.point(f"step={run.optimizer.step_count + 1}")
    run.images += run.config.batch
    with record_function("optimizer"):
        world.sum(sums)
        world.sum_gradients(run.optimizer.parameters)
        rate = learning_rate(run.config, run.images)
        norm = run.optimizer.step(rate, (expected / sums[1]).float())
    return sums[0] / sums[1], norm


def due(run: Run, every: int) -> bool:
    """Whether a multiple of `every` images was reached by the last step."""
    return run.images // every > (run.images - run.config.batch) // every


def log(run: Run, meter: Meter, metrics: MetricsFile) -> None:
    """One progress line and one record of metrics.jsonl; batches that held no data end the run."""
    run.source.check()
    record = meter.record(run.images)
    record |= {
        "step": run.optimizer.step_count,
        "lr": learning_rate(run.config, run.images),
        "epoch": round(run.images / run.source.num_images, 4),
        "skipped": int(run.optimizer.skipped),
    }
    if run.world.main:
        metrics.write(record)
        run.say(progress_line(record, run.config.images))


def check_skips(run: Run) -> None:
    """Give up after config.max_skips steps whose gradient was not finite (they change nothing)."""
    skipped = int(run.optimizer.skipped)
    if skipped > run.config.max_skips:
        raise RunError(
            f"{skipped} steps had a non-finite gradient and were skipped (--max-skips "
            f"{run.config.max_skips}): the run has diverged. Start anew with another "
            "--out and a lower --lr-per-256, or --precision fp32"
        )
    if run.images >= run.config.images and skipped == run.optimizer.step_count:
        raise RunError(
            "no step of this run had a finite gradient: nothing was learnt. Start "
            "anew with another --out and a lower --lr-per-256"
        )


def try_save(run: Run, meter: Meter, metrics: MetricsFile, last: bool) -> bool:
    """Write a checkpoint. A failure (full disk) is reported and tried again at the next progress
    line; the last checkpoint is tried three times, then the error is raised."""
    begin, attempts = time.monotonic(), 3 if last else 1
    for attempt in range(1, attempts + 1):
        try:
            run.save()
            meter.pause(time.monotonic() - begin)
            return True
        except CheckpointError as error:
            if run.world.main:
                metrics.write({"images": run.images, "checkpoint_failed": str(error)})
            if last and attempt == attempts:
                raise CheckpointError(
                    f"{error}. Free the space, or mend what is wrong, and run "
                    "the same command: it continues from the newest "
                    "checkpoint, if there is one"
                ) from error
            run.say(
                f"WARNING: {error}. Nothing written before was touched; trying again "
                + ("in 5 s" if last else "at the next progress line, training goes on")
            )
            if last:
                time.sleep(5)
    return False


def sample_grid(run: Run, meter: Meter) -> None:
    """samples/images-N.png from the first moving average: fixed classes, seeds and columns."""
    if run.tokenizer is None or not run.world.main:
        return
    begin = time.monotonic()
    path = run.directory.samples / f"images-{run.images:012d}.png"
    count = min(run.source.num_classes, GRID_CLASSES)
    picked = [i * run.source.num_classes // count for i in range(count)]
    classes = spread(picked, count * GRID_COLUMNS)
    averages = list(run.optimizer.emas)
    run.system.tokenizer = run.tokenizer
    run.system.eval()
    try:
        with run.optimizer.averaged(averages[0] if averages else None):
            images = generate(run.system, classes, Rng(run.config.seed), SampleOptions())
        save_grid(images, path, GRID_COLUMNS)
        run.say(f"samples   {path} ({duration(time.monotonic() - begin)})")
    except OSError as error:
        run.say(f"WARNING: cannot write {path}: {error}; training goes on")
    finally:
        run.system.train()
    meter.pause(time.monotonic() - begin)


class Caught:
    """Flags that signal handlers raise and the loop reads between steps."""

    stop = False
    save = False


@contextmanager
def signals() -> Iterator[Caught]:
    """SIGINT and SIGTERM ask for a checkpoint and the end, SIGUSR1 for a checkpoint.

    Both come after the step at hand. A third interrupt ends the process at once, unsaved.
    """
    caught, count = Caught(), 0

    def stop(number, frame):
        nonlocal count
        count += 1
        if count > 2:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        caught.stop = True

    def save(number, frame):
        caught.save = True

    wanted = {signal.SIGINT: stop, signal.SIGTERM: stop, signal.SIGUSR1: save}
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
