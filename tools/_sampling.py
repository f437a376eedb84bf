"""What tools that sample from a run have in common: their flags, and loading the run."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any, Literal, cast

from _cli import given, group_of_flags, parse, tyro
from torch import Tensor

from heptapod_fast.config import Settings
from heptapod_fast.config.settings import setting, type_hints
from heptapod_fast.runs import LoadedRun, load_run
from heptapod_fast.sampling import SampleOptions
from heptapod_fast.systems import SYSTEMS

MOST_IMAGES = 10_000_000


@dataclass(kw_only=True)
class SamplingArguments:
    """A run, which of its weights, and how they are sampled."""

    run: tyro.conf.Positional[str]
    """Run directory."""
    ema: str | None = None
    """Moving average by name or decay, "none" for the raw weights; default: the run's first."""
    checkpoint: int | None = None
    """Step of the checkpoint; default: the newest."""
    seed: int = 0
    """Seed of the samples."""
    batch: int = 256
    """Images per batch; does not change what comes out."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to sample."""
    tokenizer_weights: str | None = None
    """File of kl16 or vq16, if it is not where it was in training."""

    def load(self) -> LoadedRun:
        """The `LoadedRun`; ValueError if its tokens cannot be decoded."""
        loaded = load_run(
            self.run,
            self.checkpoint,
            self.ema,
            self.device,
            tokenizer_weights=self.tokenizer_weights,
        )
        if loaded.tokenizer is None:
            raise ValueError(f"{self.run} was trained on synthetic tokens: nothing can be decoded")
        return loaded

    def check_count(self, count: int) -> None:
        """ValueError for counts that cannot be."""
        if not 1 <= count <= MOST_IMAGES or self.batch < 1:
            raise ValueError(
                f"--count {count}, --batch {self.batch}: expected at least 1, and at most "
                f"{MOST_IMAGES:,} images"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed {self.seed}: expected 0 to 2**63 - 1")


def parse_sampling(kind: type, argv: list[str] | None = None) -> tuple[Any, dict[str, Any]]:
    """The flags of a tool, and the options of sampling that were given.

    Which options there are depends on the run's system, and which system that is stands in the run:
    all options of all systems are parsed, and the system refuses those that it does not understand.

    Args:
        kind: a dataclass of the tool's own flags.
    """
    options = group_of_flags(_all_options(), name="SamplingOptions")
    fields = [("sampling", options, dataclasses.field(default_factory=options))]
    arguments = dataclasses.make_dataclass(kind.__name__, fields, bases=(kind,), kw_only=True)
    arguments.__doc__ = kind.__doc__
    parsed = parse(arguments, sys.argv[1:] if argv is None else argv)
    return parsed, given(cast(Any, parsed).sampling)


def _all_options() -> type[Settings]:
    """A group of the options of all systems, and of those that some refuse with a reason."""
    fields: dict[str, Any] = {}
    for system in SYSTEMS.values():
        kinds = type_hints(system.Options)
        for field in dataclasses.fields(system.Options):
            about = setting(field.metadata["help"], default=field.default)
            fields.setdefault(field.name, (field.name, kinds[field.name], about))
    for system in SYSTEMS.values():
        for name in system.REFUSED_OPTIONS:
            nobody = setting("Understood by no system of this version.")
            fields.setdefault(name, (name, str, nobody))
    made = dataclasses.make_dataclass(
        "AllOptions",
        list(fields.values()),
        bases=(Settings,),
        kw_only=True,
        frozen=True,
        namespace={"__module__": __name__},
    )
    made.__doc__ = "How tokens are drawn. A system refuses what it does not understand."
    return made


def images_of(
    loaded: LoadedRun, labels: Tensor, arguments: SamplingArguments, options: SampleOptions
) -> Tensor:
    """Samples of the labels: (B, 3, H, W) in [-1, 1]. options: of the run's system."""
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
        Progress("sampling"),
    )
