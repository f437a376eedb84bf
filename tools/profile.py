"""Where a training step spends its time: `python tools/profile.py --size tiny`.

Where nsys is installed and the device is a GPU, the tool runs itself under it and writes
profile.md and steps.nsys-rep (open it with nsys-ui); NVTX ranges name the phases and the operators.
Elsewhere torch.profiler records, and trace.json is a Chrome trace. `--op layer_norm` runs the
benchmark's cases of one operation instead (bench/bench_NAME.py). Started under nsys by hand (nsys
profile --capture-range=cudaProfilerApi ...), it only marks the steps.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from _cli import main
from _training import parse_training

from heptapod_fast.config import Config
from heptapod_fast.progress import speed
from heptapod_fast.reports import nsys, profile
from heptapod_fast.world import choose_device, device_name

# The costliest operators and kernels: rows in profile.md, and in what is printed.
ROWS_WRITTEN = 25
ROWS_PRINTED = 5


@dataclass(kw_only=True)
class Arguments:
    """Profile training steps; takes every flag of tools/train.py."""

    profile_steps: int = 10
    """Steps that are measured, after as many unmeasured ones."""
    op: str | None = None
    """Profile one operation at the shapes of its benchmark, not training steps."""
    nsys: Literal["auto", "on", "off"] = "auto"
    """Record with Nsight Systems, which has to be installed, on a GPU; auto: if it can be."""
    profile_out: str = "profile"
    """Folder for profile.md and the trace."""


def work() -> int:
    """Measure here, or let nsys run this tool once more and read what it recorded."""
    arguments, config = parse_training(Arguments)
    if arguments.profile_steps < 1:
        raise ValueError(f"--profile-steps {arguments.profile_steps}: expected at least 1")
    on_gpu = choose_device(config.run.device).type == "cuda"
    cases = [] if arguments.op is None else cases_of(arguments.op, on_gpu)
    if arguments.op is None:
        if config.data.data is None and config.model.size(config.size).data.data is None:
            config = config.replace(data="synthetic")
        config = config.resolve()
        if config.run.cuda_graph == "auto":
            # A graph is one launch, without the ranges that a profile is read by.
            config = config.replace(cuda_graph="off")
    is_recorded = nsys.is_recorded() and arguments.nsys != "off"
    if not is_recorded and nsys.is_wanted(arguments.nsys, on_gpu):
        run_under_nsys(arguments, config, cases)
        return 0
    # Backward runs in the thread that asks for it: there is the range that its kernels belong to.
    with torch.autograd.set_multithreading_enabled(False):
        if cases:
            profile_operation(arguments, cases, is_recorded, on_gpu)
        else:
            profile_steps(arguments, config, is_recorded)
    return 0


def run_under_nsys(arguments: Arguments, config: Config, cases: list[Any]) -> None:
    """The same command once more, recorded by nsys; its tables become profile.md."""
    report = Path(arguments.profile_out) / "steps.nsys-rep"
    nsys.record([sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]], report)
    steps = arguments.profile_steps
    if cases:
        names = [name_of(case) for case in cases]
        found = nsys.of_stats(nsys.stats(report), steps, names)
        title = f"Operation {arguments.op}, a step being one call of each case"
        about = about_machine(config, steps, "nsys")
    else:
        found = nsys.of_stats(nsys.stats(report), steps)
        title = title_of(config)
        about = f"{about_machine(config, steps, 'nsys')} {rate_of(config, found)}"
    write_page(found, title, about, report)


def mark(call: Callable[[], object]) -> None:
    """For nsys: where its recording begins and ends, and NVTX ranges for record_function and for
    every operator."""
    with torch.cuda.profiler.profile(), torch.autograd.profiler.emit_nvtx():
        call()


# ----------------------------------------------------------------------------------------- a step


def profile_steps(arguments: Arguments, config: Config, is_recorded: bool) -> None:
    """Build the run without resuming anything, warm up, measure."""
    from heptapod_fast import world as worlds
    from heptapod_fast.train.capture import WARM_UP
    from heptapod_fast.train.loop import training_step
    from heptapod_fast.train.session import prepare

    with tempfile.TemporaryDirectory() as folder:
        world = worlds.start(config.run.device)
        session, state = prepare(config.replace(out=folder), world, print)
    phase = session.system.phase(0, config.recipe.images)
    session.system.train()
    steps = arguments.profile_steps

    def run(count: int = steps) -> None:
        for _ in range(count):
            training_step(session, state, phase)

    run()
    if config.run.cuda_graph == "on":
        run(WARM_UP + 1)  # the step behind these is captured
    if is_recorded:
        mark(run)
    else:
        with torch.profiler.profile() as profiler:
            run()
        found = profile.of_torch(profiler, steps, world.device.type == "cuda")
        about = f"{about_machine(config, steps, 'torch.profiler')} {rate_of(config, found)}"
        trace = Path(arguments.profile_out) / "trace.json"
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
        write_page(found, title_of(config), about, trace)
    worlds.stop(world)


def title_of(config: Config) -> str:
    """What profile.md is about."""
    return f"One training step: {config.system} {config.size}, batch {config.recipe.batch}"


def about_machine(config: Config, steps: int, profiler: str) -> str:
    """What the figures were taken on, and by."""
    device = device_name(choose_device(config.run.device))
    return (
        f"{device}, torch {torch.__version__}; {steps} steps under {profiler}, which slows them "
        "down."
    )


def rate_of(config: Config, found: profile.Profile) -> str:
    """Images/s of the steps that were measured."""
    rate = config.recipe.batch / max(found.step_ms, 1e-9) * 1000
    return f"{speed(rate)} images/s while profiled."


def write_page(found: profile.Profile, title: str, about: str, trace: Path) -> None:
    """profile.md beside the trace; its first rows are printed."""
    page = trace.parent / "profile.md"
    page.write_text(profile.page(found, title, about, ROWS_WRITTEN))
    print(profile.page(found, title, about, ROWS_PRINTED))
    print(f"written: {page} and {trace}")


# ----------------------------------------------------------------------------------- an operation


def cases_of(name: str, on_gpu: bool) -> list[Any]:
    """The cases of the operation's benchmark, at least one. ValueError names the operations that
    have some."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    known = sorted(
        path.stem.removeprefix("bench_")
        for path in Path(sys.path[0], "bench").glob("bench_*.py")
        if "def cases" in path.read_text()
    )
    if name not in known:
        raise ValueError(f"--op {name}: expected one of {', '.join(known)}")
    device = "cuda" if on_gpu else "cpu"
    cases = importlib.import_module(f"bench.bench_{name}").cases(device)
    if not cases:
        raise ValueError(f"--op {name}: its benchmark has no case for --device {device}")
    return cases


