"""The tables of the papers: `python tools/ablate.py table1 --out runs/table1`.

What follows a `--` are flags of tools/train.py, for all rows:
`python tools/ablate.py figure8 --images 100000 -- --batch 32`.
"""

from __future__ import annotations

import datetime
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from _ablations import ABLATIONS
from _cli import main, parse, tyro

from heptapod_fast.ablations import Ablation, Scale, make_rows, read_plan, run_plan, write_table
from heptapod_fast.ablations.plan import Plan, write_plan
from heptapod_fast.config import DataSettings, flag
from heptapod_fast.config.settings import type_hints
from heptapod_fast.data.embedded import EMBEDDED_SETS
from heptapod_fast.evaluation import DEFAULT_METRICS, METRICS
from heptapod_fast.progress import duration
from heptapod_fast.systems import configure
from heptapod_fast.world import choose_device

TOOLS = Path(__file__).resolve().parent
MINUTES = 5.0
SMALL = {"image_size": 32, "patch_size": 4}  # 8 x 8 tokens
# Flags of tools/train.py that are said in another place.
OWN = ("images", "seed", "out", "data", "size", "device")
TAKE_SEVERAL = ("ema", "patches", "shares")  # settings of several values, of which one may be given
OF_FEATURES = ("fid", "sfid", "kid", "is", "precision", "recall", "rfid")
SHARE_OF_TRAINING = 0.1  # that measuring takes on top, about, each time


@dataclass(kw_only=True)
class Arguments:
    """Train what a table of the papers compares, measure it, and write the table: table.md,
    table.json and chart.png in --out. Given again, the command goes on where it was stopped. Flags
    of tools/train.py for all rows come last, behind a word of their own: -- --batch 256."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """Which table; another word shows all names."""
    out: str | None = None
    """Folder of the table and its runs; default: runs/NAME."""
    size: str = "tiny"
    """Size of the systems."""
    data: str = "pairs"
    """What they are trained on, as --data of tools/train.py."""
    data_of_vectors: str | None = None
    """What rows of vectors are trained on, where --data has codes (figure6 of caches)."""
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
    """Metrics of tools/evaluate.py, separated by commas; default: those that fit --data, and of
    embedded data the held-out loss."""
    points: int | None = None
    """Measurements of each run, evenly over its images, the last at its end: with more than one the
    chart shows curves; default: 4 for what the papers show as curves, else 1."""
    extractor: Literal["inception", "small"] | None = None
    """As of tools/evaluate.py, for fid and its relatives."""
    inception: str | None = None
    """As of tools/evaluate.py."""
    reference: str | None = None
    """As of tools/evaluate.py."""
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
        refuse_another(plan, arguments, of_training, out)
        print(f"going on with {out}", flush=True)
    describe(plan, arguments)
    if arguments.dry_run:
        return 0
    write_plan(plan, out)
    launcher = tuple(shlex.split(arguments.launcher or ""))

    def write() -> None:
        write_table(ablation, plan, out)

    run_plan(plan, out, TOOLS, say, arguments.at_once, launcher, after_each=write)
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
    for name, value in (
        ("--images", arguments.images),
        ("--minutes", arguments.minutes),
        ("--seeds", arguments.seeds),
        ("--count", arguments.count),
        ("--points", arguments.points),
        ("--at-once", arguments.at_once),
    ):
        if value is not None and value <= 0:
            raise ValueError(f"{name} {value}: expected more than 0")
    if arguments.at_once > 1 and arguments.launcher is not None:
        raise ValueError(
            f"--at-once {arguments.at_once} beside --launcher: runs of a launcher have all GPUs, "
            "one after the other; leave out one of the two"
        )
    if arguments.extractor == "small" and arguments.inception is not None:
        raise ValueError("--extractor small beside --inception: give one of them")


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
    typed = typed_flags(of_training)
    taken = [name for name in OWN if name in typed]
    if taken:
        raise ValueError(
            f"-- --{taken[0]}: this is said before the --, by --images, --seeds, --out, --data, "
            "--size and --device"
        )
    return flags | typed


def typed_flags(words: list[str]) -> dict[str, Any]:
    """--batch 256 --flip -> {"batch": 256, "flip": True}, values as configurations take them.

    Raises:
        ValueError: words that are no flags.
    """
    found: dict[str, Any] = {}
    left = [part for word in words for part in parts_of(word)]
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
        elif len(values) > 1 or name in TAKE_SEVERAL:
            found[name] = tuple(values)
        else:
            found[name] = values[0]
    return found


def parts_of(word: str) -> list[str]:
    """--batch=256 -> --batch, 256."""
    return word.split("=", 1) if word.startswith("--") else [word]


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
    ablation = ABLATIONS[arguments.name]
    flags = base_flags(arguments, of_training)
    scale = scale_of(arguments, {**ablation.flags, **flags})
    points = arguments.points or ablation.points
    refuse_points(points, ablation, scale)
    metrics = metrics_of(arguments)
    minutes = arguments.minutes
    if minutes is None and arguments.images is None:
        minutes = MINUTES
    rows = make_rows(
        ablation,
        scale,
        flags,
        images=arguments.images,
        minutes=minutes,
        equal=arguments.equal,
        device=choose_device(arguments.device),
        say=say,
    )
    return Plan(
        name=arguments.name,
        rows=rows,
        seeds=tuple(range(arguments.seeds)),
        equal=arguments.equal,
        metrics=metrics,
        count=arguments.count,
        points=points,
        evaluation=evaluation_flags(arguments),
        asked=asked_for(arguments, of_training),
        command=shlex.join(["python", "tools/ablate.py", *sys.argv[1:]]),
        begun=datetime.date.today().isoformat(),
    )


def scale_of(arguments: Arguments, flags: Mapping[str, Any]) -> Scale:
    """Tokens of an image, what they are made of, and Heptapod's depth at a size."""
    of_data = [name for name in flags if name in type_hints(DataSettings)]
    config = configure(arguments.size, **{name: flags[name] for name in of_data})
    model: Any = config.model
    return Scale(
        arguments.size,
        tokens=config.spec.num_tokens,
        depth=int(flags.get("depth", model.depth)),
        has_patches="patch" in str(config.data.tokenizer),
        data_of_vectors=arguments.data_of_vectors,
    )


