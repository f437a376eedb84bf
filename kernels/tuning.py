"""Configurations of the kernels: committed tables, nothing is tuned while a run waits.

    configs/OPERATION.json    {"sm_90": {kernel: {bucket: {"num_warps": 4, ...}}}, "tuned": {...}}

A bucket is the largest size (width, columns, ...) that its configuration is for; a size above the
last bucket is refused. `python bench/tune.py` measures the tables anew on a GPU and writes into
"tuned" on which; null there means that the configuration was chosen from what the compiler says
(registers, spills, occupancy) alone. A GPU without a table of its own takes the nearest older one.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

FOLDER = Path(__file__).with_name("configs")
NEWEST = "sm_90"


@functools.cache
def table(operation: str) -> dict:
    """The committed table of one operation."""
    return json.loads((FOLDER / f"{operation}.json").read_text())


def architectures(operation: str) -> list[int]:
    """Compute capabilities (90 for sm_90) that have a table, in rising order."""
    return sorted(int(name[3:]) for name in table(operation) if name.startswith("sm_"))


@functools.cache
def nearest(operation: str, capability: int) -> str:
    """The table for a compute capability; RuntimeError if it is older than all of them."""
    fitting = [known for known in architectures(operation) if known <= capability]
    if not fitting:
        raise RuntimeError(
            f"{operation}: the kernels need compute capability "
            f"{architectures(operation)[0] / 10} or newer, this GPU has {capability / 10}; "
            f"use --kernels reference"
        )
    return f"sm_{fitting[-1]}"


def buckets(operation: str, kernel: str, arch: str = NEWEST) -> dict[int, dict[str, int]]:
    """{largest size: configuration} of one kernel, in rising order. arch: "sm_80", "sm_100"..."""
    rows = table(operation)[nearest(operation, int(arch[3:]))][kernel]
    return {int(k): rows[k] for k in sorted(rows, key=int)}


def bucket(operation: str, kernel: str, size: int, arch: str) -> int:
    """The smallest bucket that holds a size; ValueError above the last one."""
    rows = buckets(operation, kernel, arch)
    fitting = [most for most in rows if size <= most]
    if not fitting:
        raise ValueError(
            f"{operation}: size {size} is above {max(rows)}, the last one in "
            f"kernels/configs/{operation}.json"
        )
    return fitting[0]


def config(operation: str, kernel: str, size: int, arch: str) -> dict[str, int]:
    """The configuration for a size on an architecture, "sm_80" and the like: a copy."""
    rows = buckets(operation, kernel, arch)
    return dict(rows[bucket(operation, kernel, size, arch)])


def row(operation: str, kernel: str, arch: str, bucket: int) -> dict[str, int]:
    """One configuration, the object itself: bench/tune.py changes it in place."""
    return table(operation)[arch][kernel][str(bucket)]


_used: set[tuple[str, str, str, int]] | None = None


@contextmanager
def recording() -> Iterator[set[tuple[str, str, str, int]]]:
    """Collects the (operation, kernel, architecture, bucket) of every lookup in this context."""
    global _used
    lookup.cache_clear()
    _used = set()
    try:
        yield _used
    finally:
        _used = None
        lookup.cache_clear()


@functools.cache
def lookup(operation: str, kernel: str, size: int, device: torch.device) -> dict[str, int]:
    """The configuration for a size; ValueError above the last bucket. On a CPU: sm_90's."""
    arch = NEWEST
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        arch = nearest(operation, 10 * major + minor)
    most = bucket(operation, kernel, size, arch)
    if _used is not None:
        _used.add((operation, kernel, arch, most))
    return row(operation, kernel, arch, most)


@functools.cache
def largest(operation: str, kernel: str) -> int:
    """The largest size that the newest table has a configuration for."""
    return max(buckets(operation, kernel))
