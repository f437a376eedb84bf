"""What tools that sample from a run have in common: their flags, and loading the run."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import tyro

from heptapod_fast.sampling import SampleOptions


@dataclass(frozen=True, kw_only=True)
class SamplingArguments(SampleOptions):
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

    def options(self) -> SampleOptions:
        """The flags that are the sampler's own."""
        return SampleOptions(**{f.name: getattr(self, f.name) for f in fields(SampleOptions)})

    def load(self):
        """The system; ValueError if its tokens cannot be decoded."""
        from heptapod_fast.runs import load_run

        system = load_run(
            self.run,
            self.checkpoint,
            self.ema,
            self.device,
            tokenizer_weights=self.tokenizer_weights,
        )
        if system.tokenizer is None:
            raise ValueError(f"{self.run} was trained on synthetic tokens: nothing can be decoded")
        return system

    def images(self, system, labels):
        """Samples of the labels: (B, 3, H, W) in [-1, 1]."""
        from heptapod_fast.progress import Progress
        from heptapod_fast.rng import Rng
        from heptapod_fast.sampling.generate import generate

        return generate(
            system, labels, Rng(self.seed), self.options(), self.batch, Progress("sampling")
        )

    def check_count(self, count: int) -> None:
        """ValueError for counts that cannot be."""
        if not 1 <= count <= 10_000_000 or self.batch < 1:
            raise ValueError(
                f"--count {count}, --batch {self.batch}: expected at least 1, and at "
                "most 10,000,000 images"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed {self.seed}: expected 0 to 2**63 - 1")
