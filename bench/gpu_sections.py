"""The sections of bench/gpu.py: each measures one thing and yields rows of plain numbers.

A section runs in a process of its own; `emit(row)` writes a row at once, so that what was measured
before a crash or the time limit stays.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPERATIONS = ("layer_norm", "adaln", "diffusion_loss", "linear_cross_entropy", "adamw_ema",
              "diffusion_mlp", "bias_gelu", "gather_rows", "flow_loss")
BATCH = {"B": 128, "L": 128, "H": 64}
Emit = Callable[[dict], None]


def ceilings(emit: Emit, deadline: float) -> None:
    """What this card reaches: device copy (bytes read plus written), products at our shapes."""
    import torch

    from bench import harness

    for megabytes in (256, 1024):
        def inputs(count=megabytes * 2**20 // 2):
            return (torch.randn(count, device="cuda", dtype=torch.bfloat16),
                    torch.empty(count, device="cuda", dtype=torch.bfloat16))

        case = harness.Case("ceilings", f"copy {megabytes} MB", inputs,
                            {"copy": lambda made: lambda: made[1].copy_(made[0])},
                            bytes=2 * megabytes * 2**20)
        emit_case(case, emit, deadline)
    rows = 128 * 257
    shapes = {"square": (8192, 8192, 8192)}
    for size, width, mlp in (("B", 768, 1024), ("L", 1024, 1280), ("H", 1280, 1536)):
        shapes |= {f"{size} qkv": (rows, 3 * width, width), f"{size} proj": (rows, width, width),
                   f"{size} fc1": (rows, 4 * width, width), f"{size} fc2": (rows, width, 4 * width),
                   f"{size} weight gradient of fc1": (4 * width, width, rows),
                   f"{size} diffusion fc": (65536, mlp, mlp),
                   f"{size} diffusion modulation": (65536, 3 * mlp, mlp)}
    for name, (m, n, k) in shapes.items():
        def inputs(m=m, n=n, k=k):
            make = lambda *shape: torch.randn(shape, device="cuda", dtype=torch.bfloat16)
            return make(m, k), make(n, k)

        case = harness.Case(
            "ceilings", f"product {name}, {m} x {n} x {k}", inputs,
            {"cuBLAS": lambda made: lambda: torch.mm(made[0], made[1].t())}, flops=2 * m * n * k,
            bytes=2 * (m * k + n * k + m * n))
        emit_case(case, emit, deadline)


def emit_case(case, emit: Emit, deadline: float) -> None:
    """Measure one case and emit a row with all of its contenders."""
    from bench import harness

    results = harness.measure(case, deadline=deadline)
    emit({"case": case_name(case), "bytes": case.bytes, "flops": case.flops, "gate": case.gate,
          "aim": case.aim, "contenders": {r.contender: asdict(r) for r in results}})


def case_name(case) -> str:
    """The name of a case within its section: gather_rows measures scatter_rows too."""
    return f"{case.operation}: {case.name}"


def build(emit: Emit, deadline: float) -> None:
    """The compiled library on this machine, and every test that a GPU changes."""
    begin = time.monotonic()
    done = run([sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-q",
                "-e", "."], deadline)
    emit({"case": "pip install", "passed": done.returncode == 0, "output": tail(done),
          "seconds": round(time.monotonic() - begin, 1)})
    done = run([sys.executable, "-c", "from heptapod_fast.ops import library\n"
                "print(library.status())\nassert library.available('cuda')"], deadline)
    emit({"case": "compiled operators", "passed": done.returncode == 0, "output": tail(done)})
    parallel = ["-n", "6"] if importlib.util.find_spec("xdist") else []
    begin = time.monotonic()
    done = run([sys.executable, "-m", "pytest", "tests/gpu", "tests/ops", "-q", "-rfE",
                "--tb=short", "--deselect", "tests/ops/test_offline.py", *parallel], deadline)
    emit({"case": "tests/gpu tests/ops", "passed": done.returncode == 0,
          "summary": last_line(done), "output": tail(done, 12000),
          "seconds": round(time.monotonic() - begin, 1)})


def run(command: list[str], deadline: float) -> subprocess.CompletedProcess:
    """A command in the repository, stopped at the deadline; output and errors together."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    try:
        return subprocess.run(command, cwd=ROOT, env=environment, text=True, errors="replace",
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired as error:
        text = error.stdout or b""
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        return subprocess.CompletedProcess(command, 124, text + "\nout of time")


def tail(done: subprocess.CompletedProcess, characters: int = 2000) -> str:
    """The end of the output without this machine's paths."""
    return done.stdout.replace(str(ROOT), ".")[-characters:]


def last_line(done: subprocess.CompletedProcess) -> str:
    """What pytest counts."""
    lines = [line for line in done.stdout.splitlines() if re.search(r"passed|failed|error", line)]
    return lines[-1].strip("= ") if lines else tail(done, 200)


def cases_of(name: str, larger: bool) -> list:
    """The cases of bench/bench_NAME.py at sizes L and H (`larger`), or all others."""
    cases = importlib.import_module(f"bench.bench_{name}").cases("cuda")
    return [case for case in cases if bool(re.search(r"\b[LH],", case.name)) == larger]


def operation(name: str, larger: bool = False) -> Callable[[Emit, float], None]:
    """A section that measures cases of bench/bench_NAME.py against their peers."""
    def section(emit: Emit, deadline: float) -> None:
        for case in cases_of(name, larger):
            if time.monotonic() > deadline:
                raise TimeoutError("out of time")
            emit_case(case, emit, deadline)

    section.__doc__ = f"{name} against its peers, {'sizes L and H' if larger else 'size B'}."
    return section


def step(size: str) -> Callable[[Emit, float], None]:
    """Whole training steps of one size on synthetic tokens, with the kernels."""
    def section(emit: Emit, deadline: float) -> None:
        variants = [("latents, dropout 0.1", dict(tokenizer="kl16")),
                    ("latents, dropout 0", dict(tokenizer="kl16", dropout=0.0))]
        if size == "B":
            variants.append(("codes, dropout 0.1", dict(tokenizer="vq16")))
        for i, (name, settings) in enumerate(variants):
            if time.monotonic() > deadline:
                raise TimeoutError("out of time")
            emit(training_step(size, name, settings, profile=i == 0))

    section.__doc__ = f"Training steps of size {size}, kernels on."
    return section


def baselines(emit: Emit, deadline: float) -> None:
    """The same steps by plain PyTorch: eager, and torch.compile of backbone, head and MLP."""
    for size in BATCH:
        for name, compiled in (("eager", False), ("compiled", True)):
            if time.monotonic() > deadline:
                raise TimeoutError("out of time")
            settings = dict(tokenizer="kl16", dropout=0.0, kernels="reference")
            try:
                emit(training_step(size, f"reference, {name}, latents, dropout 0", settings,
                                   compiled=compiled))
            except Exception as error:  # memory, or a graph that cannot be compiled
                emit({"case": f"{size} {name}", "failed": f"{type(error).__name__}: {error}"[:600]})


def training_step(size: str, name: str, settings: dict, profile: bool = False,
                  compiled: bool = False) -> dict:
    """images/s, TFLOP/s, MFU and memory of one configuration; the loop's own step."""
    import torch

    from heptapod_fast.train.loop import training_step as one_step
    from heptapod_fast.train.metrics import peak_flops, training_flops

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    prepared, micro, lines = prepared_run(size, settings)
    if compiled:
        torch._dynamo.config.cache_size_limit = 64
        for part in (prepared.system.backbone, prepared.system.head):
            part.compile(dynamic=False)
        loss = prepared.system.token_loss
        loss.net = torch.compile(loss.net, dynamic=False)
    begin = time.monotonic()
    one_step(prepared, *micro)
    torch.cuda.synchronize()
    first = time.monotonic() - begin
    for _ in range(3):
        one_step(prepared, *micro)
    samples = [seconds_of(lambda: one_step(prepared, *micro)) for _ in range(12)]
    low, median, high = statistics.quantiles(samples, n=4)
    batch = prepared.config.batch
    flops = training_flops(prepared.system)
    peak = peak_flops(prepared.world.device)
    row = {"case": f"{size}, {name}", "batch": batch, "images_per_second": round(batch / median, 1),
           "quartiles": [round(batch / high, 1), round(batch / low, 1)],
           "tflops": round(batch / median * flops / 1e12, 1),
           "mfu": round(batch / median * flops / peak, 4) if peak else None,
           "memory_GB": round(torch.cuda.max_memory_allocated() / 1e9, 2),
           "estimated_GB": estimated(prepared),
           "first_step_seconds": round(first, 1), "operators": lines}
    if profile:
        row["kernels"] = kernel_times(lambda: one_step(prepared, *micro), steps=3)
    return row


def estimated(prepared) -> float:
    """What --dry-run says of the memory of this run."""
    from heptapod_fast.train.summary import memory_lines

    total = memory_lines(prepared.config, prepared.system, prepared.config.batch)[2]
    return float(total.split()[1])


def prepared_run(size: str, settings: dict, device: str = "cuda", batch: int | None = None):
    """(a run that was never saved, its share of the batch, the lines on operators)."""
    import tempfile

    import torch

    from heptapod_fast.config import Config
    from heptapod_fast.resolve import share_of_batch
    from heptapod_fast.train.parallel import World
    from heptapod_fast.train.setup import prepare

    lines, batch = [], batch or BATCH[size]
    with tempfile.TemporaryDirectory() as folder:
        config = Config(size=size, data="synthetic", batch=batch, micro_batch=batch, out=folder,
                        device=device, **settings).resolve()
        prepared, _ = prepare(config, World(0, 1, torch.device(device)), lines.append)
    prepared.system.train()
    return prepared, share_of_batch(prepared.config, 1), [x for x in lines if "operator" in x]


def seconds_of(function: Callable) -> float:
    """Seconds of one call, host and device."""
    import torch

    torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def kernel_times(function: Callable, steps: int, most: int = 40) -> list[dict]:
    """Device time per step of the longest kernels, and of everything together."""
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            function()
        torch.cuda.synchronize()
    found = [event for event in profiler.key_averages()
             if event.device_type == torch.autograd.DeviceType.CUDA]
    found.sort(key=lambda event: event.self_device_time_total, reverse=True)
    rows = [{"kernel": event.key[:120], "us": round(event.self_device_time_total / steps, 1),
             "calls": round(event.count / steps, 1)} for event in found[:most]]
    total = sum(event.self_device_time_total for event in found) / steps
    return [{"kernel": "all", "us": round(total, 1), "calls": 0}, *rows]


# By worth: what everything else is compared with, whether it is right, how fast it trains, why.
SECTIONS: dict[str, Callable[[Emit, float], None]] = {
    "build": build, "ceilings": ceilings, "step-B": step("B"),
    **{f"op-{name}": operation(name) for name in OPERATIONS[:5]},
    "step-L": step("L"), "step-H": step("H"), "baselines": baselines,
    **{f"op-{name}": operation(name) for name in OPERATIONS[5:]},
    **{f"op-{name}-LH": operation(name, larger=True) for name in OPERATIONS
       if name not in ("diffusion_loss", "flow_loss")},
}


def work(name: str, rows: Path, seconds: float) -> None:
    """Run one section in this process, appending a line of JSON per row."""
    with rows.open("a") as file:
        def emit(row: dict) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        SECTIONS[name](emit, time.monotonic() + seconds)
