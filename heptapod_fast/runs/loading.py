"""A trained run, read back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heptapod_fast.config import Config
from heptapod_fast.rng import Rng
from heptapod_fast.runs.directory import RunError
from heptapod_fast.runs.exported import ExportedFolder
from heptapod_fast.runs.tokenizer import saved_tokenizer
from heptapod_fast.runs.trained import Source, Trained
from heptapod_fast.runs.weights import TrainedRun
from heptapod_fast.sampling import SampleOptions
from heptapod_fast.systems import System, build_system
from heptapod_fast.tokenizers import Tokenizer
from heptapod_fast.world import choose_device, choose_precision

_SHOWN = 4  # tensors that an error names


@dataclass(frozen=True)
class LoadedRun:
    """A trained system, ready to sample, and what it was trained on.

    Attributes:
        config: as the run was started with.
        system: with the weights that were asked for, in evaluation mode, without gradients.
        tokenizer: None for a run on synthetic tokens, which nothing decodes.
        class_names: one name per class; a label is a position in it.
        images_seen: training images up to the checkpoint.
        checkpoint: its path; of an exported folder the name alone that it had in the run.
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
    """A trained run from the newest checkpoint that verifies, or from a folder that was exported.

    Args:
        path: the run directory, or the folder, which holds one checkpoint and one set of weights.
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
        RunError, CheckpointError: say what is missing, damaged, or not what the folder holds.
        FileNotFoundError, ValueError: published weights of the tokenizer that are not there.
    """
    source = source_of(path)
    config = source.read_config()
    target = choose_device(device)
    dtype = choose_precision(config.run.precision if precision == "auto" else precision, target)
    trained = source.open(checkpoint, ema)
    system = build_system(config, len(trained.class_names), target, fill=False)
    _fill(system, trained)
    system.eval().requires_grad_(False)
    if only_samples:
        system.settle_dtype(dtype)
    else:
        system.set_dtype(dtype)
    if tokenizer_weights is not None:
        config = config.replace(tokenizer_weights=tokenizer_weights)
    tokenizer = saved_tokenizer(config, source, trained.tokenizer, trained.checkpoint)
    if tokenizer is not None:
        tokenizer = tokenizer.to(target)
    return LoadedRun(
        config=config,
        system=system,
        tokenizer=tokenizer,
        class_names=trained.class_names,
        images_seen=trained.images_seen,
        checkpoint=trained.checkpoint,
        weights=trained.weights,
    )


def source_of(path: str | Path) -> Source:
    """What lies at a path, a run directory if nothing; whether it can be read shows when it is."""
    folder = ExportedFolder(path)
    return folder if folder.is_there() else TrainedRun(path)


def _fill(system: System, trained: Trained) -> None:
    """Give a system its weights. RunError lists what does not fit."""
    expected = system.state_dict()
    wrong = [f"{name} is missing" for name in expected.keys() - trained.tensors.keys()]
    wrong += [f"{name} is unknown" for name in trained.tensors.keys() - expected.keys()]
    for name in expected.keys() & trained.tensors.keys():
        there = tuple(trained.tensors[name].shape)
        here = tuple(expected[name].shape)
        if there != here:
            wrong.append(f"{name} is {there}, expected {here}")
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise RunError(
            f"{trained.where} does not fit the system that its config.json describes: "
            f"{'; '.join(sorted(wrong)[:_SHOWN])}{more}. Restore both from one copy"
        )
    system.load_state_dict(trained.tensors)
