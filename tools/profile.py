"""Where a training step spends its time: `python tools/profile.py --size tiny`.

`--op layer_norm` runs the benchmark's cases of one operation instead (bench/bench_NAME.py). Writes
a Chrome trace and a Markdown table with torch.profiler. Under nsys (`nsys profile -c
cudaProfilerApi python tools/profile.py ...`) it marks the steps with NVTX ranges instead.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _cli import main
from _training import parse_training

from heptapod_fast.config import Config

# The parts of a step, by the names under which train/loop.py and train/step.py record them.
PHASES = ("data", "forward", "backward", "optimizer")
# The costliest operators: rows in profile.md, and in what is printed.
OPERATORS_WRITTEN = 25
OPERATORS_PRINTED = 5


@dataclass(kw_only=True)
class Arguments:
    """Profile training steps; takes every flag of tools/train.py."""

    profile_steps: int = 10
    """Steps that are measured, after as many unmeasured ones."""
    op: str | None = None
    """Profile one operation at the shapes of its benchmark, not training steps."""
    profile_out: str = "profile"
    """Folder for trace.json and profile.md."""


def work() -> int:
    """Build the run without resuming anything, warm up, measure."""
    arguments, config = parse_training(Arguments)
    if arguments.profile_steps < 1:
        raise ValueError(f"--profile-steps {arguments.profile_steps}: expected at least 1")
    out = Path(arguments.profile_out)
    if arguments.op is not None:
        return profile_operation(arguments.op, config.run.device, arguments.profile_steps, out)
    if config.data.data is None and config.model.size(config.size).data.data is None:
        config = config.replace(data="synthetic")
    config = config.resolve()

    from heptapod_fast import world as worlds
    from heptapod_fast.train.loop import training_step
    from heptapod_fast.train.session import prepare

    with tempfile.TemporaryDirectory() as folder:
        world = worlds.start(config.run.device)
        session, state = prepare(config.replace(out=folder), world, print)
    phase = session.system.phase(0, config.recipe.images)
    session.system.train()

    def step() -> None:
        training_step(session, state, phase)

    for _ in range(arguments.profile_steps):
        step()
    profiler = record(step, arguments.profile_steps)
    if profiler is not None:
        write(profiler, out, arguments.profile_steps, config)
    worlds.stop(world)
    return 0


def record(step: Callable[[], object], steps: int) -> torch.profiler.profile | None:
    """A torch.profiler that has seen `steps` calls; under nsys NVTX ranges instead, and None."""
    if "NSYS_PROFILING_SESSION_ID" in os.environ:
        torch.cuda.cudart().cudaProfilerStart()
        with torch.autograd.profiler.emit_nvtx():
            for _ in range(steps):
                step()
        torch.cuda.cudart().cudaProfilerStop()
        return None
    with torch.profiler.profile() as profiler:
        for _ in range(steps):
            step()
    return profiler


def profile_operation(name: str, device: str, steps: int, out: Path) -> int:
    """Profile what runs for one operation by default, one case of its benchmark after the other."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    known = sorted(
        path.stem.removeprefix("bench_")
        for path in Path(sys.path[0], "bench").glob("bench_*.py")
        if "def cases" in path.read_text()
    )
    if name not in known:
        raise ValueError(f"--op {name}: expected one of {', '.join(known)}")
    on = "cuda" if torch.cuda.is_available() and device != "cpu" else "cpu"
    cases = importlib.import_module(f"bench.bench_{name}").cases(on)
    out.mkdir(parents=True, exist_ok=True)
    for number, case in enumerate(cases):
        call = case.contenders["ours"](case.inputs())
        call()
        with torch.profiler.record_function(f"{case.operation}: {case.name}"):
            profiler = record(call, steps)
        if profiler is not None:
            table = profiler.key_averages().table(sort_by=f"self_{on}_time_total", row_limit=12)
            (out / f"{name}-{number}.txt").write_text(f"{case.name}\n{table}\n")
            profiler.export_chrome_trace(str(out / f"{name}-{number}.json"))
            print(f"{case.name}\n{table}")
    print(f"written: {out}")
    return 0


def write(profiler: torch.profiler.profile, out: Path, steps: int, config: Config) -> None:
    """trace.json for chrome://tracing, profile.md with phases and the costliest operators."""
    from heptapod_fast.world import choose_device, device_name

    out.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(out / "trace.json"))
    on_gpu = torch.cuda.is_available()
    events = profiler.key_averages()

    def own_ms(event: Any) -> float:
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        return microseconds / steps / 1000

    def whole_ms(event: Any) -> float:
        microseconds = event.device_time_total if on_gpu else event.cpu_time_total
        return microseconds / steps / 1000

    phases = {event.key: whole_ms(event) for event in events if event.key in PHASES}
    step_ms = sum(phases.values())
    operators = [event for event in events if event.key not in phases]
    operators.sort(key=own_ms, reverse=True)
    batch = config.recipe.batch
    rate = batch / step_ms * 1000
    summary = [
        f"# One training step: {config.system} {config.size}, batch {batch}",
        "",
        f"{device_name(choose_device(config.run.device))}, torch {torch.__version__}; {steps} "
        f"steps under torch.profiler, which slows them down. {rate:,.0f} images/s while profiled.",
        "",
        "| phase | ms | share |",
        "|---|---:|---:|",
        *(f"| {name} | {ms:.2f} | {ms / step_ms:.0%} |" for name, ms in phases.items()),
        "",
        "| operator | own ms | share | calls |",
        "|---|---:|---:|---:|",
    ]
    rows = []
    for event in operators[:OPERATORS_WRITTEN]:
        share = own_ms(event) / step_ms
        calls = event.count / steps
        rows.append(f"| {event.key} | {own_ms(event):.2f} | {share:.1%} | {calls:g} |")
    (out / "profile.md").write_text("\n".join([*summary, *rows]) + "\n")
    print("\n".join([*summary, *rows[:OPERATORS_PRINTED]]))
    print(f"written: {out / 'profile.md'} and {out / 'trace.json'}")


if __name__ == "__main__":
    main(work)
