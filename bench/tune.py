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
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import harness  # noqa: E402
from bench.gpu_sections import OPERATIONS  # noqa: E402

GAIN = 0.98  # a change must save 2%, or noise would walk through the table


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description="Tune the kernels' configurations.")
    parser.add_argument("--operations", nargs="+", default=list(OPERATIONS), choices=OPERATIONS)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("bench/tune.py measures on a CUDA device and finds none")
    from heptapod_fast.kernels import tuning

    deadline = time.monotonic() + 60 * options.minutes
    for operation in options.operations:
        for changed in sorted(tune(operation, deadline)):
            path = (options.out or tuning.FOLDER) / f"{changed}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(render(tuning.table(changed) | {"tuned": about(torch)}))
            print(f"written: {path}", flush=True)


def tune(operation: str, deadline: float) -> set[str]:
    """Improve every configuration that the cases of one operation use; names of changed tables."""
    from heptapod_fast.kernels import tuning

    module = importlib.import_module(f"bench.bench_{operation}")
    users: dict[tuple, list] = {}
    for case in module.cases("cuda"):
        if time.monotonic() > deadline:
            break
        with tuning.recording() as used:
            if time_of(case) is not None:
                for key in used:
                    users.setdefault(key, []).append(case)
    changed = set()
    for key, cases in users.items():
        if time.monotonic() < deadline:
            improve(key, cases, deadline, getattr(module, "tunable", lambda kernel, config: True))
            changed.add(key[0])
    return changed


def improve(
    key: tuple, cases: list, deadline: float, tunable: Callable[[str, dict[str, int]], bool]
) -> None:
    """Descent on one configuration, in place in the loaded table, one move at a time."""
    from heptapod_fast.kernels import tuning

    config = tuning.row(*key)
    best = before = total(cases)
    if best is None:
        return
    for move in moves(config):
        while time.monotonic() < deadline:
            old, new = dict(config), changed_by(move, config)
            if new is None or not tunable(key[1], new):
                break
            config.update(new)
            tuning.lookup.cache_clear()
            seconds = total(cases)
            if seconds is None or seconds > GAIN * best:
                config.update(old)
                tuning.lookup.cache_clear()
                break
            best = seconds
    print(
        f"{'/'.join(map(str, key))}: {config}, {before * 1e6:.1f} -> {best * 1e6:.1f} us",
        flush=True,
    )


def moves(config: dict[str, int]) -> list[dict[str, float]]:
    """{name: factor}, of STAGES what is added."""
    found = []
    for name in (name for name, value in config.items() if not isinstance(value, bool)):
        for up in (True, False):
            factor = 2 if up else 0.5
            found.append({name: 1 if up else -1} if name == "STAGES" else {name: factor})
            if name in ("BLOCK_Q", "BLOCK_K"):
                found.append({name: factor, "num_warps": factor})
    return found


def changed_by(move: dict[str, float], config: dict[str, int]) -> dict[str, int] | None:
    """The configuration after a move; None if nothing launches with it."""
    new = dict(config)
    for name, step in move.items():
        new[name] = int(config[name] + step if name == "STAGES" else config[name] * step)
    if min(new[name] for name in move) < 1 or new.get("num_warps", 1) > 32:
        return None
    return new


def total(cases: list) -> float | None:
    """Seconds of all cases together; None if one of them fails."""
    times = [time_of(case) for case in cases]
    return None if None in times else sum(times)


def time_of(case) -> float | None:
    """Seconds of our contender in a case; None if it fails (shared memory, registers, ...)."""
    ours = harness.Case(
        case.operation,
        case.name,
        case.inputs,
        {"ours": case.contenders["ours"]},
        case.bytes,
        case.flops,
    )
    try:
        return harness.measure(ours, rounds=7)[0].seconds
    except harness.CaptureFailed:
        raise SystemExit(
            f"{case.name}: a launch failed inside a CUDA graph; tables written so far "
            "hold, start again with the operations after it"
        ) from None


def about(torch) -> dict:
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
    lines = [f' "tuned": {json.dumps(table["tuned"])}']
    for arch in sorted(k for k in table if k != "tuned"):
        kernels = [
            f"  {json.dumps(kernel)}: {{\n"
            + ",\n".join(
                f"   {json.dumps(size)}: {json.dumps(config)}" for size, config in rows.items()
            )
            + "\n  }"
            for kernel, rows in table[arch].items()
        ]
        lines.append(f" {json.dumps(arch)}: {{\n" + ",\n".join(kernels) + "\n }")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    main()
