"""A trained run, read back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heptapod_fast import checkpoints, shards
from heptapod_fast.averages import LONGEST, POST_HOC, averages_of, power_name
from heptapod_fast.checkpoints import Checkpoint
from heptapod_fast.config import Config
from heptapod_fast.rng import Rng
from heptapod_fast.runs.directory import RunDir, RunError
from heptapod_fast.runs.post_hoc import make_average
from heptapod_fast.runs.tokenizer import saved_tokenizer
from heptapod_fast.sampling import SampleOptions
from heptapod_fast.systems import System, build_system
from heptapod_fast.tokenizers import Tokenizer
from heptapod_fast.world import choose_device, choose_precision


@dataclass(frozen=True)
class LoadedRun:
    """A trained system, ready to sample, and what it was trained on.

    Attributes:
        config: as the run was started with.
        system: with the weights that were asked for, in evaluation mode, without gradients.
        tokenizer: None for a run on synthetic tokens, which nothing decodes.
        class_names: one name per class; a label is a position in it.
        images_seen: training images up to the checkpoint.
        checkpoint: its path.
        weights: which of its files the system's weights are from: "model", the raw weights, or a
            moving average, as "ema-0.9999".
    """

    config: Config
    system: System
    tokenizer: Tokenizer | None
    class_names: tuple[str, ...]
    images_seen: int
    checkpoint: Path
    weights: str

    @property
    def device(self) -> torch.device:
        """Where the system is."""
        return next(self.system.parameters()).device

    def sample(
        self,
        classes: Tensor,
        rng: Rng,
        options: SampleOptions | None = None,
        index: Tensor | None = None,
        **given: Any,
    ) -> Tensor:
        """`System.sample`; options may also be given by name: temperature=0.9.

        Raises:
            TypeError: options in both ways.
        """
        if given and options is not None:
            names = ", ".join(given)
            raise TypeError(f"{names} beside options: give all of them in one way")
        if given:
            options = self.system.options(**given)
        return self.system.sample(classes, rng, options, index)

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens -> images (B, 3, H, W) float32, about in [-1, 1].

        Raises:
            RunError: the run has no tokenizer.
        """
        if self.tokenizer is None:
            raise RunError("this run was trained on synthetic tokens: nothing can be decoded")
        return self.tokenizer.decode(tokens)


def load_run(
    path: str | Path,
    checkpoint: int | None = None,
    ema: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    tokenizer_weights: str | None = None,
    only_samples: bool = False,
) -> LoadedRun:
    """A trained run from the newest checkpoint that verifies.

    Args:
        path: the run directory.
        checkpoint: a step; None for the newest.
        ema: a moving average by name ("ema-0.9999", or its decay "0.9999"), default the run's
            first; "none" for the raw weights. Of a run with `--ema post-hoc` also a length, as
            "0.15", of which an average is made (runs/post_hoc.py).
        device: auto, cpu or cuda.
        precision: auto (the run's), bf16 or fp32.
        tokenizer_weights: where published weights are now, if they are not where they were.
        only_samples: keep most weights in the dtype of the activations (`System.settle_dtype`),
            which draws the same samples faster; else all are the float32 masters.

    Raises:
        RunError, CheckpointError: say what is missing.
    """
    run = RunDir(path)
    config = run.read_config()
    chosen = checkpoints.load_step(run.checkpoints, checkpoint)
    class_names = tuple(chosen.state["class_names"])
    target = choose_device(device)
    dtype = choose_precision(config.run.precision if precision == "auto" else precision, target)
    system = build_system(config, len(class_names), target, fill=False)
    weights = weights_name(config, ema)
    system.load_state_dict(read_weights(run, chosen, weights))
    system.eval().requires_grad_(False)
    if only_samples:
        system.settle_dtype(dtype)
    else:
        system.set_dtype(dtype)
    if tokenizer_weights is not None:
        config = config.replace(tokenizer_weights=tokenizer_weights)
    tokenizer = saved_tokenizer(config, run, chosen)
    if tokenizer is not None:
        tokenizer = tokenizer.to(target)
    return LoadedRun(
        config=config,
        system=system,
        tokenizer=tokenizer,
        class_names=class_names,
        images_seen=chosen.state["images"],
        checkpoint=chosen.path,
        weights=weights,
    )


def weights_name(config: Config, ema: str | None) -> str:
    """What the weights asked for are called: a file of a checkpoint, or an average that has to be
    made.

    Raises:
        RunError: the run has no such average, nor what one could be made of.
    """
    names = [average.name for average in averages_of(config.recipe.ema)]
    if ema == "none" or (ema is None and not names):
        return "model"
    if ema is None:
        return names[0]
    for wanted in (ema, f"ema-{ema}", f"power-{ema}"):
        if wanted in names:
            return wanted
    expected = f"{', '.join(names) or 'no average'}, and 'none' for the raw weights"
    if POST_HOC in config.recipe.ema:
        length = _number(ema.removeprefix("power-"))
        if 0 < length <= LONGEST:
            return power_name(length)
        expected += f", and makes others of a length of about 0.02 to {LONGEST}"
    raise RunError(f"--ema {ema}: this run keeps {expected}")


def _number(text: str) -> float:
    """0 for what is none."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def read_weights(run: RunDir, checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    """The weights of that `weights_name`, at a checkpoint."""
    if name in shards.names(checkpoint.path) or not name.startswith("power-"):
        return checkpoint.read(name)
    return make_average(run.averages, checkpoint, float(name.removeprefix("power-")))
