"""The tables of the papers: `python tools/ablate.py table1 --out runs/table1`.

What follows a `--` are flags of tools/train.py, for all rows:
`python tools/ablate.py figure8 --size B --data CACHE.zarr --images 4000000 -- --batch 512`.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from _ablations import ABLATIONS
from _cli import main, parse, tyro

from heptapod_fast.ablations import (
    Scale,
    make_plan,
    read_plan,
    run_plan,
    write_table,
)
from heptapod_fast.ablations.plan import Plan, write_plan
from heptapod_fast.evaluation import DEFAULT_METRICS
from heptapod_fast.progress import duration
from heptapod_fast.systems import configure
from heptapod_fast.world import choose_device

TOOLS = Path(__file__).resolve().parent
MINUTES = 5.0
SMALL = {"image_size": 32, "patch_size": 4}  # 8 x 8 tokens
OWN = ("images", "seed", "out")  # flags of tools/train.py that are decided here
SHARE_OF_TRAINING = 0.1  # that measuring takes on top, about


@dataclass(kw_only=True)
class Arguments:
    """Train what a table of the papers compares, measure it, and write the table: table.md,
    table.json and chart.png in --out. Given again, the command goes on where it was stopped. Flags
    of tools/train.py for all rows come last, behind a word of their own: -- --batch 256."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """Which table; --list describes them."""
    out: str | None = None
    """Folder of the table and its runs; default: runs/NAME."""
    size: str = "tiny"
    """Size of the systems."""
    data: str = "pairs"
    """What they are trained on, as --data of tools/train.py."""
    images: int | None = None
    """Images of a run of the first row; default: what it trains on in --minutes."""
    minutes: float | None = None
    """Minutes of a run of the first row, from which --images follows (default: 5)."""
    equal: Literal["images", "compute", "time"] = "compute"
    """What the rows have alike: images, or the FLOPs or the seconds of a whole run."""
    seeds: int = 1
    """Runs of each row."""
    count: int = 400
    """Samples of each run that are measured."""
    metrics: str | None = None
    """Metrics of tools/evaluate.py, separated by commas; default: those that fit --data, and the
    held-out loss."""
    at_once: int = 1
    """Runs at the same time on this machine."""
    launcher: str | None = None
    """What starts tools/train.py, as "torchrun --nproc_per_node=8"; default: this Python."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    dry_run: bool = False
    """Say what would run and how long it takes, and stop."""


def work() -> int:
    """Parse, plan, run, write."""
    own, of_training = divided(sys.argv[1:])
    arguments = parse(Arguments, own)
    if arguments.name not in ABLATIONS:
        known = "\n".join(f"    {name:14} {each.title}" for name, each in ABLATIONS.items())
        raise ValueError(f"no table is named {arguments.name}: choose one of\n{known}")
    check(arguments)
    out = Path(arguments.out or f"runs/{arguments.name}")
    ablation = ABLATIONS[arguments.name]
    print(f"{ablation.title}\n{ablation.about}", flush=True)
    plan = read_plan(out)
    if plan is None:
        plan = planned(arguments, of_training)
    else:
        refuse_another(plan, arguments, out)
        print(f"going on with {out}", flush=True)
    describe(plan, arguments)
    if arguments.dry_run:
        return 0
    write_plan(plan, out)
    launcher = tuple(shlex.split(arguments.launcher or ""))
    run_plan(plan, out, TOOLS, say, arguments.at_once, launcher)
    written = write_table(ablation, plan, out)
    print((out / "table.md").read_text())
    for path in written:
        print(f"written: {path}")
    return 0


def say(text: str) -> None:
    """A line, at once."""
    print(text, flush=True)


def check(arguments: Arguments) -> None:
    """ValueError for what cannot be."""
    if arguments.images is not None and arguments.minutes is not None:
        raise ValueError("--images beside --minutes: one follows from the other, give one")
    for flag, value in (
        ("--images", arguments.images),
        ("--minutes", arguments.minutes),
        ("--seeds", arguments.seeds),
        ("--count", arguments.count),
        ("--at-once", arguments.at_once),
    ):
        if value is not None and value <= 0:
            raise ValueError(f"{flag} {value}: expected more than 0")


