"""A trained system as it is stored, and what it is read from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from heptapod_fast.config import Config
from heptapod_fast.runs.tokenizer import TokenizerFiles


@dataclass(frozen=True)
class Trained:
    """Weights, verified, and what they are.

    Attributes:
        tensors: by their names in the system, whole, on the host.
        where: what they were read from, for messages.
        weights: which of a run's they are: "model", the raw ones, or a moving average, as
            "ema-0.9999".
        checkpoint: of the run, at which they were taken.
        images_seen: training images up to it.
        class_names: one for each class; a label is a position in it.
        tokenizer: fingerprint of the one whose tokens they were trained on; None for synthetic
            tokens.
    """

    tensors: dict[str, Tensor]
    where: str
    weights: str
    checkpoint: Path
    images_seen: int
    class_names: tuple[str, ...]
    tokenizer: str | None


class Source(TokenizerFiles, Protocol):
    """What a trained system is read from: a run directory (`runs/weights.py`), or a folder that was
    exported of one (`runs/exported.py`).

    Attributes:
        config: the file of its settings; it is there if anything is.
    """

    config: Path

    def read_config(self) -> Config:
        """The settings of the run. RunError if there are none or they cannot be read."""
        ...

    def open(self, checkpoint: int | None = None, ema: str | None = None) -> Trained:
        """The weights asked for.

        Args:
            checkpoint, ema: as `load_run` takes them.

        Raises:
            RunError, CheckpointError: they are not there, or damaged; says what there is.
        """
        ...


def spellings(ema: str) -> tuple[str, ...]:
    """The names of weights that a value of --ema may stand for: "0.9999" is "ema-0.9999"."""
    if ema == "none":
        return ("model",)
    return (ema, f"ema-{ema}", f"power-{ema}")
