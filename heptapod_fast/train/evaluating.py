"""Numbers of samples while a run trains: --evaluate-every."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from heptapod_fast.data.sources import ImageSource
from heptapod_fast.evaluation import DEFAULT_METRICS, Metric, MetricContext, make_metrics
from heptapod_fast.progress import Progress, duration
from heptapod_fast.rng import Rng
from heptapod_fast.sampling.generate import generate, spread
from heptapod_fast.systems.base import System
from heptapod_fast.tokenizers import to_uint8
from heptapod_fast.train.records import OF_SAMPLES, Record, Recorder, read_metrics
from heptapod_fast.train.session import Session, State
from heptapod_fast.world import PATIENCE_AT_START

BATCH = 256


def measures_samples(session: Session) -> bool:
    """Whether the run is asked to, and can."""
    return bool(session.config.run.evaluate_every) and session.tokenizer is not None


def open_metrics(session: Session) -> list[Metric]:
    """The metrics of --evaluate-metrics, on the rank that writes; elsewhere none. Collective call.

    Raises:
        ValueError: one lacks what it needs; says what to give.
    """
    if session.config.run.evaluate_every and session.tokenizer is None:
        session.say("WARNING: --evaluate-every: no samples can be decoded here, none are measured")
    if not measures_samples(session):
        return []
    with session.world.together():
        return _made(session) if session.world.main else []


def _made(session: Session) -> list[Metric]:
    run = session.config.run
    assert session.tokenizer is not None  # `measures_samples`
    # Tokens that are made of images while training have them; those of a cache do not.
    behind = getattr(session.source, "source", None)
    if run.evaluate_inception is None:
        run.refuse(("evaluate_inception_sha256",), "is the hash of --evaluate-inception: name it")
    names = run.evaluate_metrics
    if names is None:
        names = DEFAULT_METRICS.get(session.config.data.data or "", "fid,is")
    context = MetricContext(
        source=behind if isinstance(behind, ImageSource) else None,
        tokenizer=session.tokenizer,
        system=session.system,
        count=run.evaluate_count,
        image_size=session.tokenizer.image_size,
        device=session.world.device,
        reference=run.evaluate_reference,
        extractor="small" if run.evaluate_inception is None else "inception",
        inception=run.evaluate_inception,
        inception_sha256=run.evaluate_inception_sha256,
        folder=str(session.directory.path),
        progress=Progress,
    )
    try:
        return make_metrics(names.split(","), context)
    except ValueError as error:
        raise ValueError(
            f"--evaluate-metrics {names}: {error} (in training: --evaluate-inception FILE, "
            "--evaluate-inception-sha256 HASH, --evaluate-reference FOLDER|FILE.npz)"
        ) from None


def lacks_numbers(session: Session, state: State) -> bool:
    """Whether the run is measured, and was not after these images. Collective call."""
    if not measures_samples(session):
        return False
    is_missing = False
    if session.world.main and session.directory.metrics.exists():
        records = read_metrics(session.directory.metrics)
        is_missing = not any(
            record["images"] == state.images and any(name.startswith(OF_SAMPLES) for name in record)
            for record in records
        )
    (found,) = session.world.any(is_missing)
    return found


def measure(session: Session, state: State, metrics: list[Metric], recorder: Recorder) -> None:
    """A record of the numbers of the first moving average: of samples, the same classes and seeds
    each time, where a metric looks at any. A metric that fails costs this record, not the run.
    Collective call."""
    begin = time.monotonic()
    # One rank has the metrics, and all have to draw.
    looking = [metric for metric in metrics if metric.needs_samples]
    (needs_samples,) = session.world.any(bool(looking))
    optimizer = session.optimizer
    weights = next(iter(optimizer.emas.values()), optimizer.parameters)
    error = None
    numbers: Record = {}
    # One rank measures while the others wait, longer than for a step.
    groups = session.parallel.groups
    session.world.wait_at_most(PATIENCE_AT_START, groups)
    with session.parallel.whole(weights) as system:
        system.eval()
        for metric in metrics:
            metric.restart(system)
        if needs_samples:
            _show_samples(session, system, looking)
        try:
            numbers = _numbers(metrics)
        except Exception as caught:  # whatever it is, training has nothing to do with it
            error = caught
        for metric in metrics:
            metric.restart(session.system)  # `system` may be a copy that goes away
        session.system.train()
    session.world.any(False)  # all wait for the one that measured
    session.world.wait_at_most(timedelta(seconds=session.config.run.rank_timeout), groups)
    if not session.world.main:
        return
    if error is not None:
        session.say(f"WARNING: no evaluation: {error}; training goes on")
        return
    recorder.write({"images": state.images, **{OF_SAMPLES + key: numbers[key] for key in numbers}})
    said = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
    session.say(f"evaluated {said} ({duration(time.monotonic() - begin)})")


def _show_samples(session: Session, system: System, metrics: list[Metric]) -> None:
    """Draw samples of a system for the metrics that look at them. Collective call."""
    tokenizer = session.tokenizer
    assert tokenizer is not None  # `measures_samples`
    labels = spread(list(range(session.source.num_classes)), session.config.run.evaluate_count)
    batches = generate(
        system,
        tokenizer,
        labels,
        Rng(session.config.recipe.seed),
        batch=min(BATCH, -(-len(labels) // session.world.size)),
        finish=to_uint8,
        world=session.world,
    )
    for batch_labels, pixels in batches:
        for metric in metrics:
            metric.update(pixels, batch_labels)


def _numbers(metrics: list[Metric]) -> Record:
    """What all metrics say that is a measured number, without that of single classes."""
    found: dict[str, Any] = {}
    for metric in metrics:
        found |= metric.compute()
    return {
        name: value for name, value in found.items() if isinstance(value, float) and "/" not in name
    }
