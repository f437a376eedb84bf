"""What training works on, in two objects: `Session`, everything that is opened once and stays, and
`State`, what changes. Preparing, saving and resuming them."""

from __future__ import annotations

import dataclasses
import enum
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from heptapod_fast import checkpoints, ops
from heptapod_fast.checkpoints import Checkpoint
from heptapod_fast.classes import numbered
from heptapod_fast.config import BatchSplit, Config
from heptapod_fast.config.data import EMBEDDED
from heptapod_fast.data.cache.format import Cache
from heptapod_fast.data.cache.reader import CacheTokens
from heptapod_fast.data.images import ImageFolder
from heptapod_fast.data.sources import ImageSource
from heptapod_fast.data.tokens import TokenSource
from heptapod_fast.ops.dispatch import Operators
from heptapod_fast.progress import Progress
from heptapod_fast.rng import Rng
from heptapod_fast.runs.data import open_images, open_run_cache, open_tokens
from heptapod_fast.runs.directory import RunDir, RunError
from heptapod_fast.runs.initial import find_weights, report, start_from
from heptapod_fast.runs.tokenizer import keep_tokenizer, open_tokenizer
from heptapod_fast.systems import Phase, System, build_system
from heptapod_fast.tokenizers import PRETRAINED, Tokenizer
from heptapod_fast.train import capture, compilation, recompute
from heptapod_fast.train.memory import Fit, Work, fit_into, memory_limit, obvious_fit
from heptapod_fast.train.operators import choose_operators
from heptapod_fast.train.optimizer import Optimizer
from heptapod_fast.train.parallelize import Layout, Parallel, choose_layout, spread
from heptapod_fast.train.records import read_metrics
from heptapod_fast.train.saving import Saver
from heptapod_fast.train.schedule import peaks_not_reached, warmup_images
from heptapod_fast.train.step import Buffers, Eager, Executor
from heptapod_fast.world import World, choose_precision, device_name, processor_kind

Say = Callable[[str], None]


@dataclass(frozen=True)
class Session:
    """What training works on, opened once.

    Attributes:
        config: resolved, with the number of classes that the data has.
        split: this world's share of the global batch.
        source: where batches come from.
        tokenizer: None where nothing can be decoded, and no sample grids are drawn.
        tokenizer_id: its fingerprint, also where it is not here.
        parallel: the system among its ranks.
        saver: what writes checkpoints.
        buffers: the tensors that every step fills anew.
        executor: what runs the device's part of a step.
        environment: what this session runs on, for sessions.jsonl.
        started: `time.monotonic()` at the start.
    """

    config: Config
    world: World
    directory: RunDir
    say: Say
    split: BatchSplit
    source: TokenSource
    tokenizer: Tokenizer | None
    tokenizer_id: str | None
    system: System
    parallel: Parallel
    optimizer: Optimizer
    saver: Saver
    rng: Rng
    buffers: Buffers
    executor: Executor
    environment: dict[str, str | int]
    started: float


@dataclass
class State:
    """What changes: the images trained on so far, and how often the run went back to a good
    checkpoint. (Weights, moments and averages are in the optimizer's tensors, randomness and order
    follow from the images.)"""

    images: int = 0
    rollbacks: int = 0


class Ending(enum.Enum):
    """How a session ended."""

    FINISHED = "finished"
    STOPPED = "stopped by a signal"
    OUT_OF_TIME = "out of time"
    ALREADY_FINISHED = "already finished"


# ------------------------------------------------------------------------------------- preparing


