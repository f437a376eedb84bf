"""Measures the configurations of the kernels on this GPU and writes kernels/configs/*.json anew.

    python bench/tune.py [--operations layer_norm adaln ...] [--minutes 9] [--out FOLDER]

For every operation the cases of its benchmark say which configurations they use; each number of a
configuration is halved and doubled (stages: one more, one less), tiles also together with the
number of warps, as long as that shortens the time of the cases that use it. A benchmark may have
tunable(kernel, config), which says whether a kernel is right with a configuration. Only the table
of this GPU's architecture changes, and "tuned" says where and when. Without --out the committed
tables are replaced.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench import timer
from bench.case import Case
from bench.measuring import DeviceLost, check_device
from bench.sections import OPERATIONS
from heptapod_fast.kernels import tuning

GAIN = 0.98  # a change must save 2%, or noise would walk through the table
ROUNDS = 9
MOST_WARPS = 32

Config = dict[str, int]
Tunable = Callable[[str, Config], bool]


def main() -> None:
    """See the module's docstring."""
    options = parse()
    if not torch.cuda.is_available():
        raise SystemExit("bench/tune.py measures on a CUDA device and finds none")
    deadline = time.monotonic() + 60 * options.minutes
    for operation in options.operations:
        try:
            changed = tune(operation, deadline)
        except DeviceLost as error:
            raise SystemExit(
                f"{operation}: {error}. Tables written so far hold; start again with --operations "
                "and those after it"
            ) from error
        write_tables(changed, options.out)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--operations", nargs="+", default=OPERATIONS, choices=OPERATIONS)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, default=tuning.FOLDER, metavar="FOLDER")
    return parser.parse_args()


# --------------------------------------------------------------------------------------- searching


def tune(operation: str, deadline: float) -> set[str]:
    """Improve every configuration that the cases of one operation use; names of changed tables."""
    module = importlib.import_module(f"bench.bench_{operation}")
    tunable = getattr(module, "tunable", anything_goes)
    changed = set()
    for key, cases in users_of(module.cases("cuda"), deadline).items():
        if time.monotonic() > deadline:
            break
        improve(key, cases, deadline, tunable)
        changed.add(key[0])
    return changed


def anything_goes(kernel: str, config: Config) -> bool:
    """Of benchmarks that have no `tunable`."""
    return True


def users_of(cases: list[Case], deadline: float) -> dict[tuple, list[Case]]:
    """{(operation, kernel, architecture, bucket): the cases that look it up}"""
    users: dict[tuple, list[Case]] = {}
    for case in cases:
        if time.monotonic() > deadline:
            break
        with tuning.recording() as used:
            seconds = time_of(case)
        if seconds is not None:
            for key in used:
                users.setdefault(key, []).append(case)
    return users


def improve(key: tuple, cases: list[Case], deadline: float, tunable: Tunable) -> None:
    """Descent on one configuration, in place in the loaded table, one move at a time."""
    config = tuning.row(*key)
    before = total(cases)
    if before is None:
        return
    best = before
    for move in moves(config):
        while time.monotonic() < deadline:
            new = changed_by(move, config)
            if new is None or not tunable(key[1], new):
                break
            seconds = total_with(new, config, cases)
            if seconds is None or seconds > GAIN * best:
                break
            config.update(new)
            best = seconds
    tuning.lookup.cache_clear()
    name = "/".join(map(str, key))
    print(f"{name}: {config}, {before * 1e6:.1f} -> {best * 1e6:.1f} us", flush=True)


def moves(config: Config) -> list[dict[str, float]]:
    """{name: factor}, of STAGES what is added."""
    found = []
    names = [name for name, value in config.items() if not isinstance(value, bool)]
    for name in names:
        for factor, stages in ((2, 1), (0.5, -1)):
            found.append({name: stages if name == "STAGES" else factor})
            if name in ("BLOCK_Q", "BLOCK_K"):
                found.append({name: factor, "num_warps": factor})
    return found


def changed_by(move: dict[str, float], config: Config) -> Config | None:
    """The configuration after a move; None if nothing launches with it."""
    new = dict(config)
    for name, step in move.items():
        value = config[name] + step if name == "STAGES" else config[name] * step
        new[name] = int(value)
    if min(new[name] for name in move) < 1 or new.get("num_warps", 1) > MOST_WARPS:
        return None
    return new


# --------------------------------------------------------------------------------------- measuring


def total_with(new: Config, config: Config, cases: list[Case]) -> float | None:
    """`total` with another configuration in the table, which is put back."""
    old = dict(config)
    config.update(new)
    tuning.lookup.cache_clear()
    try:
        return total(cases)
    finally:
        config.update(old)
        tuning.lookup.cache_clear()


def total(cases: list[Case]) -> float | None:
    """Seconds of all cases together; None if one of them fails."""
    times = [time_of(case) for case in cases]
    return None if None in times else sum(times)


def time_of(case: Case) -> float | None:
    """Seconds of our contender in a case; None if it fails (shared memory, registers, ...)."""
    try:
        ready = timer.watch(case.contenders["ours"](case.inputs()), "cuda")
    except Exception as error:
        check_device("cuda", error)
        return None
    return timer.in_turns({"ours": ready}, ROUNDS)["ours"].median


# ----------------------------------------------------------------------------------------- writing


def write_tables(changed: set[str], folder: Path) -> None:
    """The tables that tuning has changed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in sorted(changed):
        path = folder / f"{name}.json"
        path.write_text(render(tuning.table(name) | {"tuned": about()}))
        print(f"written: {path}", flush=True)


def about() -> dict[str, str]:
    """Where the table comes from."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def render(table: dict) -> str:
    """JSON with one configuration a line."""
    parts = [f' "tuned": {json.dumps(table["tuned"])}']
    for arch in sorted(table.keys() - {"tuned"}):
        kernels = [render_kernel(name, rows) for name, rows in table[arch].items()]
        joined = ",\n".join(kernels)
        parts.append(f" {json.dumps(arch)}: {{\n{joined}\n }}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def render_kernel(name: str, rows: dict[str, Config]) -> str:
    """The configurations of a kernel."""
    lines = [f"   {json.dumps(size)}: {json.dumps(config)}" for size, config in rows.items()]
    joined = ",\n".join(lines)
    return f"  {json.dumps(name)}: {{\n{joined}\n  }}"


if __name__ == "__main__":
    main()
