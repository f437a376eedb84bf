"""Reading the published weights of kl16 and vq16: every byte is distrusted, nothing is executed.

A file holds a state dict, bare or under "model", in PyTorch's format (read with
`weights_only=True`) or as safetensors. It must hold exactly the tensors of the architecture; what
the published files may hold beyond them is listed in `ORIGINS`.
"""

from __future__ import annotations

import hashlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor

from heptapod_fast.storage import read_numbers
from heptapod_fast.tokenizers.autoencoder import LAYOUTS, file_shapes
from heptapod_fast.tokenizers.base import saved_as

logger = logging.getLogger(__name__)
SHOWN = 12  # names that an error lists before it only counts


@dataclass(frozen=True)
class Origin:
    """Where a tokenizer's weights come from.

    Attributes:
        title: what the weights are.
        source: where such a file is to be had.
        unused: pattern of names in the file that neither encoding nor decoding needs.
    """

    title: str
    source: str
    unused: str


ORIGINS = {
    # MAR loads with strict=False (mar:models/vae.py:463-471), so that the training loss of LDM
    # may be in the file.
    "kl16": Origin(
        "MAR's KL-16 VAE",
        "kl16.ckpt (254 MiB), which util/download.py of github.com/LTH14/mar fetches; mirror: "
        "huggingface.co/xwen99/mar-vae-kl16",
        r"loss\.",
    ),
    # A ring buffer for counting the codes in use (LlamaGen:vq_model.py, VectorQuantizer).
    "vq16": Origin(
        "LlamaGen's VQ-16 tokenizer",
        "vq_ds16_c2i.pt (275 MiB) of huggingface.co/FoundationVision/LlamaGen; see the README of "
        "github.com/FoundationVision/LlamaGen",
        r"quantize\.codebook_used$",
    ),
}

# The first name that fits says what a foreign file is.
_FOREIGN = (
    (r"diffloss\.|mask_token$", "it looks like a MAR model, whose VAE is a file of its own"),
    (r"tok_embeddings\.", "it looks like LlamaGen's GPT, whose tokenizer is a file of its own"),
    (
        r"(en|de)coder\.(down|up)_blocks\.",
        "its names are those of the diffusers library: take the original file",
    ),
    (
        r"decoder\.up\.\d\.attn\.",
        "with attention in the decoder it looks like LDM's kl-f16, which has other latents",
    ),
    (r"(backbone|head)\.", "it looks like a checkpoint of a training run"),
)


def hint(name: str) -> str:
    """What --tokenizer `name` needs and where it is to be had, for the end of an error."""
    origin = ORIGINS[name]
    return f"--tokenizer {name} needs --tokenizer-weights FILE with {origin.title}: {origin.source}"


