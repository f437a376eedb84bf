"""Everything that happens once, before the loop: data, tokenizer, system, optimizer, resuming."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from heptapod_fast import ops
from heptapod_fast.config import Config, is_cache
from heptapod_fast.data.cache import CacheTokens, choose_mode
from heptapod_fast.data.cache_format import Cache, CacheError, open_cache, refuse_other
from heptapod_fast.data.files import PREPROCESSING
from heptapod_fast.data.sources import ImageSource
from heptapod_fast.data.tokens import SyntheticTokens, TokenizedImages, TokenSource
from heptapod_fast.progress import Progress
from heptapod_fast.resolve import share_of_batch
from heptapod_fast.rng import Rng
from heptapod_fast.runs import RunDir, RunError, choose_precision, open_tokenizer
from heptapod_fast.systems import System, build_system
from heptapod_fast.tokenizers import PRETRAINED, Tokenizer, hint, token_spec
from heptapod_fast.tokenizers.kl16 import SCALE
from heptapod_fast.train import checkpoint as checkpoints
from heptapod_fast.train.checkpoint import CheckpointError
from heptapod_fast.train.memory import memory_estimate
from heptapod_fast.train.optimizer import Optimizer
from heptapod_fast.train.parallel import World, device_name


@dataclass
class Run:
    """What the loop works on; only `images`, the system and the optimizer change."""

    config: Config
    world: World
    directory: RunDir
    say: Callable[[str], None]
    source: TokenSource
    tokenizer: Tokenizer | None
    tokenizer_id: str | None
    system: System
    optimizer: Optimizer
    rng: Rng
    environment: dict[str, str | int]
    started: float
    images: int = 0

    def state(self) -> dict:
        """What a checkpoint says besides its tensors; equal runs give equal states."""
        return {
            "step": self.optimizer.step_count,
            "images": self.images,
            "seed": self.config.seed,
            "class_names": list(self.source.class_names),
            "data": self.source.fingerprint,
            "tokenizer": self.tokenizer_id,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }

    def save(self) -> None:
        """Write a checkpoint; CheckpointError, on every rank, if it cannot be written."""
        error = None
        if self.world.main:
            try:
                checkpoints.save(
                    self.directory.checkpoints,
                    self.optimizer.files(),
                    self.state(),
                    self.config.keep_checkpoints,
                )
            except CheckpointError as caught:
                error = caught
        if any(self.world.any(error is not None)):
            raise error or CheckpointError("rank 0 could not write the checkpoint")


def open_images(config: Config, show_progress: bool = True) -> ImageSource | None:
    """The images behind --data; None for synthetic tokens and caches.

    Raises FileNotFoundError or ValueError naming the flag at fault.
    """
    if config.data == "synthetic" or is_cache(config.data):
        return None
    if config.data is not None and config.tokenizer in PRETRAINED:
        weights = config.tokenizer_weights
        if weights is None or not Path(weights).exists():  # before any image is decoded
            found = "" if weights is None else f"{weights}: no such file. "
            raise FileNotFoundError(found + hint(config.tokenizer))
    if config.data == "logograms":
        from heptapod_fast.data.logograms import Logograms

        return Logograms(
            config.image_size, config.logogram_count, config.seed, num_classes=config.num_classes
        )
    if not config.data:
        raise ValueError(
            "--data is missing: name a cache of tokens, which python tools/cache.py --data "
            f"IMAGE_FOLDER --tokenizer {config.tokenizer} --out CACHE.zarr makes, or a folder of "
            "images (one subfolder per class), or use --data logograms with --tokenizer patch-vq "
            "or patch, or --data synthetic to measure speed"
        )
    from heptapod_fast.data.decoding import open_decoder
    from heptapod_fast.data.images import ImageFolder

    return ImageFolder(
        config.data,
        config.image_size,
        max_broken=config.max_broken,
        decoder=open_decoder(config.decoder),
        allow_upscale=config.allow_upscale,
        progress=Progress("decoding") if show_progress else None,
    )


def open_tokens(
    config: Config,
    world: World,
    images: ImageSource | None,
    tokenizer: Tokenizer | None,
    cache: Cache | None,
) -> TokenSource:
    """Tokens of a cache, of the images, or synthetic ones."""
    if cache is not None:
        return open_cached(config, world, cache)
    if images is None:
        spec = token_spec(config.tokenizer, config.image_size, config.patch_size, config.codes)
        return SyntheticTokens(spec, config.num_classes, config.seed, device=world.device)
    return TokenizedImages(
        images,
        tokenizer,
        config.seed,
        flip=config.flip,
        device=world.device,
        progress=Progress("tokenising") if world.main else None,
    )


def open_cached(config: Config, world: World, cache: Cache) -> CacheTokens:
    """Tokens of a cache; all ranks fail together where one finds damage."""
    source = error = None
    reserved = memory_estimate(config, len(cache.class_names), world.size)
    mode, why = choose_mode(cache, world.device, config.cache_mode, reserved)
    # Ranks that share the reading must be of one mind; all of them ask, whatever they think.
    (streamed,) = world.any(mode == "stream")
    if streamed and mode != "stream":
        mode, why = "stream", "another rank has no room for it"
    try:
        source = CacheTokens(
            cache,
            config.seed,
            config.flip,
            world.device,
            mode,
            why,
            world.local,
            Progress("reading the cache", "files") if world.main else None,
        )
    except (CacheError, OSError) as caught:
        error = caught
    if any(world.any(error is not None)):
        raise error or CacheError(f"another rank could not read {cache.path}")
    return source


def check_cache(config: Config, cache: Cache) -> None:
    """Refuses a cache that was made with other settings than the run's.

    Raises:
        CacheError: says what the cache has and which flag asks for something else.
    """
    refuse_other(cache, vars(config))
    about = cache.manifest["tokenizer"]
    for name, found, here in (
        ("preprocessing", cache.manifest["preprocessing"], PREPROCESSING),
        ("a scale of tokens of", str(about.get("scale", SCALE)), str(SCALE)),
    ):
        if not found.startswith(here):
            raise CacheError(
                f"{cache.path} was made with {name} {found}, this version has {here}: "
                "build it anew with tools/cache.py"
            )
    if config.flip and cache.views < 2:
        raise CacheError(
            f"--flip: {cache.path} was made without --flip, it has no mirrored "
            "images: train with --no-flip, or build it anew with --flip"
        )
    if config.tokenizer == "patch-vq" and config.tokenizer_weights is not None:
        raise CacheError(
            f"--tokenizer-weights {config.tokenizer_weights}: {cache.path} has its "
            "own codebook; leave --tokenizer-weights out"
        )


def choose_operators(config: Config, device: torch.device) -> list:
    """Who runs each operation: attention, the optimizer step, then all others, which take the
    implementation of --kernels from here on.

    Raises Unavailable naming the flag that asks for what cannot run.
    """
    dtype = choose_precision(config.precision, device)
    wanted = [
        ("--attention", config.attention, "attention", dtype, attention_limits(config)),
        ("--adamw-ema", config.adamw_ema, "adamw_ema", torch.float32, None),
        ("--adamw-ema", config.adamw_ema, "global_norm", torch.float32, None),
        ("--kernels", "auto", "philox", torch.int64, None),
    ]
    for operation in ops.dispatch.operations("triton"):
        if operation != "attention":
            ops.dispatch.force(operation, config.kernels)
            wanted.append(("--kernels", config.kernels, operation, dtype, None))
    found = []
    for asked, name, operation, kind, limits in wanted:
        try:
            found.append(ops.dispatch.choose(operation, device, kind, name, limits))
        except ops.dispatch.Unavailable as error:
            raise ops.dispatch.Unavailable(
                f"{asked} {name}: {error}. Leave {asked} away to take what there is"
            ) from None
    return found


def attention_limits(config: Config) -> dict[str, str | None]:
    """What keeps an implementation of attention from this model: head width, length, masks."""
    keys = (config.image_size // config.patch_size) ** 2 + 1
    local = config.system == "heptapod" and config.head == "local"
    return ops.attention_limits(
        config.width // config.heads, keys, ops.Ends if local else ops.Causal
    )


def prepare(config: Config, world: World, say: Callable[[str], None]) -> tuple[Run, bool]:
    """Open everything that a resolved config names; the newest checkpoint is loaded.

    Returns the run and whether it was resumed. The caller has claimed the run directory.
    """
    started = time.monotonic()
    dtype = choose_precision(config.precision, world.device)
    choices = choose_operators(config, world.device)
    directory = RunDir(config.run_dir())
    cache = open_cache(config.data) if is_cache(config.data) else None
    if cache is not None:
        check_cache(config, cache)
    images = open_images(config, world.main)
    # One rank fits the tokenizer, the others read what it saved.
    if not world.main:
        world.barrier()
    tokenizer = open_tokenizer(
        config,
        directory,
        images,
        Progress("fitting the codebook", "rounds") if world.main else None,
        cache,
    )
    if world.main:
        world.barrier()
    tokenizer_id = (
        cache.manifest["tokenizer"]["fingerprint"]
        if cache is not None
        else None
        if tokenizer is None
        else tokenizer.fingerprint
    )
    source = open_tokens(config, world, images, tokenizer, cache)
    classes = source.num_classes
    if config.num_classes is not None and config.num_classes != classes:
        raise ValueError(f"--num-classes {config.num_classes}: {config.data} has {classes} classes")
    config = replace(config, num_classes=classes)
    for line in describe(config, source, world, dtype, choices):
        say(line)
    if cache is not None and tokenizer is None:
        where = config.tokenizer_weights or cache.manifest["tokenizer"]["weights"]
        say(
            f"samples   no sample grids: the weights of {config.tokenizer} are not at {where}; "
            "--tokenizer-weights says where they are, here and to tools/sample.py"
        )
    spec = token_spec(config.tokenizer, config.image_size, config.patch_size, config.codes)
    system = build_system(config, spec, classes, world.device, config.attention)
    system.set_dtype(dtype)
    run = Run(
        config,
        world,
        directory,
        say,
        source,
        tokenizer,
        tokenizer_id,
        system,
        Optimizer(system, config, choices[1].implementation),
        Rng(config.seed),
        {
            "device": device_name(world.device),
            "ranks": world.size,
            "torch": torch.__version__,
            "activations": str(dtype),
        },
        started,
    )
    resumed = resume(run)
    if cache is not None and world.main:
        directory.keep_tokenizer(cache, tokenizer)
    return run, resumed


def resume(run: Run) -> bool:
    """Load the newest checkpoint of the run, if there is one; refuse changed data."""
    world = run.world
    if not world.main:
        world.barrier()  # rank 0 sets damaged checkpoints aside before the others look
    found = checkpoints.load_newest(run.directory.checkpoints, run.say)
    if world.main:
        world.barrier()
    step = -1 if found is None else found.step
    if int(world.sum(torch.tensor([step], device=world.device))) != step * world.size:
        raise RunError(
            f"the ranks find different checkpoints in {run.directory.checkpoints}: "
            "--out must name a folder that all machines share"
        )
    if found is None:
        return False
    now = run.state()
    changed = [key for key in ("data", "tokenizer", "class_names") if found.state[key] != now[key]]
    if "class_names" in changed or changed and not run.config.allow_data_change:
        raise RunError(changed_data(run, changed))
    run.optimizer.load(found.read, found.step)
    run.images = found.state["images"]
    return True


def changed_data(run: Run, changed: list[str]) -> str:
    """What to say of a run whose data is not what its checkpoint says."""
    what = " and ".join(name.replace("_", " ") for name in changed)
    where = f"--data {run.config.data}"
    if "tokenizer" in changed:
        where += (
            f" or --tokenizer-weights {run.config.tokenizer_weights}"
            if run.config.tokenizer in PRETRAINED
            else f" or the codebook {run.directory.tokenizer}"
        )
    anyway = (
        "" if "class_names" in changed else ", or continue all the same with --allow-data-change"
    )
    return (
        f"{run.directory.path} was trained on other {what}: {where} is not what it was. "
        f"Restore it, choose another --out{anyway}"
    )


def describe(
    config: Config, source: TokenSource, world: World, dtype: torch.dtype, choices: list
) -> list[str]:
    """What was decided, and why: the lines at the start of a run."""
    share, micros = share_of_batch(config, world.size)
    name = str(dtype).removeprefix("torch.")
    why = (
        "asked for"
        if config.precision != "auto"
        else "native here"
        if name == "bfloat16"
        else ("this hardware has no fast bf16")
    )
    return [
        f"run       {config.run_dir()}",
        f"data      {config.data}: {source.num_images:,} images, {source.num_classes} classes, "
        f"flip {'on' if config.flip else 'off'}; {config.images / source.num_images:.2f} epochs",
        *([f"cache     {source.mode}: {source.why}"] if isinstance(source, CacheTokens) else []),
        f"device    {device_name(world.device)}, {world.size} rank{'s' * (world.size > 1)}; {name} "
        f"activations ({why})",
        f"batch     {config.batch} = {world.size} ranks x {micros} micro-batches x "
        f"{share // micros}",
        f"rate      {config.learning_rate:.3g} = {config.lr_per_256:g} x {config.batch} / 256, "
        f"warm-up over {config.warmup_images:,} images, then {config.lr_schedule}",
        *(f"operator  {line}" for line in ops.dispatch.summary(choices)),
        f"          {ops.library.status()}",
    ]
