"""What `--dry-run` prints: the whole configuration and everything that follows from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from heptapod_fast.config import BatchSplit, Config, decided, flag
from heptapod_fast.data.cache.format import open_cache
from heptapod_fast.data.embedded import EMBEDDED_SETS, embedded_images
from heptapod_fast.ops.dispatch import Unavailable
from heptapod_fast.runs import RunDir
from heptapod_fast.systems import Phase, System, build_system
from heptapod_fast.train import capture, compilation
from heptapod_fast.train.memory import GB, Work, fit_into, memory_limit
from heptapod_fast.train.metrics import FLOPS_FORMULA, training_flops
from heptapod_fast.train.operators import choose_operators
from heptapod_fast.train.parallelize import choose_layout
from heptapod_fast.train.schedule import peaks_not_reached, warmup_images
from heptapod_fast.world import World, choose_device


def dry_run(config: Config, world_size: int = 1) -> str:
    """Text of a dry run for a resolved configuration; needs neither data nor weights.

    Raises:
        ValueError: the batch does not divide; names the flag.
    """
    split = config.split_batch(world_size)
    classes, why = class_count(config)
    system = build_system(config, classes, "meta", fill=False)
    lines = [
        "configuration",
        f"  {'--size':22} {config.size}",
        f"  {'--system':22} {config.system}",
    ]
    for group in config.groups.values():
        for field in dataclasses.fields(group):
            lines.append(f"  {flag(field.name):22} {getattr(group, field.name)}")
    phases = list(system.phases(config.recipe.images))
    facts = derived(config, split, world_size, f"{classes} ({why})", phases)
    lines += ["", "derived", *(f"  {name:22} {value}" for name, value in facts)]
    lines += ["", "operators on this machine", *operator_lines(config)]
    lines += ["", "parameters", *parameter_lines(system)]
    lines += ["", f"FLOPs per image ({FLOPS_FORMULA})", *flops_lines(config, system)]
    lines += ["", "memory per rank (estimate)", *memory_lines(config, classes, world_size)]
    return "\n".join(lines)


def class_count(config: Config) -> tuple[int, str]:
    """Number of classes and where it comes from, without opening the data."""
    data = config.data
    if data.num_classes is not None:
        return data.num_classes, "--num-classes"
    if data.data in EMBEDDED_SETS:
        classes = len(embedded_images(data.data, data.image_size, 1).class_names)
        return classes, f"{data.data} at {data.image_size} px"
    if data.is_cache:
        return len(open_cache(decided(data.data, "data")).class_names), "of the cache"
    return 1000, "assumed: the data is not opened by a dry run"


def derived(
    config: Config, split: BatchSplit, world_size: int, classes: str, phases: list[Phase]
) -> Iterator[tuple[str, str]]:
    """(name, value with its formula) pairs."""
    data = config.data
    recipe = config.recipe
    spec = config.spec
    yield "tokens", f"{spec.num_tokens} = ({data.image_size} / {data.patch_size})^2"
    kind = f"{spec.channels} channels" if spec.channels else f"{spec.vocabulary} codes"
    yield "token", f"{spec.kind}, {kind}"
    yield "classes", classes
    rate = f"{recipe.lr_per_256:g} x {recipe.batch} / 256"
    yield "learning rate", f"{recipe.learning_rate:.4g} = {rate}"
    for phase in phases:
        warmup = f"{warmup_images(recipe, phase):,}"
        if recipe.warmup_images is None:
            warmup += f" = {recipe.warmup:g} x {phase.end - phase.first:,}"
        whose = f" of phase {phase.name}" if phase.name else ""
        yield "warm-up images", warmup + whose
    for line in peaks_not_reached(recipe, phases):
        yield "", line
    steps = -(-recipe.images // recipe.batch)
    yield "steps", f"{steps:,} = {recipe.images:,} / {recipe.batch}"
    yield (
        "micro-batches",
        f"{split.micro_batches} = {recipe.batch} / {world_size} ranks / {split.micro_batch}",
    )
    yield from config.model.derived(spec)
    yield "run directory", str(RunDir.of(config).path)


def operator_lines(config: Config) -> list[str]:
    """What runs each operation here, or why a run would be refused: it may be meant for another
    machine."""
    try:
        operators = choose_operators(config, choose_device(config.run.device))
    except (Unavailable, ValueError) as error:
        return [f"  refused: {error}"]
    return [f"  {line}" for line in operators.lines()]


def parameter_lines(system: System) -> list[str]:
    """Parameters per part and in total."""
    parts = {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in system.named_children()
    }
    own = sum(parameter.numel() for parameter in system.parameters(recurse=False))
    if own:
        parts["beside them"] = own
    parts["total"] = sum(parts.values())
    return [f"  {name:22} {count:>15,}" for name, count in parts.items()]


def flops_lines(config: Config, system: System) -> list[str]:
    """Forward FLOPs by part, and the total of a training step, for every phase."""
    lines = []
    for phase in system.phases(config.recipe.images):
        if phase.name:
            lines.append(f"  {phase.name}, images {phase.first:,} to {phase.end:,}")
        for name, value in system.flops_per_image(phase).items():
            if value:
                lines.append(f"  {name:22} {value / 1e9:>12.4f} GFLOP forward")
        training = training_flops(system, phase) / 1e9
        lines.append(f"  {'training':22} {training:>12.4f} GFLOP")
    return lines


def memory_lines(config: Config, classes: int, world_size: int) -> list[str]:
    """Bytes of a step by what they are for, with the mode of --recompute that this machine would
    choose; see memory.py."""
    work, note = work_here(config, classes, world_size)
    layout = choose_layout(work, World(0, world_size, work.device, local_size=world_size))
    if world_size > 1:
        note.append(f"parallel  {layout.mode}: {layout.why}")
    work = dataclasses.replace(work, shards=layout.shards)
    try:
        graph = capture.choose(config.run.cuda_graph, work.device, layout.mode)
        work = dataclasses.replace(work, is_captured=graph.is_on)
        note.append(graph.line())
    except ValueError as error:  # it may be meant for another machine
        note.append(f"graph     refused: {error}")
    note.append(compilation.choose(config.run.compile, work.device).line())
    planned = fit_into(work, memory_limit(work.device, world_size))
    lines = [f"  {line}" for line in [*note, *planned.lines()]]
    found = planned.estimate
    if found is None:
        return lines
    split = config.split_batch(world_size)
    count = work.shards * found.fixed // found.per_parameter
    shared = f" / {work.shards} ranks" if work.shards > 1 else ""
    of_parameters = f"= {found.per_parameter} bytes x {count:,}{shared}"
    rows = [
        ("weights and optimizer", found.fixed, of_parameters),
        ("weights in bf16", found.casts, "kept for the backward pass"),
        ("activations", found.activations, f"for {split.micro_batch} sequences (--micro-batch)"),
        ("at the peak", found.rest, "more: gradients and temporaries"),
        (
            "copies of the state",
            found.copies,
            "to write checkpoints from (--sync-checkpoints: none)",
        ),
        ("total", found.total, ""),
    ]
    for name, count_of_bytes, why in rows:
        lines.append(f"  {name:22} {count_of_bytes / GB:>12.3f} GB {why}".rstrip())
    return lines


def work_here(config: Config, classes: int, world_size: int) -> tuple[Work, list[str]]:
    """(what memory depends on, a line if it is not counted as asked for): a run that this machine
    refuses is counted as the references on the CPU would run it."""
    try:
        device = choose_device(config.run.device)
        operators = choose_operators(config, device)
    except (Unavailable, ValueError):
        work = Work(config, classes, torch.device("cpu"), world_size=world_size)
        return work, ["counted with the references on the CPU"]
    return Work(config, classes, device, operators, world_size), []