def read_state(name: str, path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file, unchecked (`check` does that).

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, an empty, damaged or foreign file, or one that is no state dict.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file. {hint(name)}")
    if path.is_dir():
        raise ValueError(f"{path}: a folder, not a file. {hint(name)}")
    with open(path, "rb") as stream:
        start = stream.read(512)
    _refuse_no_weights(name, path, start)
    # safetensors: eight bytes with the length of a JSON header, then the header.
    state = _read_safetensors(name, path) if start[8:9] == b"{" else _read_torch(name, path)
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        ignored = sorted(str(key) for key in state if key != "model")
        if ignored:
            logger.info("%s: beside the weights there is %s; ignored", path, _few(ignored))
        state = state["model"]
    if not _is_state_dict(state):
        raise ValueError(
            f'{path}: expected a state dict, bare or under "model", found {_described(state)}. '
            f"{hint(name)}"
        )
    return state


def _is_state_dict(found: object) -> TypeGuard[dict[str, Tensor]]:
    """Names to tensors, and at least one of them."""
    if not isinstance(found, dict) or not found:
        return False
    return all(isinstance(key, str) and torch.is_tensor(part) for key, part in found.items())


def _described(found: object) -> str:
    """What a file holds that is no state dict, for an error."""
    if not isinstance(found, dict) or not found:
        return f"an empty or other object ({type(found).__name__})"
    names = _few([str(key) for key in found])
    inner = [str(key) for key, part in found.items() if _holds_tensors(part)]
    if inner:
        return f"{names} (tensors are under {_few(inner)}: save them alone)"
    return names


def _holds_tensors(found: object) -> bool:
    return isinstance(found, dict) and any(torch.is_tensor(part) for part in found.values())


def _refuse_no_weights(name: str, path: Path, start: bytes) -> None:
    """Files that downloads leave behind when they fail."""
    text = start.lstrip().lower()
    what = None
    if not start:
        what = "the file is empty"
    elif text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        what = "a web page, not weights: the download went wrong"
    elif text.startswith(b"version https://git-lfs"):
        what = "a Git LFS pointer, not weights: fetch the file itself (git lfs pull)"
    if what:
        raise ValueError(f"{path}: {what}. {hint(name)}")


def _read_safetensors(name: str, path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            stored, _ = saved_as(file.metadata() or {})
            if stored not in (None, name):
                raise ValueError(
                    f"{path}: expected {name}, found a saved {stored} tokenizer: "
                    f"use --tokenizer {stored}. {hint(name)}"
                )
            return {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"{path}: a damaged or truncated safetensors file of "
            f"{path.stat().st_size:,} bytes ({error}). {hint(name)}"
        ) from error


def _read_torch(name: str, path: Path) -> object:
    try:
        return read_numbers(path)
    except MemoryError:
        raise
    except Exception as error:  # unpickling garbage may raise anything
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            what = (
                f"holds a Python object ({code[1]}) that could run code, and is not read; if "
                "you trust the file, save its tensors alone with torch.save"
            )
        else:
            what = (
                f"not a PyTorch or safetensors file, or damaged or truncated "
                f"({path.stat().st_size:,} bytes, {type(error).__name__})"
            )
        raise ValueError(f"{path}: {what}. {hint(name)}") from error


def _few(names: list[str]) -> str:
    """How many names there are, and the first of them."""
    return f"{len(names)} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"


def check(
    name: str, state: dict[str, Tensor], where: str | Path | None = None
) -> dict[str, Tensor]:
    """The tensors of kl16's or vq16's architecture as finite float32.

    Tensors in other real formats are converted. Names in `ORIGINS[name].unused` are left out.

    Raises:
        ValueError: missing or unknown names, other shapes, or numbers that are not finite; lists
            the first ones, and says what the file is where that can be told.
    """
    shapes = file_shapes(name)
    missing = [key for key in shapes if key not in state]
    extra = [key for key in state if key not in shapes and not re.match(ORIGINS[name].unused, key)]
    other = [
        f"{key} {tuple(state[key].shape)} instead of {shape}"
        for key, shape in shapes.items()
        if key in state and tuple(state[key].shape) != shape
    ]
    parts = [
        f"{word} {_few(names)}"
        for word, names in (("missing", missing), ("unknown", extra), ("of another shape", other))
        if names
    ]
    if not parts:
        kept = {key: state[key] for key in shapes}
        strange = [
            f"{key} {value.dtype}"
            for key, value in kept.items()
            if value.layout is not torch.strided
            or value.is_meta
            or value.is_quantized
            or value.is_complex()
            or value.dtype is torch.bool
        ]
        tensors = {} if strange else {key: value.float() for key, value in kept.items()}
        broken = [key for key, value in tensors.items() if not value.isfinite().all()]
        if not strange and not broken:
            return tensors
        parts = [
            f"{word} {_few(names)}"
            for word, names in (("no plain numbers", strange), ("not finite", broken))
            if names
        ]
    label = name if where is None else str(where)
    raise ValueError(
        f"{label}: not usable as {ORIGINS[name].title}, which has {len(shapes)} "
        f"tensors; {'; '.join(parts)}{_likeness(name, state)}. {hint(name)}"
    )


def _likeness(name: str, state: dict[str, Tensor]) -> str:
    """What the file seems to be instead."""
    for other in LAYOUTS:
        if other != name and file_shapes(other).keys() <= state.keys():
            return f": these are the weights of --tokenizer {other}"
    expected = file_shapes(name)
    prefix = _common_prefix(state)
    if prefix and {key.removeprefix(prefix) for key in state} >= expected.keys():
        return f': the names begin with "{prefix}"; save the tensors without it'
    for pattern, what in _FOREIGN:
        if any(re.match(pattern, key) for key in state if key not in expected):
            return f": {what}"
    return ""


def _common_prefix(state: dict[str, Tensor]) -> str:
    """What stands before every name of a part of a tokenizer; empty if that is not one thing."""
    prefixes = {
        key[: key.index(part)] for key in state for part in ("encoder.", "quantize.") if part in key
    }
    return prefixes.pop() if len(prefixes) == 1 else ""


def digest(tensors: dict[str, Tensor]) -> str:
    """sha256 (64 hexadecimal digits) over names, shapes and float32 values: the same for every
    file format and order of names that the weights are kept in."""
    total = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        total.update(f"\n{key}/{tuple(value.shape)}\n".encode())
        total.update(value.detach().cpu().float().contiguous().numpy().data)
    return total.hexdigest()
