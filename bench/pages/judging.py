"""A measured case against its peers, its floor and its gates."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from bench.figures import OURS
from bench.roofline import Ceilings

Row = dict[str, Any]
BEST = "best peer"
VERDICTS = {True: "met", False: "missed", None: "unknown"}
HEAD = "| case | ours us | share of floor | best peer | its us | ratio | as launched | gate | aim |"
RULE = "|---|---:|---:|---|---:|---:|---:|---|---|"


@dataclass(frozen=True)
class Judged:
    """What a row says. None where it cannot be said.

    seconds: of ours. ratios: {a peer, or BEST: its time over ours}. share: of the floor in our
    time. copy: our bandwidth over that of a copy. launched: the ratio to the best peer of calls as
    eager mode launches them. gate, aim: whether they are met.
    """

    seconds: float | None = None
    peer: str | None = None
    peer_seconds: float | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    share: float | None = None
    copy: float | None = None
    launched: float | None = None
    gate: bool | None = None
    aim: bool | None = None


def judged(row: Row, ceilings: Ceilings) -> Judged:
    """Ours against the floor and the best peer."""
    seconds = row["contenders"].get(OURS, {}).get("seconds")
    peers = {name: c for name, c in row["contenders"].items() if name != OURS}
    times = {name: c["seconds"] for name, c in peers.items() if c["seconds"]}
    best = min(times, key=times.__getitem__) if times else None
    if not seconds:
        return Judged(peer=best, peer_seconds=times.get(best))
    ratios = {name: each / seconds for name, each in times.items()}
    if best is not None:
        ratios[BEST] = ratios[best]
    floor = ceilings.floor(row["bytes"], row["flops"])
    copy = row["bytes"] / seconds / ceilings.copy if ceilings.copy else None
    # A peer that broke might have been the best one: then only that a gate is missed is known.
    is_open = any(c["why"] and not c.get("missing") for c in peers.values())
    return Judged(
        seconds=seconds,
        peer=best,
        peer_seconds=times.get(best),
        ratios=ratios,
        share=floor / seconds if floor else None,
        copy=copy,
        launched=launched_ratio(row, best),
        gate=verdict(row.get("gate", ""), ratios, copy, is_open),
        aim=verdict(row.get("aim", ""), ratios, copy, is_open),
    )


def launched_ratio(row: Row, peer: str | None) -> float | None:
    """The best peer's time over ours, of single calls with the host's work."""
    ours = row["contenders"][OURS].get("launched")
    theirs = row["contenders"].get(peer, {}).get("launched")
    return theirs / ours if ours and theirs else None


def verdict(
    wanted: str, ratios: dict[str, float], copy: float | None, is_open: bool
) -> bool | None:
    """Whether a goal is met. is_open: a peer that should have run broke."""
    found = meets(wanted, ratios, copy)
    if found and is_open and BEST in wanted:
        return None
    return found


def meets(wanted: str, ratios: dict[str, float], copy: float | None) -> bool | None:
    """Whether "1.15x best peer", "2x flex" and "75% of copy bandwidth", all that are in a goal, are
    reached."""
    answers: list[bool | None] = []
    for number, unit, peer in re.findall(r"([\d.]+)\s*(x|%) (best peer|[\w-]+)", wanted):
        least = float(number) if unit == "x" else float(number) / 100
        found = ratios.get(peer) if unit == "x" else copy
        answers.append(None if found is None else found >= least)
    if not answers or None in answers:
        return None
    return all(answers)


def standing(found: Judged, gate: str) -> str:
    """Where a case stands in the terms of its gate."""
    said = [
        f"{times:.2f}x {name}"
        for name, times in found.ratios.items()
        if name != BEST and f"x {name}" in gate
    ]
    if not said:
        said = [f"{found.ratios[BEST]:.2f}x the best peer, {found.peer}"]
    if "%" in gate and found.copy:
        said.append(f"{found.copy:.0%} of copy bandwidth")
    return ", ".join(said)


# -------------------------------------------------------------------------------- as Markdown


def operation_table(rows: list[Row], ceilings: Ceilings) -> list[str]:
    """A line for every case, and the peers that did not run."""
    return [HEAD, RULE, *(operation_line(row, ceilings) for row in rows), *absent_peers(rows)]


def operation_line(row: Row, ceilings: Ceilings) -> str:
    """One case of an operation."""
    found = judged(row, ceilings)
    if not found.seconds:
        why = row["contenders"].get(OURS, {}).get("why") or "no contender of ours"
        return f"| {row['case']} | failed: {why.splitlines()[0][:120]} | | | | | | | |"
    cells = [row["case"], f"{found.seconds * 1e6:.1f}", percent(found.share)]
    if found.peer is None:
        cells += ["", "", ""]
    else:
        cells += [found.peer, f"{found.peer_seconds * 1e6:.1f}", f"{found.ratios[BEST]:.2f}"]
    cells.append(f"{found.launched:.2f}" if found.launched else "")
    cells += [goal(row.get("gate", ""), found.gate), goal(row.get("aim", ""), found.aim)]
    return "| " + " | ".join(cells) + " |"


def percent(share: float | None) -> str:
    """Empty where it is not known."""
    return f"{share:.0%}" if share else ""


def goal(wanted: str, is_met: bool | None) -> str:
    """A gate or an aim and its verdict."""
    return f"{wanted}: {VERDICTS[is_met]}" if wanted else ""


def absent_peers(rows: list[Row]) -> list[str]:
    """Peers that did not run, and why: not installed, refused the shape, broke."""
    cases: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, contender in row["contenders"].items():
            if contender["why"] and name != OURS:
                cases.setdefault((name, why_absent(contender)), []).append(row["case"])
    if not cases:
        return []
    lines = ["", "Peers that did not run:", ""]
    for (name, why), found in cases.items():
        where = found[0] if len(found) == 1 else f"{len(found)} cases"
        lines.append(f"- {name}: {why} ({where})")
    return lines


def why_absent(contender: Row) -> str:
    """One line."""
    fault = "" if contender.get("missing") else "FAILED, "
    return f"{fault}{contender['why']}".replace("\n", " ")[:300]
