"""Markdown tables, and numbers as a reader wants them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Sequence[int] = ()) -> str:
    """A Markdown table. numbers: columns that are set flush right."""
    rules = ["---:" if column in numbers else "---" for column in range(len(head))]
    lines = [_row(head), "|" + "|".join(rules) + "|"]
    lines += [_row([show(value) for value in row]) for row in rows]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def properties(values: Mapping[str, Any], leave_out: Sequence[str] = ()) -> str:
    """A table of two columns: a name and its value. What is None is left out."""
    rows = []
    for name, value in values.items():
        if name in leave_out or value is None:
            continue
        if isinstance(value, list | tuple) and not name.endswith("range"):
            value = " ".join(show(part) for part in value)  # several numbers, as they are typed
        rows.append((name.replace("_", " "), value))
    return table(["", ""], rows)


def show(value: Any) -> str:
    """A number with four digits that count, thousands set apart; a list as a range, a dictionary
    as names and values."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {show(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return " to ".join(show(part) for part in value)
    if isinstance(value, float):
        rounded = float(f"{value:.4g}")
        is_large = abs(rounded) >= 10_000  # where the format would turn to powers of ten
        return f"{rounded:,.0f}" if is_large else f"{rounded:,.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def share(value: float) -> str:
    """A share as a percentage."""
    return f"{value:.1%}"
