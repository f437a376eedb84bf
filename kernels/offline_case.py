"""One kernel in one configuration, to be compiled without a GPU (offline.py)."""

from __future__ import annotations

from dataclasses import dataclass, field

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration, as the launcher would call it.

    types: argument -> "*bf16", "i32", "fp32"...; arguments that are None at the launch belong into
    constexprs. unaligned: pointers and integers that are not divisible by 16. tensor_cores: whether
    matrix instructions must appear, on sm_90 HGMMA and no more than `hmma` of the older HMMA.
    spill: bytes of stack that are accepted, with the reason in `why`. ctas: how many programs must
    fit on an SM of sm_90 at once.
    """

    name: str
    kernel: object
    types: dict[str, str]
    constexprs: dict
    options: dict[str, int]
    unaligned: tuple[str, ...] = ()
    tensor_cores: bool = False
    spill: int = 0
    why: str = ""
    hmma: int = 0
    ctas: int = 1
    only: tuple[str, ...] = field(default=ARCHITECTURES)
