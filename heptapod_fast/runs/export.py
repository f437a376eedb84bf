"""Weights of a run as a file of their own, which other code reads too."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from heptapod_fast import checkpoints
from heptapod_fast.checkpoints import Checkpoint
from heptapod_fast.runs.directory import RunDir, RunError
from heptapod_fast.runs.initial import EXPORTED, TORCH
from heptapod_fast.runs.weights import read_weights, weights_name
from heptapod_fast.storage import readable, sync, write_numbers

SAFETENSORS, PYTORCH = ".safetensors", ".pt"


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file.
        values: how many numbers it holds.
        weights: which file of the checkpoint they are from: "model", or an average by its name.
        checkpoint: its path.
        images_seen: training images up to it.
    """

    path: Path
    values: int
    weights: str
    checkpoint: Path
    images_seen: int


def export_run(
    run: str | Path, out: str | Path, checkpoint: int | None = None, ema: str | None = None
) -> Exported:
    """Write the parameters of a run under their own names; neither its data nor its tokenizer has
    to be there.

    .safetensors has them bare, with what they are as metadata. .pt has them in {"model": ...}, as
    trainers publish them; a system with the names of a published model (llamagen) is read by that
    model's own code.

    Args:
        run: its directory.
        out: see `export_file`.
        checkpoint, ema: as `load_run` takes them.

    Raises:
        RunError, CheckpointError: say what is missing, or in the way.
    """
    path = export_file(out)
    directory = RunDir(run)
    config = directory.read_config()
    weights = weights_name(config, ema)
    chosen = checkpoints.load_step(directory.checkpoints, checkpoint)
    tensors = read_weights(directory, chosen, weights)
    about = {"system": config.system, "size": config.size} | _about(chosen, weights)
    _write(path, tensors, about)
    values = sum(value.numel() for value in tensors.values())
    return Exported(path, values, weights, chosen.path, chosen.state["images"])


def export_file(out: str | Path) -> Path:
    """The file that `out` means: itself, or model.safetensors in a folder.

    Raises:
        RunError: another kind of file, or one that exists.
    """
    path = Path(out)
    is_file = path.suffix in (SAFETENSORS, PYTORCH)
    if path.suffix in TORCH and not is_file:
        raise RunError(
            f"--out {out}: expected a folder, or a file that ends in {SAFETENSORS} or {PYTORCH}"
        )
    if not is_file and not path.is_file():
        path = path / EXPORTED
    if path.exists():
        raise RunError(f"--out {out}: {path} exists; move it away, or name another file")
    return path


def _about(checkpoint: Checkpoint, weights: str) -> dict[str, str]:
    state = checkpoint.state
    about = {
        "weights": weights,
        "checkpoint": checkpoint.path.name,
        "images_seen": str(state["images"]),
        "class_names": json.dumps(state["class_names"]),
    }
    if state["tokenizer"] is not None:
        about["tokenizer"] = state["tokenizer"]
    return about


def _write(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """All of the file, or none of it."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        if path.suffix == PYTORCH:
            write_numbers({"model": tensors}, unfinished)
        else:
            save_file(tensors, unfinished, metadata=about)
        readable(unfinished)
        sync(unfinished)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