def divided(words: list[str]) -> tuple[list[str], list[str]]:
    """The words before and behind a --."""
    if "--" not in words:
        return words, []
    place = words.index("--")
    return words[:place], words[place + 1 :]


def base_flags(arguments: Arguments, of_training: list[str]) -> dict[str, Any]:
    """Flags of tools/train.py that all rows have."""
    flags: dict[str, Any] = {"data": arguments.data}
    if arguments.size == "tiny":
        flags |= SMALL
    if arguments.device != "auto":
        flags["device"] = arguments.device
    flags |= typed_flags(of_training)
    taken = [name for name in OWN if name in flags]
    if taken:
        raise ValueError(
            f"-- --{taken[0]}: this is decided for each run, by --images, --seeds and --out"
        )
    return flags


def typed_flags(words: list[str]) -> dict[str, Any]:
    """--batch 256 --flip -> {"batch": 256, "flip": True}, values as configurations take them.

    Raises:
        ValueError: words that are no flags.
    """
    found: dict[str, Any] = {}
    left = list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"-- {word}: expected flags of tools/train.py, such as -- --batch 256")
        name = word.removeprefix("--").replace("-", "_")
        values = []
        while left and not left[0].startswith("--"):
            values.append(number(left.pop(0)))
        if not values:
            found[name.removeprefix("no_")] = not name.startswith("no_")
        else:
            found[name] = values[0] if len(values) == 1 else tuple(values)
    return found


def number(text: str) -> Any:
    """What a word stands for."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def planned(arguments: Arguments, of_training: list[str]) -> Plan:
    """A new plan."""
    flags = base_flags(arguments, of_training)
    ablation = ABLATIONS[arguments.name]
    first = configure(arguments.size, **ablation.flags, **flags)
    scale = Scale(arguments.size, first.spec.num_tokens, depth_of(first.model))
    minutes = arguments.minutes
    if minutes is None and arguments.images is None:
        minutes = MINUTES
    metrics = arguments.metrics
    if metrics is None:
        metrics = ",".join((DEFAULT_METRICS.get(arguments.data, "fid,is"), "loss"))
    return make_plan(
        arguments.name,
        ablation,
        scale,
        flags,
        images=arguments.images,
        minutes=minutes,
        seeds=tuple(range(arguments.seeds)),
        equal=arguments.equal,
        metrics=tuple(metrics.split(",")),
        count=arguments.count,
        command=shlex.join(["python", "tools/ablate.py", *sys.argv[1:]]),
        device=choose_device(arguments.device),
        say=say,
    )


def depth_of(model: Any) -> int:
    """Blocks of Heptapod's backbone at a size, which its head has too."""
    return int(model.depth)


def refuse_another(plan: Plan, arguments: Arguments, out: Path) -> None:
    """ValueError where a folder holds the plan of another command."""
    flags: Mapping[str, Any] = plan.rows[0].variant.flags
    differs = []
    for flag, before, now in (
        ("NAME", plan.name, arguments.name),
        ("--size", flags.get("size"), arguments.size),
        ("--data", flags.get("data"), arguments.data),
        ("--equal", plan.equal, arguments.equal),
        ("--count", plan.count, arguments.count),
        ("--images", plan.rows[0].images, arguments.images or plan.rows[0].images),
    ):
        if before != now:
            differs.append(f"{flag} {before}, now {now}")
    if arguments.seeds != len(plan.seeds):
        differs.append(f"--seeds {len(plan.seeds)}, now {arguments.seeds}")
    if differs:
        raise ValueError(
            f"{out} was begun with {'; '.join(differs)}: give the command that began it, or "
            "another --out"
        )


def describe(plan: Plan, arguments: Arguments) -> None:
    """What will run, and how long."""
    for row in plan.trained:
        say(
            f"{row.variant.name:24} {row.images:>12,} images, about "
            f"{duration(row.total_seconds)} a run"
        )
    runs = len(plan.trained) * len(plan.seeds)
    total = plan.total_seconds * (1 + SHARE_OF_TRAINING)
    say(
        f"{runs} runs, about {duration(total)} one after the other, with measuring; all rows have "
        f"equal {plan.equal}"
    )


if __name__ == "__main__":
    main(work)
