"""Weights of a trained system as a file of their own, which other code reads too."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from heptapod_fast.config import Config
from heptapod_fast.runs import RunError
from heptapod_fast.runs.initial import TORCH
from heptapod_fast.runs.loading import source_of
from heptapod_fast.runs.trained import Trained
from heptapod_fast.storage import readable, sync, write_numbers

SAFETENSORS, PYTORCH = ".safetensors", ".pt"


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file, or the folder.
        values: how many numbers the weights are.
        weights: which of the run's they are: "model", or an average by its name.
        checkpoint: its path.
        images_seen: training images up to it.
        remark: what a folder lacks and why; empty where nothing is to be said.
    """

    path: Path
    values: int
    weights: str
    checkpoint: Path
    images_seen: int
    remark: str = ""

    @classmethod
    def of(cls, trained: Trained, path: Path, remark: str = "") -> Exported:
        """What is said of weights that were written to a path."""
        values = sum(value.numel() for value in trained.tensors.values())
        return cls(path, values, trained.weights, trained.checkpoint, trained.images_seen, remark)


def is_file(out: str | Path) -> bool:
    """Whether --out names a file of weights, not a folder.

    Raises:
        RunError: a kind of file that is not written.
    """
    suffix = Path(out).suffix
    if suffix in (SAFETENSORS, PYTORCH):
        return True
    if suffix in TORCH:
        raise RunError(
            f"--out {out}: expected a folder, or a file that ends in {SAFETENSORS} or {PYTORCH}"
        )
    return False


def export_weights(
    run: str | Path, out: str | Path, checkpoint: int | None = None, ema: str | None = None
) -> Exported:
    """Write the parameters of a run under their own names; neither its data nor its tokenizer has
    to be there.

    .safetensors has them bare, with what they are as metadata. .pt has them in {"model": ...}, as
    trainers publish them; a system with the names of a published model (llamagen) is read by that
    model's own code.

    Args:
        run: its directory, or a folder that was exported of it.
        out: a file that `is_file` knows.
        checkpoint, ema: as `load_run` takes them.

    Raises:
        RunError, CheckpointError: say what is missing, or in the way.
    """
    path = Path(out)
    if path.exists():
        raise RunError(f"--out {out} exists; move it away, or name another file")
    source = source_of(run)
    config = source.read_config()
    trained = source.open(checkpoint, ema)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        if path.suffix == PYTORCH:
            write_numbers({"model": trained.tensors}, unfinished)
        else:
            write_safetensors(config, trained, unfinished)
        readable(unfinished)
        sync(unfinished)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    return Exported.of(trained, path)


def write_safetensors(config: Config, trained: Trained, path: Path) -> None:
    """The weights, with what they are as metadata."""
    from safetensors.torch import save_file

    about = {
        "system": config.system,
        "size": config.size,
        "weights": trained.weights,
        "checkpoint": trained.checkpoint.name,
        "images_seen": str(trained.images_seen),
        "class_names": json.dumps(trained.class_names),
    }
    if trained.tokenizer is not None:
        about["tokenizer"] = trained.tokenizer
    save_file(trained.tensors, path, metadata=about)