def name_of(case: Any) -> str:
    """By which it is recorded."""
    return f"{case.operation}: {case.name}"


def profile_operation(
    arguments: Arguments, cases: list[Any], is_recorded: bool, on_gpu: bool
) -> None:
    """Profile what runs for one operation by default, one case of its benchmark after the other."""
    steps = arguments.profile_steps

    def prepared(case: Any) -> Callable[[], None]:
        """The calls of a case, after one that is not measured."""
        call = case.contenders["ours"](case.inputs())
        call()

        def run() -> None:
            with torch.profiler.record_function(name_of(case)):
                for _ in range(steps):
                    call()

        return run

    if is_recorded:
        # nsys records one stretch of time: inputs are made before it.
        calls = [prepared(case) for case in cases]
        mark(lambda: [call() for call in calls])
        return
    out = Path(arguments.profile_out)
    out.mkdir(parents=True, exist_ok=True)
    on = "cuda" if on_gpu else "cpu"
    for number, case in enumerate(cases):
        run = prepared(case)
        with torch.profiler.profile() as profiler:
            run()
        table = profiler.key_averages().table(sort_by=f"self_{on}_time_total", row_limit=12)
        (out / f"{arguments.op}-{number}.txt").write_text(f"{case.name}\n{table}\n")
        profiler.export_chrome_trace(str(out / f"{arguments.op}-{number}.json"))
        print(f"{case.name}\n{table}")
    print(f"written: {out}")


if __name__ == "__main__":
    main(work)
