"""What tools that sample from a run have in common: their flags, and loading the run."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal, cast

from _cli import find_flag, given, group_of_flags, parse, switches, tyro
from torch import Tensor

from heptapod_fast import world as worlds
from heptapod_fast.config import flag
from heptapod_fast.data.sources import ImageSource
from heptapod_fast.runs import LoadedRun, load_run
from heptapod_fast.runs.data import open_images
from heptapod_fast.runs.loading import source_of
from heptapod_fast.sampling import Given, SampleOptions
from heptapod_fast.systems import SYSTEMS, System
from heptapod_fast.world import World

MOST_IMAGES = 10_000_000


@dataclass(kw_only=True)
class RunArguments:
    """A run, and which of its weights."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Run directory, or a folder of tools/export.py."""
    ema: str | None = None
    """Moving average by name or decay, "none" for the raw weights; default: the run's first. Of a
    run with --ema post-hoc also a length, as 0.15."""
    checkpoint: int | None = None
    """Step of the checkpoint; default: the newest."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; sampling under torchrun, processes share the work, a batch each."""
    tokenizer_weights: str | None = None
    """File of kl16 or vq16, if it is not where it was in training."""

    def load(self, world: World) -> LoadedRun:
        """The `LoadedRun`, on the device of this rank; ValueError if its tokens cannot be
        decoded."""
        loaded = load_run(
            self.run,
            self.checkpoint,
            self.ema,
            str(world.device),
            tokenizer_weights=self.tokenizer_weights,
            only_samples=True,
        )
        if loaded.tokenizer is None:
            raise ValueError(f"{self.run} was trained on synthetic tokens: nothing can be decoded")
        return loaded

    def training_images(self, loaded: LoadedRun) -> ImageSource | None:
        """The images behind the run's --data, decoded when they are asked for; None where it has
        none beside its tokens. FileNotFoundError where they are not here, as with a run or a folder
        from another machine."""
        try:
            return open_images(loaded.config, in_memory=False)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"the images that {self.run} was trained on are not here ({error}): name others "
                "with --reference, and of the metrics those that need no more than these"
            ) from error


@dataclass(kw_only=True)
class SamplingArguments(RunArguments):
    """A run, which of its weights, and how they are sampled."""

    seed: int = 0
    """Seed of the samples."""
    batch: int = 256
    """Images per batch; does not change what comes out."""

    def check_count(self, count: int) -> None:
        """ValueError for counts that cannot be."""
        if not 1 <= count <= MOST_IMAGES or self.batch < 1:
            raise ValueError(
                f"--count {count}, --batch {self.batch}: expected at least 1, and at most "
                f"{MOST_IMAGES:,} images"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed {self.seed}: expected 0 to 2**63 - 1")


def parse_sampling(own: type, argv: list[str] | None = None) -> tuple[Any, dict[str, Any]]:
    """The flags of a tool, and the options of sampling that were given.

    Which options there are depends on the run's system, so that RUN_DIR is looked at first. For
    sample.py and a run of heptapod it is as if this had been written:

        @dataclass(kw_only=True)
        class Arguments(own):                          # RUN_DIR, --ema, --count, ...
            sampling: HeptapodOptions                  # --temperature, --positions-per-step, ...

    where HeptapodOptions stands for what `group_of_flags` makes of that class. Without RUN_DIR, as
    for --help alone, the options are those that all systems have.

    Args:
        own: a dataclass of the tool's own flags.

    Raises:
        RunError: RUN_DIR is no run directory and no folder that was exported.
        ValueError: an option that the run's system does not understand; says why where it can.
    """
    argv = sys.argv[1:] if argv is None else argv
    run = peek_run(argv)
    options = SampleOptions
    about = f"{own.__doc__}\n\n{_options_of_all_systems()}"
    if run is not None:
        name = source_of(run).read_config().system
        _refuse_foreign(argv, SYSTEMS[name])
        options = SYSTEMS[name].Options
        about = f"{own.__doc__}\n\n{run} is a run of --system {name}."
    flags = group_of_flags(options)
    fields = [("sampling", flags, dataclasses.field(default_factory=flags))]
    arguments = dataclasses.make_dataclass("Arguments", fields, bases=(own,), kw_only=True)
    arguments.__doc__ = about
    parsed = parse(arguments, argv)
    return parsed, given(cast(Any, parsed).sampling)


def peek_run(argv: list[str]) -> str | None:
    """RUN_DIR, before the flags are parsed: they depend on it. None where there is none.

    Which flags take a value is not known yet, so that a word after a flag is taken for RUN_DIR only
    if it names a run, as in `--some-switch RUN_DIR`.
    """
    words: list[str] = []
    after_flags: list[str] = []
    for before, word in pairwise(["", *argv]):
        if word.startswith("-"):
            continue
        if before.startswith("--") and "=" not in before:
            after_flags.append(word)
        else:
            words.append(word)
    runs = [word for word in [*words, *after_flags] if source_of(word).config.exists()]
    candidates = [*runs, *words]
    return candidates[0] if candidates else None


def _refuse_foreign(argv: list[str], system: type[System]) -> None:
    """ValueError for an option that only other systems have, or that the run's system refuses with
    a reason, rather than as unknown."""
    ours = system.Options.names()
    names = set(system.REFUSED_OPTIONS)
    switch_names: set[str] = set()
    for other in SYSTEMS.values():
        names.update(other.Options.names(), other.REFUSED_OPTIONS)
        switch_names.update(switches(other.Options))
    found = find_flag(argv, names.difference(ours), switch_names)
    if found is not None:
        name, value = found
        system.options(**{name: value})  # raises


def _options_of_all_systems() -> str:
    """What --help says of the options where no run decides which there are."""
    lines = [
        "With RUN_DIR, --help shows the options of its system; below are those of all systems."
    ]
    common = SampleOptions.names()
    for name, system in SYSTEMS.items():
        own = [flag(option) for option in system.Options.names() if option not in common]
        if own:
            lines.append(f"--system {name} also has {', '.join(own)}.")
    return " ".join(lines)


@contextmanager
def started(device: str) -> Iterator[World]:
    """The ranks that sample together."""
    world = worlds.start(device)
    try:
        yield world
    finally:
        worlds.stop(world)


def samples_of(
    loaded: LoadedRun,
    labels: Tensor,
    arguments: SamplingArguments,
    options: SampleOptions,
    world: World,
    finish: Callable[[Tensor], Tensor] = Tensor.float,
    given: Given | None = None,
    start: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(labels, images), batch by batch; see `generate`. options: of the run's system."""
    from heptapod_fast.progress import Progress
    from heptapod_fast.rng import Rng
    from heptapod_fast.sampling.generate import generate

    return generate(
        loaded.system,
        loaded,
        labels,
        Rng(arguments.seed),
        options,
        arguments.batch,
        Progress("sampling", before=start),
        finish,
        world,
        given,
        start,
    )
