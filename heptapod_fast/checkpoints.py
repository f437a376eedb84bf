"""Checkpoints that are whole or not there.

    checkpoints/step-00001234/   model.safetensors  ema-0.9999.safetensors  optimizer.safetensors
                                 state.json         MANIFEST.json {file: {bytes, crc32c}}

Large tensors, and those of several ranks, are spread over several files (shards.py), which any
number of ranks reads. Written into `step-N.tmp`, every file flushed to disk, the manifest last,
then renamed: a directory without `.tmp` is complete. Reading verifies every byte against the
manifest; a directory that does not verify is renamed to `.corrupt`, and the one before it is taken.
There is no pickle anywhere.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from heptapod_fast import faults, shards
from heptapod_fast.storage import checksum, sync
from heptapod_fast.world import ALONE, World

logger = logging.getLogger(__name__)
MANIFEST = "MANIFEST.json"
STATE = "state.json"
GOOD = "is_good"  # in the state; see `is_good`
_NAME = re.compile(r"step-(\d{8,})$")


class CheckpointError(RuntimeError):
    """No usable checkpoint, or one that could not be written."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint directory."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state["step"]

    def files(self, name: str) -> list[Path]:
        """The files that hold the tensors of one name. CheckpointError if there are none."""
        found = shards.files(self.path, name)
        if not found:
            there = ", ".join(shards.names(self.path))
            raise CheckpointError(f"{self.path} has no {name}; there are: {there}")
        return found

    def read(self, name: str) -> dict[str, Tensor]:
        """All tensors of one name, such as "model", whole, on the host."""
        return shards.read(self.files(name))

    def read_into(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors, or the shards that this rank holds of them; `shards.read_into`.

        Raises:
            ValueError: names, shapes or dtypes are others.
        """
        files = self.files(name)
        _refuse_others(name, shards.shapes(files), tensors)
        shards.read_into(files, tensors)


def _refuse_others(
    name: str, found: Mapping[str, tuple[Any, Any]], expected: Mapping[str, Tensor]
) -> None:
    if found.keys() != expected.keys():
        missing = sorted(expected.keys() - found.keys())
        unknown = sorted(found.keys() - expected.keys())
        raise ValueError(
            f"{name} of the checkpoint does not fit this model: missing {missing[:5]}, unknown "
            f"{unknown[:5]}"
        )
    for key, tensor in expected.items():
        shape, dtype = found[key]
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name}: {key} is {tuple(shape)} {dtype}, expected {tuple(tensor.shape)} "
                f"{tensor.dtype}"
            )


def save(
    folder: Path,
    files: Mapping[str, Mapping[str, Tensor]],
    state: dict[str, Any],
    keep: int | None,
    world: World = ALONE,
) -> Path:
    """Write `files` and `state` as checkpoint `state["step"]` of `folder`, keep the newest `keep`
    (None: all). Collective call.

    Args:
        files: {name: {tensor name: tensor}}, the same names on every rank; plain tensors are alike
            on all of them.
        world: the ranks that write.

    Raises:
        CheckpointError: on every rank (disk full, no permission, ...). Whatever was there before
            stays, and nothing half-written is left. A checkpoint of that step that is already there
            is kept.
    """
    final = folder / name_of(state["step"])
    temporary = final.with_suffix(".tmp")
    is_there = False
    try:
        with world.together():
            if world.main:
                is_there = final.exists()
        (is_there,) = world.any(is_there)
        if is_there:
            return final
        with world.together():
            if world.main:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        for name, tensors in files.items():
            plain = {key: value.detach().contiguous() for key, value in tensors.items()}
            shards.write(temporary, name, plain, world)
        with world.together():
            if world.main:
                faults.point(f"files={state['step']}")
                _seal(temporary, state)
                faults.point(f"manifest={state['step']}")
                temporary.rename(final)
                sync(folder)
                faults.point(f"rename={state['step']}")
    except Exception as error:  # OSError, or what the libraries make of it
        if world.main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"could not write {final}: {error}") from error
    if keep is not None and world.main:
        # It is written: what cannot be removed now is the next one's to remove.
        with contextlib.suppress(OSError, ValueError):
            _retain(folder, keep)
    return final


def _seal(folder: Path, state: dict[str, Any]) -> None:
    """Flush all files of a checkpoint, and write what says that they are all there."""
    (folder / STATE).write_text(json.dumps(state, indent=1, sort_keys=True) + "\n")
    manifest = {}
    for path in sorted(folder.iterdir()):
        sync(path)
        manifest[path.name] = {"bytes": path.stat().st_size, "crc32c": checksum(path)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    sync(folder / MANIFEST)
    sync(folder)


def _retain(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` and the newest good one. One that has lost a file does not
    count, and stays."""
    sound = [path for path in listed(folder) if not damage(path, of_sizes=True)]
    good = [path for path in sound if is_good(path)]
    for path in sound[:-keep]:
        if path not in good[-1:]:
            _remove(path)


def listed(folder: Path) -> list[Path]:
    """Committed checkpoint directories, oldest first."""
    if not folder.is_dir():
        return []
    committed = [path for path in folder.iterdir() if _NAME.match(path.name)]
    return sorted(committed, key=step_of)


def name_of(step: int) -> str:
    """Name of the directory of a step's checkpoint."""
    return f"step-{step:08d}"


def is_good(path: Path) -> bool:
    """Whether a checkpoint is one to go back to: no step before it was skipped that has not been
    made up for. Those of older versions do not say it."""
    return json.loads((path / STATE).read_text()).get(GOOD, True)


def newest_good(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies and is good; None if there is none."""
    for path in reversed(listed(folder)):
        if not damage(path) and is_good(path):
            return load_verified(path)
    return None


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint directory. ValueError for another name."""
    named = _NAME.match(path.name)
    if named is None:
        raise ValueError(f"{path} is not named like a checkpoint")
    return int(named[1])


def damage(path: Path, only: str | None = None, of_sizes: bool = False) -> list[str]:
    """What is wrong with a checkpoint directory; empty if it verifies.

    only: look at this file alone. of_sizes: look at sizes alone, and read no file.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        expected = {name: (entry["bytes"], entry["crc32c"]) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST}: {error}"]
    found = []
    for name, (size, crc) in expected.items():
        if only not in (None, name):
            continue
        file = path / name
        if not file.is_file():
            found.append(f"{name}: missing")
        elif file.stat().st_size != size:
            found.append(f"{name}: {file.stat().st_size} bytes, expected {size}")
        elif not of_sizes and checksum(file) != crc:
            found.append(f"{name}: checksum does not match, the file was changed or damaged")
    # File managers and network file systems leave hidden files behind.
    there = {p.name for p in path.iterdir() if not p.name.startswith(".")}
    extra = there - set(expected) - {MANIFEST}
    found += [f"{name}: not part of the checkpoint" for name in sorted(extra)]
    if STATE not in expected:
        found.append(f"{STATE}: missing from {MANIFEST}")
    return found


def load(path: Path) -> Checkpoint:
    """A verified checkpoint; CheckpointError lists what is wrong with it."""
    wrong = damage(path)
    if wrong:
        raise CheckpointError(f"{path} is damaged: {'; '.join(wrong)}")
    return load_verified(path)


def load_verified(path: Path) -> Checkpoint:
    """A checkpoint that another rank has verified."""
    return Checkpoint(path, json.loads((path / STATE).read_text()))


def load_newest(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies, None if there never was one.

    Damaged ones are reported through `say` and renamed to `.corrupt`. CheckpointError if none is
    left: starting again from nothing would hide the loss.
    """
    tried = []
    for path in reversed(listed(folder)):
        try:
            return load(path)
        except CheckpointError as error:
            say(f"WARNING: {error}; falling back to the checkpoint before it")
            tried.append(path)
            _set_aside(path)
    if tried or list(folder.glob("step-*.corrupt")):
        raise CheckpointError(
            f"no checkpoint in {folder} verifies (damaged ones are kept there as *.corrupt). "
            "Restore one from a copy, or start anew with another --out or after removing "
            f"{folder.parent}"
        )
    return None


def peek(folder: Path) -> dict[str, Any]:
    """State of the newest checkpoint; {} if there is none or its state does not verify.

    Reads no tensors: for a quick look only.
    """
    for path in listed(folder)[-1:]:
        if not any(text.startswith((STATE, MANIFEST)) for text in damage(path, only=STATE)):
            return json.loads((path / STATE).read_text())
    return {}


def load_step(folder: Path, step: int | None) -> Checkpoint:
    """For readers of a run: the given step, or the newest that verifies; nothing is renamed."""
    paths = listed(folder)
    if not paths:
        raise CheckpointError(f"{folder} holds no checkpoint: train first, or name another run")
    if step is not None:
        chosen = [path for path in paths if step_of(path) == step]
        if not chosen:
            have = ", ".join(str(step_of(path)) for path in paths)
            raise CheckpointError(f"--checkpoint {step}: {folder} holds the steps {have}")
        return load(chosen[0])
    errors = []
    for path in reversed(paths):
        try:
            return load(path)
        except CheckpointError as error:
            logger.warning("WARNING: %s; looking at the checkpoint before it", error)
            errors.append(str(error))
    raise CheckpointError(f"{'; '.join(errors)}. Restore one from a copy, or train again")


def drop_between(folder: Path, first: int, last: float) -> None:
    """Remove what was written after step `first` and before `last`: the run took another way."""
    for path in listed(folder):
        if first < step_of(path) < last:
            _remove(path)


def _remove(path: Path) -> None:
    # Renamed first, so that a half-deleted directory is never taken for a checkpoint.
    doomed = path.with_suffix(".tmp")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clean(folder: Path) -> None:
    """Remove what interrupted writes left behind. For the one process that owns the run."""
    for path in folder.glob("step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _set_aside(path: Path) -> None:
    target = path.with_suffix(".corrupt")
    shutil.rmtree(target, ignore_errors=True)
    try:
        path.rename(target)
    except OSError:
        pass