def prepare(
    config: Config, world: World, say: Say, directory: RunDir | None = None
) -> tuple[Session, State]:
    """Open everything that a resolved configuration names; the newest checkpoint is loaded.

    The caller has claimed the run directory. Collective call.
    """
    started = time.monotonic()
    directory = RunDir.of(config) if directory is None else directory
    dtype = choose_precision(config.run.precision, world.device)
    operators = choose_operators(config, world.device)
    data = _open_data(config, world, say, directory, operators)
    source = data.source
    config = _with_classes(config, source.num_classes)
    plan = _agree_on_plan(config, source.num_classes, world, operators)

    def build(fill: bool) -> System:
        built = build_system(config, source.num_classes, world.device, operators, fill)
        built.set_dtype(dtype)
        return built

    system = build(fill=True)
    phases = list(system.phases(config.recipe.images))
    for line in describe(config, source, world, dtype, operators, directory, phases, plan):
        say(line)
    if data.cache is not None and data.tokenizer is None:
        say(_no_grids(config, data.cache))
    recompute.apply(system, plan.fit.mode)
    if plan.compiled.is_on:
        compilation.apply(system)
    checkpoint = find_checkpoint(directory, world, say)
    if checkpoint is None:
        _start_from_weights(config, world, say, system, source.class_names, data.tokenizer_id)
    parallel = spread(system, plan.layout, world, phases, blank=lambda: build(fill=False))
    split = config.split_batch(world.size)
    eager = Eager(
        parallel=parallel,
        optimizer=Optimizer(system, config.recipe, operators),
        world=world,
        buffers=Buffers.allocate(config.spec, split.micro_batch, world.device),
        rng=Rng(config.recipe.seed),
        batch=config.recipe.batch,
    )
    session = Session(
        config=config,
        world=world,
        directory=directory,
        say=say,
        split=split,
        source=source,
        tokenizer=data.tokenizer,
        tokenizer_id=data.tokenizer_id,
        system=system,
        parallel=parallel,
        optimizer=eager.optimizer,
        saver=Saver(world, in_background=not config.run.sync_checkpoints),
        rng=eager.rng,
        buffers=eager.buffers,
        executor=capture.executor_of(eager, plan.graph, world.device, say),
        environment=environment_of(world, dtype),
        started=started,
    )
    state = State() if checkpoint is None else resume(session, checkpoint)
    if data.cache is not None and world.main:
        keep_tokenizer(directory, data.cache, data.tokenizer)
    return session, state


@dataclass(frozen=True)
class _Data:
    """What a run reads. cache: None where there is none; the others as in Session."""

    source: TokenSource
    tokenizer: Tokenizer | None
    tokenizer_id: str | None
    cache: Cache | None


def _open_data(
    config: Config, world: World, say: Say, directory: RunDir, operators: Operators
) -> _Data:
    """Open data and tokenizer, the same on all ranks. Collective call."""
    with world.together():
        if config.run.init_from is not None and not checkpoints.listed(directory.checkpoints):
            find_weights(config.run.init_from)  # before hours of encoding
        cache = open_run_cache(config)
        images = open_images(config, world.main)
        if images is not None:  # before hours of encoding
            _refuse_other_classes(config, len(images.class_names))
    if isinstance(images, ImageFolder):
        for note in images.notes:
            say(f"found     {note}")
    tokenizer = _open_tokenizer(config, world, directory, images, cache)
    reserved = 0
    if cache is not None and world.device.type == "cuda":
        of_training = _decide(config, len(cache.class_names), world, operators)
        reserved = of_training.fit.bytes
    source = open_tokens(config, world, images, tokenizer, cache, reserved)
    tokenizer_id = _tokenizer_id(tokenizer, cache)
    world.same(
        data=source.fingerprint,
        classes=repr(source.class_names),
        tokenizer=str(tokenizer_id),
    )
    return _Data(source, tokenizer, tokenizer_id, cache)


@dataclass(frozen=True)
class Plan:
    """What a run comes to among its ranks: how it is spread, whether steps are captured and blocks
    compiled, and how the part of this rank fits into its memory."""

    layout: Layout
    graph: capture.Choice
    compiled: compilation.Choice
    fit: Fit

    def lines(self) -> list[str]:
        """What was decided, and why, besides the layout."""
        return [self.graph.line(), self.compiled.line(), *self.fit.lines()]


def _agree_on_plan(config: Config, classes: int, world: World, operators: Operators) -> Plan:
    """The plan of every rank, which has to be the same. Collective call."""
    with world.together():
        plan = _decide(config, classes, world, operators)
    world.same(
        layout=f"{plan.layout.mode}, {plan.layout.shards}",
        recomputation=plan.fit.mode,
        cuda_graph=str(plan.graph.is_on),
    )
    return plan


