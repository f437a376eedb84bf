"""What `--dry-run` prints: the whole configuration and everything that follows from it."""

from __future__ import annotations

import dataclasses

from heptapod_fast.config import Config, flag, is_cache
from heptapod_fast.data.cache_format import open_cache
from heptapod_fast.data.logograms import logogram_classes
from heptapod_fast.grid import expected_rows
from heptapod_fast.ops import dispatch
from heptapod_fast.resolve import share_of_batch
from heptapod_fast.systems import System, build_system
from heptapod_fast.tokenizers import token_spec
from heptapod_fast.train.memory import activation_bytes, bytes_per_parameter
from heptapod_fast.train.metrics import FLOPS_FORMULA, training_flops
from heptapod_fast.train.parallel import choose_device
from heptapod_fast.train.setup import choose_operators

GB = 1e9


def summary(config: Config, world_size: int = 1) -> str:
    """Text of a dry run for a resolved config; needs neither data nor weights.

    Raises ValueError naming the flag when the batch does not divide.
    """
    share, micros = share_of_batch(config, world_size)
    spec = token_spec(config.tokenizer, config.image_size, config.patch_size, config.codes)
    classes, why = class_count(config)
    system = build_system(config, spec, classes, "meta", fill=False)
    lines = ["configuration"]
    lines += [f"  {flag(f.name):22} {getattr(config, f.name)}" for f in dataclasses.fields(config)]
    lines += ["", "derived"]
    lines += [
        f"  {name:22} {value}"
        for name, value in derived(config, spec, classes, why, share, micros, world_size)
    ]
    lines += ["", "operators on this machine"] + operator_lines(config)
    lines += ["", "parameters"] + parameter_lines(system)
    lines += ["", f"FLOPs per image ({FLOPS_FORMULA})"] + flops_lines(system)
    lines += ["", "memory per rank (estimate)"] + memory_lines(config, system, share // micros)
    return "\n".join(lines)


def class_count(config: Config) -> tuple[int, str]:
    """Number of classes and where it comes from, without opening the data."""
    if config.num_classes is not None:
        return config.num_classes, "--num-classes"
    if config.data == "logograms":
        return logogram_classes(config.image_size), f"logograms at {config.image_size} px"
    if is_cache(config.data):
        return len(open_cache(config.data).class_names), "of the cache"
    return 1000, "assumed: the data is not opened by a dry run"


def derived(config: Config, spec, classes: int, why: str, share: int, micros: int, world_size: int):
    """(name, value with its formula) pairs."""
    yield "tokens", f"{spec.num_tokens} = ({config.image_size} / {config.patch_size})^2"
    kind = f"{spec.channels} channels" if spec.channels else f"{spec.vocabulary} codes"
    yield "token", f"{spec.kind}, {kind}"
    yield "classes", f"{classes} ({why})"
    yield "head dim", f"{config.width // config.heads} = {config.width} / {config.heads}"
    rate = f"{config.lr_per_256:g} x {config.batch} / 256"
    yield "learning rate", f"{config.learning_rate:.4g} = {rate}"
    yield "warm-up images", f"{config.warmup_images:,} = {config.warmup:g} x {config.images:,}"
    steps = -(-config.images // config.batch)
    yield "steps", f"{steps:,} = {config.images:,} / {config.batch}"
    yield "micro-batches", f"{micros} = {config.batch} / {world_size} ranks / {share // micros}"
    if config.system == "heptapod":
        setting = f"w{config.window}n{config.density}"
        rows = expected_rows(1, spec.num_tokens, config.density, config.steps)
        how = (
            f"{rows:g} = {config.density} x ({spec.num_tokens} + 1) / 2 rows per image"
            if config.steps != "mar"
            else f"{rows:g} rows per image, MAR's mean ratio"
        )
        yield "supervision", f"{setting}, {how if config.head == 'global' else 'local windows'}"
    yield "run directory", config.run_dir()


def operator_lines(config: Config) -> list[str]:
    """What runs each operation here, or why a run would be refused: it may be meant for another
    machine."""
    try:
        choices = choose_operators(config, choose_device(config.device))
    except (dispatch.Unavailable, ValueError) as error:
        return [f"  refused: {error}"]
    return [f"  {line}" for line in dispatch.summary(choices)]


def parameter_lines(system: System) -> list[str]:
    """Parameters per part and in total."""
    parts = {
        name: sum(p.numel() for p in part.parameters()) for name, part in system.named_children()
    }
    parts["total"] = sum(parts.values())
    return [f"  {name:22} {count:>15,}" for name, count in parts.items()]


def flops_lines(system: System) -> list[str]:
    """Forward FLOPs by part, and the total of a training step."""
    lines = [
        f"  {name:22} {value / 1e9:>12.4f} GFLOP forward"
        for name, value in system.flops_per_image().items()
        if value
    ]
    return lines + [f"  {'training':22} {training_flops(system) / 1e9:>12.4f} GFLOP"]


def memory_lines(config: Config, system: System, micro_batch: int) -> list[str]:
    """Fixed bytes per parameter, and saved activations of one micro-batch; see memory.py."""
    count = sum(p.numel() for p in system.parameters())
    fixed = bytes_per_parameter(config) * count
    activations = activation_bytes(config, system, micro_batch)
    return [
        f"  {'weights and optimizer':22} {fixed / GB:>12.3f} GB = {bytes_per_parameter(config)} "
        f"bytes x {count:,}",
        f"  {'activations':22} {activations / GB:>12.3f} GB for {micro_batch} sequences "
        "(--micro-batch)",
        f"  {'total':22} {(fixed + activations) / GB:>12.3f} GB",
    ]
