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
from dataclasses import dataclass, fields, replace
from pathlib import Path

from _cli import main, parse

from heptapod_fast.config import Config
from heptapod_fast.resolve import share_of_batch


@dataclass(frozen=True, kw_only=True)
class Arguments(Config):
    """Profile training steps; takes every flag of tools/train.py."""

    profile_steps: int = 10
    """Steps that are measured, after as many unmeasured ones."""
    op: str | None = None
    """Profile one operation at the shapes of its benchmark instead of training steps."""
    profile_out: str = "profile"
    """Folder for trace.json and profile.md."""


def work() -> int:
    """Build the run without resuming anything, warm up, measure."""
    arguments = parse(Arguments)
    if arguments.profile_steps < 1:
        raise ValueError(f"--profile-steps {arguments.profile_steps}: expected at least 1")
    if arguments.op is not None:
        return operation(arguments)
    config = Config(**{f.name: getattr(arguments, f.name) for f in fields(Config)})
    if config.data is None and config.size != "tiny":
        config = replace(config, data="synthetic")
    config = config.resolve()

    from heptapod_fast.train import parallel
    from heptapod_fast.train.loop import training_step
    from heptapod_fast.train.setup import prepare

    with tempfile.TemporaryDirectory() as folder:
        world = parallel.start(config.device)
        run, _ = prepare(replace(config, out=folder), world, print)
    micro = share_of_batch(config, world.size)
    run.system.train()
    for _ in range(arguments.profile_steps):
        training_step(run, *micro)
    profiler = record(lambda: training_step(run, *micro), arguments.profile_steps)
    if profiler is not None:
        write(profiler, Path(arguments.profile_out), arguments.profile_steps, config)
    return 0


def record(step: Callable[[], object], steps: int):
    """A torch.profiler that has seen `steps` calls; under nsys NVTX ranges instead, and None."""
    import torch

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


def operation(arguments: Arguments) -> int:
    """Profile what runs for one operation by default, one case of its benchmark after the other."""
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    known = sorted(
        p.stem[6:]
        for p in Path(sys.path[0], "bench").glob("bench_*.py")
        if "def cases" in p.read_text()
    )
    if arguments.op not in known:
        raise ValueError(f"--op {arguments.op}: expected one of {', '.join(known)}")
    device = "cuda" if torch.cuda.is_available() and arguments.device != "cpu" else "cpu"
    cases = importlib.import_module(f"bench.bench_{arguments.op}").cases(device)
    out = Path(arguments.profile_out)
    out.mkdir(parents=True, exist_ok=True)
    for number, case in enumerate(cases):
        call = case.contenders["ours"](case.inputs())
        call()
        with torch.profiler.record_function(f"{case.operation}: {case.name}"):
            profiler = record(call, arguments.profile_steps)
        if profiler is not None:
            table = profiler.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=12)
            (out / f"{arguments.op}-{number}.txt").write_text(f"{case.name}\n{table}\n")
            profiler.export_chrome_trace(str(out / f"{arguments.op}-{number}.json"))
            print(f"{case.name}\n{table}")
    print(f"written: {out}")
    return 0


def write(profiler, out: Path, steps: int, config: Config) -> None:
    """trace.json for chrome://tracing, profile.md with phases and the costliest operators."""
    import torch

    from heptapod_fast.train.parallel import choose_device, device_name

    out.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(out / "trace.json"))
    cuda = torch.cuda.is_available()
    events = profiler.key_averages()

    def own(event) -> float:
        return (event.self_device_time_total if cuda else event.self_cpu_time_total) / steps / 1000

    phases = {
        e.key: (e.device_time_total if cuda else e.cpu_time_total) / steps / 1000
        for e in events
        if e.key in ("data", "forward", "backward", "optimizer")
    }
    whole = sum(phases.values())
    rows = sorted((e for e in events if e.key not in phases), key=own, reverse=True)[:25]
    device = device_name(choose_device(config.device))
    lines = [
        f"# One training step: {config.system} {config.size}, batch {config.batch}",
        "",
        f"{device}, torch {torch.__version__}; {steps} steps under torch.profiler, which "
        f"slows them down. {config.batch / whole * 1000:,.0f} images/s while profiled.",
        "",
        "| phase | ms | share |",
        "|---|---:|---:|",
    ]
    lines += [f"| {name} | {ms:.2f} | {ms / whole:.0%} |" for name, ms in phases.items()]
    lines += ["", "| operator | own ms | share | calls |", "|---|---:|---:|---:|"]
    lines += [
        f"| {e.key} | {own(e):.2f} | {own(e) / whole:.1%} | {e.count / steps:g} |" for e in rows
    ]
    (out / "profile.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines[:16]))
    print(f"written: {out / 'profile.md'} and {out / 'trace.json'}")


if __name__ == "__main__":
    main(work)
