"""The one loop. It does not know which system it trains."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

from torch import Tensor
from torch.profiler import record_function

from heptapod_fast import checkpoints, faults
from heptapod_fast.checkpoints import CheckpointError
from heptapod_fast.config import Config
from heptapod_fast.pictures import save_grid
from heptapod_fast.progress import duration
from heptapod_fast.rng import Rng
from heptapod_fast.runs.directory import RunError
from heptapod_fast.sampling.generate import generate, spread, together
from heptapod_fast.systems import Phase
from heptapod_fast.train.evaluating import (
    lacks_numbers,
    measure,
    measures_samples,
    open_metrics,
)
from heptapod_fast.train.metrics import (
    Meter,
    peak_flops,
    progress_line,
    to_milliseconds,
    training_flops,
)
from heptapod_fast.train.records import (
    JsonLines,
    Record,
    Recorder,
    Sink,
    TensorBoard,
    WeightsAndBiases,
)
from heptapod_fast.train.schedule import learning_rate
from heptapod_fast.train.session import (
    Ending,
    Session,
    State,
    begin_save,
    drop_way,
    go_back,
    save_snapshot,
)
from heptapod_fast.train.step import load

GRID_CLASSES = 8
GRID_COLUMNS = 8
LAST_SAVE_ATTEMPTS = 3
SECONDS_BETWEEN_ATTEMPTS = 5
LATER = "at the next progress line, training goes on"


def train(session: Session, state: State) -> Ending:
    """Train until all images of the recipe were seen, a signal, or the end of the time given; all
    is saved in each case. Collective call.

    Raises:
        CheckpointError: the last checkpoint cannot be written.
        RunError: too many skipped steps.
    """
    config = session.config
    world = session.world
    total = config.recipe.images
    batch = config.recipe.batch
    metrics = open_metrics(session)
    recorder = open_recorder(session, state)
    meter = Meter(total, peak_flops(world.device), world.size, world.device)
    phase = begin_phase(session, state, meter)
    session.system.train()
    save_failed = False

    def is_due(every: int) -> bool:
        """Whether the last step reached a multiple of `every` images."""
        return state.images // every > (state.images - batch) // every

    with ExitStack() as stack:
        asked = stack.enter_context(signals())
        stack.enter_context(closing(recorder))
        stack.enter_context(closing(session.saver))
        stack.enter_context(ending_timed(session, meter))
        # A session that ended between its checkpoint and its numbers left them to this one.
        at_the_start = state.images > 0 and is_due(config.run.evaluate_every or total)
        if at_the_start and lacks_numbers(session, state):
            with meter.time("sampling"):
                measure(session, state, metrics, recorder)
        while state.images < total:
            # 1. One optimizer step. `state.images` grows by the global batch.
            loss, norm = training_step(session, state, phase, meter)
            meter.add(loss, norm, batch)
            if meter.is_first_step:
                patience = timedelta(seconds=config.run.rank_timeout)
                world.wait_at_most(patience, session.parallel.groups)

            # 2. What signals and the clock ask for, the same on all ranks.
            wishes = agree(session, asked)
            finished = state.images >= total
            is_last = finished or wishes.stop
            # After the last image no step begins, and no phase either.
            phase_ends = not finished and session.system.phase(state.images, total) != phase

            # 3. A progress line and a record: the only wait for the device. A run that has skipped
            # too many steps goes back to its last good checkpoint.
            if is_due(config.run.log_every) or is_last or phase_ends:
                log(session, state, phase, meter, recorder)
                check_skips(session, state, recorder)

            # 4. A snapshot of the averages: before the checkpoint, for what comes after it is done
            # again by a run that goes on from there.
            if is_due(snapshots_every(config)):
                with meter.time("checkpoint"):
                    try_snapshot(session, state)

            # 5. A checkpoint. It comes before the grid: a grid that fails must not cost the run.
            if wishes.save_failed:
                save_failed = True
                settle_earlier(session, state, recorder, again=LATER)
            try_again = save_failed and is_due(config.run.log_every)
            if is_due(config.run.checkpoint_every) or is_last or wishes.save or try_again:
                with meter.time("checkpoint"):
                    save_failed = not try_save(session, state, recorder, is_last)
            if wishes.stop and not finished:
                return Ending.OUT_OF_TIME if wishes.out_of_time else Ending.STOPPED

            # 6. A grid of samples.
            grids = config.run.sample_every
            if grids and (is_due(grids) or finished):
                with meter.time("sampling"):
                    sample_grid(session, state)

            # 7. Numbers of samples.
            if measures_samples(session) and (is_due(config.run.evaluate_every) or finished):
                with meter.time("sampling"):
                    measure(session, state, metrics, recorder)

            # 8. What depends on the phase is read anew when another one begins.
            if phase_ends:
                phase = begin_phase(session, state, meter)
    return Ending.FINISHED


def training_step(
    session: Session, state: State, phase: Phase, meter: Meter | None = None
) -> tuple[Tensor, Tensor]:
    """One optimizer step over the global batch: (mean loss, gradient norm), both on the device.

    A rank holds a contiguous block of the batch, cut into micro-batches; step.py says how they add
    up. meter: counts the time of the parts.
    """
    timed = nullcontext if meter is None else meter.time
    config = session.config
    world = session.world
    split = session.split
    session.buffers.sums.zero_()
    world.whereabouts.at = f"step {session.optimizer.step_count + 1}"
    first = state.images + world.rank * split.share
    for start in range(first, first + split.share, split.micro_batch):
        with record_function("data"), timed("data"):
            load(session.source, start, session.buffers)
        is_last = start + split.micro_batch == first + split.share
        with timed("forward_backward"):
            session.executor.forward_backward(phase, is_last)
    faults.point(f"step={session.optimizer.step_count + 1}")
    state.images += config.recipe.batch
    with record_function("optimizer"), timed("optimizer"):
        session.optimizer.begin(learning_rate(config.recipe, state.images, phase))
        return session.executor.update(phase)


def begin_phase(session: Session, state: State, meter: Meter) -> Phase:
    """The phase of the next step; what depends on it is set."""
    phase = session.system.phase(state.images, session.config.recipe.images)
    meter.flops = training_flops(session.system, phase)
    if phase.name:
        session.say(f"phase     {phase.name}: images {phase.first:,} to {phase.end:,}")
    return phase


# ------------------------------------------------------------------------------- between the steps


def open_recorder(session: Session, state: State) -> Recorder:
    """metrics.jsonl and the sinks of --log, on the rank that writes; what a session that ended
    before it could save has recorded is dropped. Collective call."""
    recorder = Recorder(JsonLines(session.directory.metrics), session.say)
    with session.world.together():
        if session.world.main:
            begin_records(session, state, recorder)
    return recorder


def begin_records(session: Session, state: State, recorder: Recorder) -> None:
    """On the rank that writes."""
    directory = session.directory
    lost = recorder.metrics.rewind(state.images)
    checkpoints.drop_between(directory.averages, session.optimizer.step_count, math.inf)
    openers: dict[str, Callable[[], Sink]] = {
        "tensorboard": lambda: TensorBoard(directory.path / "tensorboard", state.images),
        "wandb": lambda: WeightsAndBiases(directory.path, session.config),
    }
    for name in session.config.run.sinks:
        recorder.add(openers[name], name)
    times = {"start_seconds": time.monotonic() - session.started, "lost_seconds": seconds_of(lost)}
    sessions = Recorder(JsonLines(directory.sessions), session.say)
    sessions.write({"images": state.images, **session.environment, **to_milliseconds(times)})


def seconds_of(records: list[Record]) -> float:
    """How long what they record took; records of failures, and of older versions, say nothing."""
    names = ("step_seconds", "other_seconds")
    return sum((record.get(name, 0.0) for record in records for name in names), 0.0)


@contextmanager
def ending_timed(session: Session, meter: Meter) -> Iterator[None]:
    """When the loop ends, its session's line takes up what came after the last record: the last
    checkpoint and grid. A session that fails has no such times."""
    yield
    if session.world.main:
        sessions = JsonLines(session.directory.sessions)
        try:
            sessions.amend(to_milliseconds(meter.times()))
        except (OSError, ValueError) as error:
            session.say(f"WARNING: cannot write {sessions.name}: {error}; all else is saved")


def log(session: Session, state: State, phase: Phase, meter: Meter, recorder: Recorder) -> None:
    """One progress line and one record; batches that held no data end the run."""
    session.source.check()
    session.world.check_in()
    recipe = session.config.recipe
    record = meter.record(state.images)
    record |= {
        "step": session.optimizer.step_count,
        "lr": learning_rate(recipe, state.images, phase),
        "epoch": round(state.images / session.source.num_images, 4),
        "skipped": int(session.optimizer.skipped),
    }
    if phase.name:
        record["phase"] = phase.name
    if session.world.main:
        recorder.write(record)
        session.say(progress_line(record, recipe.images))


def check_skips(session: Session, state: State, recorder: Recorder) -> None:
    """Go back to the last good checkpoint after too many skipped steps. Collective call.

    Raises:
        RunError: it has done so too often, there is none, or nothing was learnt at all.
    """
    optimizer = session.optimizer
    skipped = int(optimizer.skipped)
    is_last = state.images >= session.config.recipe.images
    if is_last and skipped == optimizer.step_count:
        error = RunError(
            "no step of this run had a finite gradient: nothing was learnt. Start anew with "
            "another --out and a lower --lr-per-256"
        )
        session.world.fail(error)
    most = session.config.run.max_skips
    if float(optimizer.guard.strain) <= most:
        return
    what = f"{skipped} steps had a bad gradient and were skipped (--max-skips {most})"
    remedy = (
        "The run has diverged: start anew with another --out and a lower --lr-per-256, or "
        "--precision fp32"
    )
    settle_earlier(session, state, recorder)
    if state.rollbacks >= session.config.run.max_rollbacks:
        error = RunError(
            f"{what}, and the run went back to a good checkpoint {state.rollbacks} times "
            f"(--max-rollbacks). {remedy}"
        )
        session.world.fail(error)
    try:
        good = go_back(session, state)
    except RunError as error:
        session.world.fail(RunError(f"{what}, and {error}. {remedy}"))
    images = good.state["images"]
    if session.world.main:
        recorder.write({"images": state.images, "went_back_to": images})
    then = "training goes on with the images that come next"
    if is_last:
        then = "these were the last images: a larger --images goes on"
    session.say(
        f"WARNING: {what}: weights and optimizer are those after {images:,} images again; {then}"
    )
    # Until this is there, a run that is cut off comes to the same point and goes back again.
    if attempt_save(session, state, waits=True) is None:
        drop_way(session, good)


def try_save(session: Session, state: State, recorder: Recorder, is_last: bool) -> bool:
    """Begin to write a checkpoint; the last one of a session is waited for. A failure (full disk)
    is reported and tried again at the next progress line; the last checkpoint is tried three times,
    then the error is raised. Collective call.

    Returns:
        Whether it was begun, and the last one written.
    """
    attempts = LAST_SAVE_ATTEMPTS if is_last else 1
    for attempt in range(1, attempts + 1):
        settle_earlier(session, state, recorder)
        error = attempt_save(session, state, waits=is_last)
        if error is None:
            return True
        record_failure(session, state, recorder, error)
        if is_last and attempt == attempts:
            final = CheckpointError(
                f"{error}. Free the space, or mend what is wrong, and run the same command: it "
                "continues from the newest checkpoint, if there is one"
            )
            session.world.fail(final)
        again = LATER
        if is_last:
            again = f"in {SECONDS_BETWEEN_ATTEMPTS} s"
        say_failure(session, error, again)
        if is_last:
            time.sleep(SECONDS_BETWEEN_ATTEMPTS)
    return False


def attempt_save(session: Session, state: State, waits: bool) -> CheckpointError | None:
    """Begin to write a checkpoint, and wait for it if asked to. Collective call.

    Returns:
        What went wrong, on all ranks or on none.
    """
    error = None
    try:
        begin_save(session, state)
        if waits:
            session.saver.settle()
    except CheckpointError as caught:
        error = caught
    (has_failed,) = session.world.any(error is not None)
    if has_failed and error is None:
        return CheckpointError("another rank could not write the checkpoint")
    return error


def settle_earlier(session: Session, state: State, recorder: Recorder, again: str = "now") -> None:
    """Wait for the checkpoint before, if it is still being written, and report it if it failed.
    again: when another one is tried."""
    try:
        session.saver.settle()
    except CheckpointError as error:
        record_failure(session, state, recorder, error)
        say_failure(session, error, again)


def record_failure(
    session: Session, state: State, recorder: Recorder, error: CheckpointError
) -> None:
    """A record for those who look at the run later."""
    if session.world.main:
        recorder.write({"images": state.images, "checkpoint_failed": str(error)})


def say_failure(session: Session, error: CheckpointError, again: str) -> None:
    """A line for those who look at it now."""
    session.say(f"WARNING: {error}. Nothing written before was touched; trying again {again}")


def snapshots_every(config: Config) -> int:
    """Images between two snapshots of the averages."""
    return max(config.recipe.images // config.recipe.ema_snapshots, 1)


def try_snapshot(session: Session, state: State) -> None:
    """Keep the averages of now; a failure (full disk) costs this snapshot, which others make up
    for."""
    try:
        save_snapshot(session, state)
    except CheckpointError as error:
        session.say(f"WARNING: no snapshot of the averages: {error}; training goes on")


def sample_grid(session: Session, state: State) -> None:
    """samples/images-N.png from the first moving average: fixed classes, seeds and columns, the
    work shared by all ranks. Collective call."""
    if session.tokenizer is None:
        return
    begin = time.monotonic()
    path = session.directory.samples / f"images-{state.images:012d}.png"
    classes = session.source.num_classes
    rows = min(classes, GRID_CLASSES)
    picked = [row * classes // rows for row in range(rows)]
    labels = spread(picked, rows * GRID_COLUMNS)
    optimizer = session.optimizer
    weights = next(iter(optimizer.emas.values()), optimizer.parameters)
    with session.parallel.whole(weights) as system:
        system.eval()
        batches = generate(
            system,
            session.tokenizer,
            labels,
            Rng(session.config.recipe.seed),
            batch=-(-len(labels) // session.world.size),
            world=session.world,
        )
        images = list(batches)
        session.system.train()
    if session.world.main:
        try:
            save_grid(together(images), path, GRID_COLUMNS)
            session.say(f"samples   {path} ({duration(time.monotonic() - begin)})")
        except OSError as error:
            session.say(f"WARNING: cannot write {path}: {error}; training goes on")


# ---------------------------------------------------------------------------------------- signals


@dataclass
class Asked:
    """Flags that signal handlers raise and the loop reads between steps."""

    stop: bool = False
    save: bool = False


@dataclass(frozen=True)
class Wishes:
    """What is asked for, agreed among the ranks. out_of_time: it is the clock that says stop.
    save_failed: the checkpoint that was being written could not be."""

    stop: bool
    save: bool
    out_of_time: bool
    save_failed: bool


def agree(session: Session, asked: Asked) -> Wishes:
    """What signals and the clock ask of any rank. Collective call; takes note of a wish to save."""
    minutes = session.config.run.minutes
    elapsed = time.monotonic() - session.started
    out_of_time = minutes is not None and elapsed > 60 * minutes
    wants_save = asked.save
    if wants_save:  # and not one that is asked for right now
        asked.save = False
    agreed = session.world.any(
        asked.stop or out_of_time, wants_save, out_of_time, session.saver.failed
    )
    return Wishes(*agreed)


@contextmanager
def signals() -> Iterator[Asked]:
    """SIGINT and SIGTERM ask for a checkpoint and the end, SIGUSR1 for a checkpoint.

    Both come after the step at hand. A third interrupt ends the process at once, unsaved.
    """
    asked = Asked()
    interrupts = 0

    def stop(number, frame):
        nonlocal interrupts
        interrupts += 1
        if interrupts > 2:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        asked.stop = True

    def save_once(number, frame):
        asked.save = True

    wanted = {signal.SIGINT: stop, signal.SIGTERM: stop, signal.SIGUSR1: save_once}
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
