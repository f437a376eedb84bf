"""Weights of a run as a file of their own, which other code reads too."""

from __future__ import annotations

import json
import os
from pathlib import Path

from heptapod_fast import checkpoints
from heptapod_fast.runs.directory import RunError
from heptapod_fast.runs.initial import EXPORTED
from heptapod_fast.runs.loading import LoadedRun
from heptapod_fast.storage import sync, write_numbers

SAFETENSORS, PYTORCH = ".safetensors", ".pt"


def export_file(out: str | Path) -> Path:
    """The file that `out` means: itself, or model.safetensors in a folder.

    Raises:
        RunError: another kind of file, or one that exists.
    """
    path = Path(out)
    if path.suffix not in (SAFETENSORS, PYTORCH):
        if path.suffix and not path.is_dir():
            raise RunError(
                f"--out {out}: expected a folder, or a file that ends in {SAFETENSORS} or {PYTORCH}"
            )
        path = path / EXPORTED
    if path.exists():
        raise RunError(f"--out {out}: {path} exists; move it away, or name another file")
    return path


def export_weights(loaded: LoadedRun, path: Path) -> int:
    """Write a system's parameters under their own names; returns how many values.

    .safetensors has them bare, with what they are as metadata. .pt has them in {"model": ...}, as
    trainers publish them; a system with the names of a published model (llamagen) is read by that
    model's own code.

    Args:
        path: of `export_file`.
    """
    from safetensors.torch import save_file

    tensors = {
        name: value.detach().cpu().contiguous()
        for name, value in loaded.system.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    if path.suffix == PYTORCH:
        write_numbers({"model": tensors}, unfinished)
    else:
        about = {
            "system": loaded.config.system,
            "size": loaded.config.size,
            "weights": loaded.weights,
            "checkpoint": loaded.checkpoint.name,
            "images_seen": str(loaded.images_seen),
            "class_names": json.dumps(loaded.class_names),
        }
        fingerprint = checkpoints.load(loaded.checkpoint).state["tokenizer"]
        if fingerprint is not None:
            about["tokenizer"] = fingerprint
        save_file(tensors, unfinished, metadata=about)
    sync(unfinished)
    os.replace(unfinished, path)
    return sum(value.numel() for value in tensors.values())
