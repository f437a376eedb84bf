"""Weights to start a run from: those of another run, or of a file. With other classes or another
grid, what fits is taken and the rest keeps the values that were drawn for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from heptapod_fast import checkpoints, shards
from heptapod_fast.runs.directory import RunDir, RunError
from heptapod_fast.runs.exported import MODEL, ExportedFolder
from heptapod_fast.runs.weights import weights_name
from heptapod_fast.storage import read_numbers
from heptapod_fast.systems import System

TORCH = (".pt", ".pth", ".ckpt", ".bin")
# Where trainers keep weights in what they save, averages before the rest, and what wrappers of a
# model put before its names.
WRAPPERS = ("model_ema", "ema", "model", "module", "state_dict")
PREFIXES = ("module.", "_orig_mod.")
_A_LINE = 4


@dataclass(frozen=True)
class Weights:
    """Where weights are.

    Attributes:
        file: safetensors (one of several is enough), or a state dict of PyTorch.
        about: what they are, for messages.
        class_names: of the classes that they were trained on; None where that is not known.
        tokenizer: fingerprint of the one whose tokens they were trained on; None where that is not
            known.
    """

    file: Path
    about: str
    class_names: tuple[str, ...] | None = None
    tokenizer: str | None = None


@dataclass
class Taken:
    """What became of the parameters of a system.

    Attributes:
        part: the part of the file that was taken, as "model_ema"; empty for all of it.
        whole: names of those that were taken over.
        classes: how many rows of the table of classes were, None where the table was taken or left
            as a whole.
        fresh: name -> why it keeps the values drawn for it.
        unused: names of weights that the system has no place for.
    """

    part: str = ""
    whole: list[str] = field(default_factory=list)
    classes: int | None = None
    fresh: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)


def find_weights(path: str) -> Weights:
    """What --init-from names: a run (its first moving average, of the newest checkpoint that
    verifies), a folder with `model.safetensors`, or a file: .safetensors, or what PyTorch saved.

    Raises:
        RunError, CheckpointError: there are no weights.
    """
    folder = Path(path)
    run = RunDir(folder)
    if run.config.exists() and run.checkpoints.exists():
        checkpoint = checkpoints.load_step(run.checkpoints, None)
        name = weights_name(run.read_config(), None)
        return Weights(
            checkpoint.files(name)[0],
            f"{name} of {checkpoint.path}",
            tuple(checkpoint.state["class_names"]),
            checkpoint.state["tokenizer"],
        )
    if folder.is_dir() and run.meant():
        raise RunError(f"--init-from {path}: {run.meant()}, or one of the .safetensors files in it")
    exported = ExportedFolder(folder)
    if exported.index.is_file():
        exported.refuse_damage(exported.read_index(), only=MODEL)
    file = folder / MODEL if folder.is_dir() else folder
    if file.is_file() and file.suffix in (".safetensors", *TORCH):
        return Weights(file, str(file), *_said_beside(file))
    found = "no such file or folder"
    if folder.exists():
        endings = ", ".join(TORCH)
        found = f"neither a run, nor a folder with {MODEL}, nor a file .safetensors, {endings}"
    raise RunError(f"--init-from {path}: {found}")


def _said_beside(file: Path) -> tuple[tuple[str, ...] | None, str | None]:
    """Class names and the tokenizer's fingerprint, where the state of a checkpoint lies beside its
    weights; else None each."""
    state = file.with_name(checkpoints.STATE)
    if not state.is_file():
        return _said_inside(file)
    try:
        found = json.loads(state.read_text())
        return tuple(found["class_names"]), found["tokenizer"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"--init-from: {state} does not say on which classes {file.name} was trained "
            f"({type(error).__name__}: {error}): restore it, or move the weights away from it"
        ) from error


def _said_inside(file: Path) -> tuple[tuple[str, ...] | None, str | None]:
    """The same of a file that `runs/export.py` wrote; None each for any other."""
    from safetensors import safe_open

    if file.suffix in TORCH:
        return None, None
    try:
        with safe_open(file, "pt") as opened:
            about = opened.metadata() or {}
        names = json.loads(about["class_names"])
        return tuple(names), about.get("tokenizer")
    except Exception:  # what reads the weights says what is wrong with a file
        return None, None


def start_from(system: System, weights: Weights, class_names: Sequence[str]) -> Taken:
    """Fill the parameters of an initialised system with weights, as far as they fit.

    Rows of classes are found by the names of the classes, not by their numbers.

    Args:
        class_names: of the system's classes.

    Raises:
        RunError: the file cannot be read, or nothing in it fits.
    """
    theirs, where = _read(weights)
    taken = Taken(part=where)
    table = system.class_table()
    same_classes = weights.class_names is None or weights.class_names == tuple(class_names)
    with torch.no_grad():
        for name, parameter in system.named_parameters():
            found = theirs.pop(name, None)
            if found is None:
                taken.fresh[name] = "not there"
            elif name == table and not (same_classes and found.shape == parameter.shape):
                taken.classes = _take_classes(parameter, found, weights, class_names)
            elif found.shape != parameter.shape:
                here, there = (tuple(t.shape) for t in (parameter, found))
                taken.fresh[name] = f"{here} here, {there} there"
            else:
                parameter.copy_(found)
                taken.whole.append(name)
    taken.unused = sorted(theirs)
    if not taken.whole:
        why = [f"{name}: {reason}" for name, reason in taken.fresh.items()]
        why += [f"{name}: this system has no such tensor" for name in taken.unused]
        listed = "".join(f"\n  {line}" for line in why)
        raise RunError(
            f"--init-from: nothing in {weights.about} fits this system; take weights of the same "
            f"--system and --size{listed}"
        )
    return taken


def _read(weights: Weights) -> tuple[dict[str, Tensor], str]:
    """The tensors by their names in a system, and where in the file they were; "" for all of it."""
    try:
        if weights.file.suffix not in TORCH:
            return shards.read(shards.siblings(weights.file)), ""
        found = read_numbers(weights.file)
    except MemoryError:
        raise
    except Exception as error:  # unpickling garbage may raise anything
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"--init-from: {weights.file} cannot be read: {first}") from error
    return _unwrapped(found, weights)


def _unwrapped(found: object, weights: Weights) -> tuple[dict[str, Tensor], str]:
    """The state dict in what trainers save: under one of `WRAPPERS`, names behind `PREFIXES`."""
    where = ""
    for wrapper in WRAPPERS:
        inside = found.get(wrapper) if isinstance(found, dict) else None
        if isinstance(inside, dict) and inside:  # trainers leave empty ones for what they do not do
            found = inside
            where = wrapper
            break
    tensors = {}
    if isinstance(found, dict):
        tensors = {str(name): t for name, t in found.items() if isinstance(t, Tensor)}
    if not tensors:
        raise RunError(
            f"--init-from: {weights.file} holds no state dict, neither bare nor under one of "
            f"{', '.join(WRAPPERS)}"
        )
    for prefix in PREFIXES * 2:  # one may stand in the other
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): t for name, t in tensors.items()}
    return tensors, where


def _take_classes(
    table: Tensor, theirs: Tensor, weights: Weights, class_names: Sequence[str]
) -> int:
    """Rows of the classes that both know; returns how many. The table's row r is class r; rows
    behind the classes, as that of no class, are taken where both tables have as many."""
    if theirs.shape[1:] != table.shape[1:]:
        return 0
    extra = len(table) - len(class_names)
    # A file that does not name its classes is believed to have the rows that this system has.
    known = len(theirs) - extra if weights.class_names is None else len(weights.class_names)
    if extra and len(theirs) - known == extra:
        table[-extra:].copy_(theirs[-extra:])
    row_of = {name: row for row, name in enumerate(weights.class_names or ())}
    both = [(row, row_of[name]) for row, name in enumerate(class_names) if name in row_of]
    for row, there in both:
        table[row].copy_(theirs[there])
    return len(both)


def report(
    taken: Taken,
    weights: Weights,
    system: System,
    class_names: Sequence[str],
    tokenizer: str | None,
) -> list[str]:
    """Lines that say what was taken, what was drawn anew and what did not fit.

    tokenizer: fingerprint of the one of the run that begins.
    """
    parameters = dict(system.named_parameters())
    values = sum(parameters[name].numel() for name in taken.whole)
    total = sum(parameter.numel() for parameter in parameters.values())
    part = f"{taken.part} of " if taken.part else ""
    lines = [
        f"weights   {len(taken.whole)} of {len(parameters)} tensors, {values:,} of {total:,} "
        f"values, from {part}{weights.about}"
    ]
    if taken.classes is not None:
        lines.append(
            f"          classes: {taken.classes} of {len(class_names)} by their names, the others "
            "are drawn anew"
        )
    elif weights.class_names is None and system.class_table() in taken.whole:
        lines.append("          classes: by their numbers, the file does not name them")
    fresh = [f"{name} ({why})" for name, why in taken.fresh.items()]
    lines += _listed("drawn anew", fresh)
    lines += _listed("not used", taken.unused)
    if weights.tokenizer is not None and weights.tokenizer != tokenizer:
        lines.append(
            "          WARNING: they were trained on the tokens of another tokenizer (another "
            "codebook, or other weights): what they know of tokens means something else here"
        )
    return lines


def _listed(what: str, names: Sequence[str]) -> list[str]:
    """All names, a few a line."""
    return [
        f"          {what}: {', '.join(names[first : first + _A_LINE])}"
        for first in range(0, len(names), _A_LINE)
    ]