def _decide(config: Config, classes: int, world: World, operators: Operators) -> Plan:
    work = Work(config, classes, world.device, operators, world.size)
    layout = choose_layout(work, world)
    graph = capture.choose(config.run.cuda_graph, world.device, layout.mode)
    work = dataclasses.replace(work, shards=layout.shards, is_captured=graph.is_on)
    compiled = compilation.choose(config.run.compile, world.device)
    limit = memory_limit(world.device, world.local_size)
    fit = obvious_fit(work, limit) or fit_into(work, limit)
    return Plan(layout, graph, compiled, fit)


def environment_of(world: World, dtype: torch.dtype) -> dict[str, str | int]:
    """What the last bits of a run depend on besides its settings, by name. On a GPU the processor
    is left out: it computes nothing of the training."""
    found: dict[str, str | int] = {
        "device": device_name(world.device),
        "ranks": world.size,
        "torch": torch.__version__,
        "activations": str(dtype),
    }
    if world.device.type == "cpu":
        found["processor"] = processor_kind()
    return found


def _open_tokenizer(
    config: Config,
    world: World,
    directory: RunDir,
    images: ImageSource | None,
    cache: Cache | None,
) -> Tokenizer | None:
    """One rank fits the tokenizer, the others read what it saved. Collective call."""
    progress = Progress("fitting the codebook", "rounds") if world.main else None
    return world.main_first(lambda: open_tokenizer(config, directory, images, progress, cache))


def _tokenizer_id(tokenizer: Tokenizer | None, cache: Cache | None) -> str | None:
    if cache is not None:
        return cache.manifest["tokenizer"]["fingerprint"]
    return None if tokenizer is None else tokenizer.fingerprint


def _with_classes(config: Config, classes: int) -> Config:
    """The configuration with the number of classes that the data has."""
    _refuse_other_classes(config, classes)
    return config.replace(num_classes=classes)


def _refuse_other_classes(config: Config, classes: int) -> None:
    """ValueError if --num-classes is not what the data has."""
    asked = config.data.num_classes
    if asked is not None and asked != classes:
        raise ValueError(f"--num-classes {asked}: {config.data.data} has {classes} classes")


def _no_grids(config: Config, cache: Cache) -> str:
    where = config.data.tokenizer_weights or cache.manifest["tokenizer"]["weights"]
    return (
        f"samples   no sample grids: the weights of {config.data.tokenizer} are not at {where}; "
        "--tokenizer-weights says where they are, here and to tools/sample.py"
    )


def describe(
    config: Config,
    source: TokenSource,
    world: World,
    dtype: torch.dtype,
    operators: Operators,
    directory: RunDir,
    phases: list[Phase],
    plan: Plan,
) -> list[str]:
    """What was decided, and why: the lines at the start of a run."""
    data = config.data
    recipe = config.recipe
    split = config.split_batch(world.size)
    name = str(dtype).removeprefix("torch.")
    epochs = recipe.images / source.num_images
    warmups = " and ".join(f"{warmup_images(recipe, phase):,}" for phase in phases)
    lines = [
        f"run       {directory.path}",
        f"data      {data.data}: {source.num_images:,} images, {source.num_classes} classes, "
        f"{_views(data.flip, source)}; {epochs:.2f} epochs",
    ]
    if source.class_names != tuple(map(str, range(source.num_classes))):
        lines.append(f"classes   {numbered(source.class_names)}")
    if data.data in EMBEDDED and Path(data.data).is_dir():
        lines.append(f"          not the folder of that name, which is --data ./{data.data}")
    if isinstance(source, CacheTokens):
        lines.append(f"cache     {source.mode}: {source.why}")
    lines += [
        f"device    {device_name(world.device)}, {world.size} rank{'s' * (world.size > 1)}; "
        f"{name} activations ({_why_precision(config, name)})",
        f"batch     {recipe.batch} = {world.size} ranks x {split.micro_batches} micro-batches x "
        f"{split.micro_batch}",
        f"rate      {recipe.learning_rate:.3g} = {recipe.lr_per_256:g} x {recipe.batch} / 256, "
        f"warm-up over {warmups} images, then {recipe.lr_schedule}",
    ]
    lines += [f"          {line}" for line in peaks_not_reached(recipe, phases)]
    if world.size > 1:
        lines.append(f"parallel  {_in_words(plan.layout, world)}: {plan.layout.why}")
    lines += plan.lines()
    lines += [f"operator  {line}" for line in operators.lines()]
    return [*lines, f"          {ops.library.status()}"]


