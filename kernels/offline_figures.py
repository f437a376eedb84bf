"""The figures of compiled kernels that are kept: bench/results/offline.json.

One line for each case, under a key made of everything that the figures depend on. A kernel that
changed, or another Triton, has other keys: nothing is found for it, and it is compiled.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from heptapod_fast.kernels.fingerprint import fingerprint

FILE = Path(__file__).resolve().parent.parent / "bench/results/offline.json"


def key(case, arch: str) -> str:
    """Architecture, name and Triton's version in words; the rest as a hash.

    The rest: options, types, constexprs, what is unaligned, and the source of the kernel. case: an
    `offline_case.Case`.
    """
    import triton

    rest = [
        case.options,
        case.types,
        case.constexprs,
        sorted(case.unaligned),
        fingerprint(case.kernel),
    ]
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return f"{arch}; {case.name}; triton {triton.__version__}; {digest[:16]}"


def read(path: Path) -> dict[str, dict]:
    """{key: figures}; empty if there is no such file."""
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, figures: dict[str, dict]) -> None:
    """One case a line, in the order given; the file is the old one or the new one at any time."""
    lines = [f"{json.dumps(name)}: {json.dumps(found)}" for name, found in figures.items()]
    # A name of its own, because several may write at the same time.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