def refuse_points(points: int, ablation: Ablation, scale: Scale) -> None:
    """ValueError for curves of one run that is sampled in several ways."""
    if points > 1 and any(variant.of is not None for variant in ablation.variants(scale)):
        raise ValueError(
            f"--points {points}: rows of this table are one run, sampled in several ways when it "
            "is done; leave --points out"
        )


def metrics_of(arguments: Arguments) -> tuple[str, ...]:
    """Of --metrics, or those that the data allows.

    Raises:
        ValueError: they need what was not given.
    """
    asked = arguments.metrics
    if asked is None:
        asked = DEFAULT_METRICS.get(arguments.data, "fid,is")
        if arguments.data in EMBEDDED_SETS:  # of which there are always images that no run has seen
            asked += ",loss"
    names = tuple(asked.split(","))
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(
            f"--metrics {','.join(unknown)}: choose among {', '.join(sorted(METRICS))}"
        )
    of_features = [name for name in names if name in OF_FEATURES]
    if of_features and arguments.inception is None and arguments.extractor != "small":
        raise ValueError(
            f"--metrics {','.join(of_features)}: needs --inception FILE, or --extractor small"
        )
    return names


def evaluation_flags(arguments: Arguments) -> dict[str, Any]:
    """What tools/evaluate.py is given besides."""
    names = ("extractor", "inception", "reference")
    found = {name: getattr(arguments, name) for name in names}
    if arguments.device != "auto":
        found["device"] = arguments.device
    return {name: value for name, value in found.items() if value is not None}


def asked_for(arguments: Arguments, of_training: list[str]) -> dict[str, Any]:
    """What decides a plan, by the flags that say it."""
    free = ("out", "at_once", "launcher", "dry_run")
    found = {flag(name): value for name, value in asdict(arguments).items() if name not in free}
    found["NAME"] = found.pop("--name")
    return {**found, "--": " ".join(of_training)}


def refuse_another(plan: Plan, arguments: Arguments, of_training: list[str], out: Path) -> None:
    """ValueError where a folder holds the plan of another command."""
    now = asked_for(arguments, of_training)
    differs = [
        f"{name} {plan.asked.get(name)}, now {value}"
        for name, value in now.items()
        if plan.asked.get(name) != value
    ]
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
    total = plan.total_seconds * (1 + SHARE_OF_TRAINING * plan.points)
    say(
        f"{runs} runs, about {duration(total)} one after the other, with measuring; all rows have "
        f"equal {plan.equal}"
    )


if __name__ == "__main__":
    main(work)