def _in_words(layout: Layout, world: World) -> str:
    if layout.mode == "hsdp":
        return f"hsdp, {world.size // layout.shards} copies over {layout.shards} ranks each"
    return layout.mode


def _views(flip: bool, source: TokenSource) -> str:
    if isinstance(source, CacheTokens) and source.cache.views > 2:
        return f"one of {source.cache.views} views ({source.cache.augmentation}) at a time"
    return f"flip {'on' if flip else 'off'}"


def _why_precision(config: Config, name: str) -> str:
    if config.run.precision != "auto":
        return "asked for"
    return "native here" if name == "bfloat16" else "this hardware has no fast bf16"


# ---------------------------------------------------------------------------- saving and resuming


def checkpoint_state(session: Session, state: State) -> dict:
    """What a checkpoint says besides its tensors; equal runs give equal states. Waits for the
    device."""
    guard = session.optimizer.guard.state()
    return {
        "step": session.optimizer.step_count,
        "images": state.images,
        "rollbacks": state.rollbacks,
        checkpoints.GOOD: guard["strain"] == 0,
        "guard": guard,
        "phase": _phase_of_last_image(session, state.images),
        "seed": session.config.recipe.seed,
        "class_names": list(session.source.class_names),
        "data": session.source.fingerprint,
        "tokenizer": session.tokenizer_id,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def begin_save(session: Session, state: State) -> None:
    """Start to write a checkpoint; `Session.saver` says what becomes of it. Collective call.

    Raises:
        CheckpointError: the one before could not be written, or this one, where training waits for
            it; on every rank.
    """
    session.saver.begin(
        session.directory.checkpoints,
        session.optimizer.files(),
        checkpoint_state(session, state),
        session.config.run.keep_checkpoints,
    )


def save_snapshot(session: Session, state: State) -> None:
    """Keep the averages that others are made of after the run, beside the checkpoints. Collective
    call.

    Raises:
        CheckpointError: they cannot be written.
    """
    files = session.optimizer.snapshot()
    if not files:
        return
    about = checkpoint_state(session, state)
    session.saver.write(session.directory.averages, files, about, keep=None)


def find_checkpoint(directory: RunDir, world: World, say: Say) -> Checkpoint | None:
    """The newest checkpoint of a run that verifies, None if there never was one. Rank 0 verifies it
    for all. Collective call.

    Raises:
        CheckpointError: none of those that are there verifies.
        RunError: the ranks see different directories.
    """
    folder = directory.checkpoints
    found = None
    with world.together():
        if world.main:
            found = checkpoints.load_newest(folder, say)
    return _of_rank_0(found, folder, world)


def _of_rank_0(found: Checkpoint | None, folder: Path, world: World) -> Checkpoint | None:
    """The checkpoint that rank 0 has found and verified, on every rank. Collective call.

    Raises:
        RunError: this rank does not see it.
    """
    step = -1 if found is None else found.step
    step = int(world.sum(torch.tensor([step if world.main else 0], device=world.device)))
    if step == -1:
        return None
    path = folder / checkpoints.name_of(step)
    with world.together():
        if not path.is_dir():
            raise RunError(
                f"rank {world.rank} does not find {path}, which rank 0 does: --out must name a "
                "folder that all machines share"
            )
        return checkpoints.load_verified(path) if found is None else found


def resume(session: Session, found: Checkpoint) -> State:
    """Go on from a checkpoint. Collective call.

    Raises:
        RunError: the data is not what it was.
        ValueError: it is of another model.
    """
    world = session.world
    with world.together():
        _refuse_other_data(session, found.state)
        load_state(session.optimizer, found, found.step)
    if world.main:
        for line in [*other_environment(session), *other_phase(session, found.state)]:
            session.say(line)
    return State(found.state["images"], found.state.get("rollbacks", 0))


def load_state(optimizer: Optimizer, found: Checkpoint, step_count: int) -> None:
    """Everything of the optimizer that a checkpoint holds, weights included."""
    optimizer.load(found.read_into, step_count)
    fresh = {"strain": 0.0, "norms": [], "seen": 0}  # for checkpoints of older versions
    optimizer.guard.load(found.state.get("guard", fresh))


def go_back(session: Session, state: State) -> Checkpoint:
    """Take weights, moments and averages from the last good checkpoint; the run goes on with the
    images that come next. Nothing is being written meanwhile. Collective call.

    Returns:
        The checkpoint.

    Raises:
        RunError: there is none.
    """
    world = session.world
    optimizer = session.optimizer
    folder = session.directory.checkpoints
    # Reading all of it takes its time: the group that writes waits long enough.
    patient = session.saver.world
    good = None
    with patient.together():
        if world.main:
            good = checkpoints.newest_good(folder)
    found = _of_rank_0(good, folder, patient)
    if found is None:
        raise RunError(f"{folder} holds no checkpoint from before it")
    skipped = optimizer.skipped.clone()
    with world.together():
        # The count of steps goes on: it names checkpoints, and those to come are new ones.
        load_state(optimizer, found, optimizer.step_count)
    optimizer.skipped.copy_(skipped)
    state.rollbacks += 1
    return found


def drop_way(session: Session, good: Checkpoint) -> None:
    """Remove what was saved on the way that the run has gone back from. Collective call."""
    directory = session.directory
    with session.world.together():
        if session.world.main:
            step = session.optimizer.step_count
            checkpoints.drop_between(directory.checkpoints, good.step, step)
            checkpoints.drop_between(directory.averages, good.step, math.inf)


def other_phase(session: Session, before: dict) -> list[str]:
    """What to say where other --images cut the run into other phases than it was trained in."""
    images = before["images"]
    was = before.get("phase")  # not in checkpoints of older versions
    is_now = _phase_of_last_image(session, images)
    if was is None or was == is_now:
        return []
    return [
        f"phases    the last of the {images:,} images so far was trained in phase {was}, and with "
        f"--images {session.config.recipe.images} it would be in phase {is_now}: the run goes on "
        "with what is next there"
    ]


def _phase_of_last_image(session: Session, images: int) -> str:
    total = session.config.recipe.images
    return session.system.phase(max(images - 1, 0), total).name


def _start_from_weights(
    config: Config,
    world: World,
    say: Say,
    system: System,
    class_names: tuple[str, ...],
    tokenizer_id: str | None,
) -> None:
    """The weights of --init-from, for a run that begins. Collective call."""
    path = config.run.init_from
    if path is None:
        return
    with world.together():
        weights = find_weights(path)
        taken = start_from(system, weights, class_names)
    for line in report(taken, weights, system, class_names, tokenizer_id):
        say(line)


def other_environment(session: Session) -> list[str]:
    """What to say where this session runs on something else than the one before: the run goes on,
    but it is no longer the run that one machine would have made, bit for bit."""
    try:
        earlier = read_metrics(session.directory.sessions)
    except (OSError, ValueError):
        return []  # a lost note is no reason not to train
    if not earlier:
        return []
    before = earlier[-1]
    changes = [
        f"{name} {now} (was {before[name]})"
        for name, now in session.environment.items()
        if name in before and before[name] != now
    ]
    if not changes:
        return []
    return [
        f"moved     {'; '.join(changes)}: the run goes on exactly where it was, and from here on "
        "equals one that never moved up to rounding, not bit for bit"
    ]


def _refuse_other_data(session: Session, before: dict) -> None:
    """RunError if data, tokenizer or classes are not what the checkpoint was trained on."""
    now = checkpoint_state(session, State())
    changed = [key for key in ("data", "tokenizer", "class_names") if before[key] != now[key]]
    other_classes = "class_names" in changed
    if not changed or (session.config.run.allow_data_change and not other_classes):
        return
    data = session.config.data
    where = f"--data {data.data}"
    if "tokenizer" in changed and data.tokenizer in PRETRAINED:
        where += f" or --tokenizer-weights {data.tokenizer_weights}"
    elif "tokenizer" in changed:
        where += f" or the codebook {session.directory.codebook}"
    anyway = "" if other_classes else ", or continue all the same with --allow-data-change"
    what = " and ".join(name.replace("_", " ") for name in changed)
    raise RunError(
        f"{session.directory.path} was trained on other {what}: {where} is not what it was. "
        f"Restore it, choose another --out{anyway}"
    )
