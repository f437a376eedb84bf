"""Operations against their peers: the cases of a bench file."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass

from bench.case import Case
from bench.pages.judging import operation_table
from bench.roofline import Ceilings
from bench.sections.work import Row, Work

FIRST, LARGER, SLOW = "size B", "sizes L and H", "torch.compile at size B"
SUFFIX = {FIRST: "", LARGER: "-LH", SLOW: "-compiled"}
IS_LARGER = re.compile(r"\b[LH],")


@dataclass(frozen=True)
class Operation:
    """Some cases of bench/bench_NAME.py.

    which: FIRST, LARGER, or SLOW (cases that take minutes to compile). beside: bench files that it
    shares code with.
    """

    operation: str
    which: str = FIRST
    beside: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """op-adaln, op-adaln-LH, op-adamw_ema-compiled."""
        return f"op-{self.operation}{SUFFIX[self.which]}"

    @property
    def about(self) -> str:
        """One line."""
        return f"{self.operation} against its peers, {self.which}."

    @property
    def code(self) -> tuple[str, ...]:
        """See Section.code."""
        return tuple(f"bench/bench_{name}.py" for name in (self.operation, *self.beside))

    def cases(self) -> list[Case]:
        """As on a GPU; makes no tensors."""
        return [case for case in cases_of(self.operation) if kind_of(case) == self.which]

    def measure(self, work: Work) -> None:
        """See Section.measure."""
        for case in self.cases():
            work.measure(case)

    def table(self, rows: list[Row], ceilings: Ceilings) -> list[str]:
        """See Section.table."""
        return operation_table(rows, ceilings)


def cases_of(operation: str, device: str = "cuda") -> list[Case]:
    """All cases of a bench file."""
    return importlib.import_module(f"bench.bench_{operation}").cases(device)


def kind_of(case: Case) -> str:
    """FIRST, LARGER or SLOW."""
    if case.name.startswith("compiled peer"):
        return SLOW
    return LARGER if IS_LARGER.search(case.name) else FIRST
