"""The sections of bench/gpu.py: each measures one thing and writes rows of plain numbers.

A section runs in a process of its own and writes a row as soon as it has one, so that what was
measured before a crash or the time limit stays, and skips what an earlier run has written.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPERATIONS = (
    "attention",
    "layer_norm",
    "adaln",
    "linear_cross_entropy",
    "adamw_ema",
    "diffusion_loss",
    "diffusion_mlp",
    "bias_gelu",
    "gather_rows",
    "flow_loss",
)
BATCH = {"B": 128, "L": 128, "H": 64}
RESTART = 75  # exit code: go on in a fresh process, this one cannot capture graphs any more


@dataclass
class Work:
    """Where a section writes to, until when, and what it need not do again.

    done: names of rows that exist. failed: {case: {contender: why it cannot be captured}}.
    """

    rows: Path
    deadline: float
    done: set[str] = field(default_factory=set)
    failed: dict[str, dict[str, str]] = field(default_factory=dict)

    def emit(self, row: dict) -> None:
        """Append one row."""
        with self.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def check(self) -> None:
        """TimeoutError when the time is over."""
        if time.monotonic() > self.deadline:
            raise TimeoutError("out of time")

    def wants(self, name: str) -> bool:
        """Whether a row is still to be made; TimeoutError when there is no time for it."""
        if name in self.done:
            return False
        self.check()
        return True

    def measure(self, case) -> None:
        """One row with all contenders of a case. Exits with RESTART after a failed capture."""
        from bench import harness

        name = case_name(case)
        if not self.wants(name):
            return
        try:
            results = harness.measure(case, deadline=self.deadline, failed=self.failed.get(name))
        except harness.CaptureFailed as error:
            self.emit({"failed": [name, error.contender, str(error)]})
            sys.exit(RESTART)
        self.emit(
            {
                "case": name,
                "bytes": case.bytes,
                "flops": case.flops,
                "gate": case.gate,
                "aim": case.aim,
                "contenders": {r.contender: asdict(r) for r in results},
            }
        )
        if any(result.why == harness.NO_TIME for result in results):
            raise TimeoutError("out of time")


def case_name(case) -> str:
    """The name of a case within its section: gather_rows measures scatter_rows too."""
    return f"{case.operation}: {case.name}"


# ----------------------------------------------------------------------------------------- ceilings


def ceilings(work: Work) -> None:
    """What this card reaches: device copy (bytes read plus written), products at our shapes."""
    import torch

    from bench import harness

    for megabytes in (256, 1024):

        def inputs(count=megabytes * 2**20 // 2):
            return (
                torch.randn(count, device="cuda", dtype=torch.bfloat16),
                torch.empty(count, device="cuda", dtype=torch.bfloat16),
            )

        work.measure(
            harness.Case(
                "ceilings",
                f"copy {megabytes} MB",
                inputs,
                {"copy": lambda made: lambda: made[1].copy_(made[0])},
                bytes=2 * megabytes * 2**20,
            )
        )
    rows = 128 * 257
    shapes = {"square": (8192, 8192, 8192)}
    for size, width, mlp in (("B", 768, 1024), ("L", 1024, 1280), ("H", 1280, 1536)):
        shapes |= {
            f"{size} qkv": (rows, 3 * width, width),
            f"{size} proj": (rows, width, width),
            f"{size} fc1": (rows, 4 * width, width),
            f"{size} fc2": (rows, width, 4 * width),
            f"{size} weight gradient of fc1": (4 * width, width, rows),
            f"{size} diffusion fc": (65536, mlp, mlp),
            f"{size} diffusion modulation": (65536, 3 * mlp, mlp),
        }
    for name, (m, n, k) in shapes.items():

        def inputs(m=m, n=n, k=k):
            make = lambda *shape: torch.randn(shape, device="cuda", dtype=torch.bfloat16)
            return make(m, k), make(n, k)

        work.measure(
            harness.Case(
                "ceilings",
                f"product {name}, {m} x {n} x {k}",
                inputs,
                {"cuBLAS": lambda made: lambda: torch.mm(made[0], made[1].t())},
                flops=2 * m * n * k,
                bytes=2 * (m * k + n * k + m * n),
            )
        )


# -------------------------------------------------------------------------------------------- tests


def smoke(work: Work) -> None:
    """tests/gpu and the shortest test of every operation on this GPU."""
    tests(
        work,
        "smoke",
        [
            "tests/gpu",
            "tests/ops",
            "-k",
            "gpu or no_rows or test_kernel_by_the_rule or test_kernels_by_the_rule",
            "--maxfail=10",
        ],
        210,
    )


def attention_tests(work: Work) -> None:
    """Every test of attention: a kernel for each width and mask, which take long to compile."""
    tests(work, "tests-attention", ["tests/ops/test_attention.py", "--maxfail=40"], 300)


def all_tests(work: Work) -> None:
    """Every test that a GPU changes: operators, kernels, whole systems; attention's are apart."""
    tests(
        work,
        "tests",
        [
            "tests/gpu",
            "tests/ops",
            "tests/systems/test_kernels.py",
            "--ignore=tests/ops/test_attention.py",
            "--ignore=tests/ops/test_offline.py",
            "--maxfail=40",
        ],
        300,
    )


def tests(work: Work, name: str, arguments: list[str], most: float) -> None:
    """One run of pytest as a row; a run that was cut off is no row of its own."""
    if not work.wants(name):
        return
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rfE",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        *arguments,
    ]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "8"]
    begin = time.monotonic()
    code, output = run(command, min(work.deadline, begin + most))
    lines = [line for line in output.splitlines() if re.search(r"\d (passed|failed|error)", line)]
    row = {
        "case": name,
        "passed": code == 0,
        "summary": lines[-1].strip("= ") if lines else "",
        "output": "" if code == 0 else output[-12_000:],
        "seconds": round(time.monotonic() - begin, 1),
    }
    if code == 124:
        work.emit(row | {"case": f"{name}, cut off", "summary": "out of time"})
        raise TimeoutError("out of time")
    work.emit(row)


def run(command: list[str], deadline: float) -> tuple[int, str]:
    """(exit code, output) of a command in the repository; with everything it started, it ends at
    the deadline (code 124)."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
        code = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, code = process.communicate()[0], 124
    return code, output.replace(str(ROOT), ".")


def environment() -> dict[str, str]:
    """This checkout first; what the user put on PYTHONPATH stays."""
    before = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT)] + [before] * bool(before))}


# --------------------------------------------------------------------------------------- operations

SIZED = re.compile(r"\b[LH],")


def operation(name: str, which: str = "first") -> Callable[[Work], None]:
    """A section of cases of bench/bench_NAME.py: the first size, the larger ones, or compiled ones
    that take long."""

    def section(work: Work) -> None:
        for case in importlib.import_module(f"bench.bench_{name}").cases("cuda"):
            kind = (
                "slow"
                if case.name.startswith("compiled peer")
                else "larger"
                if SIZED.search(case.name)
                else "first"
            )
            if kind == which:
                work.measure(case)

    what = {"first": "size B", "larger": "sizes L and H", "slow": "torch.compile at size B"}[which]
    section.__doc__ = f"{name} against its peers, {what}."
    return section


# -------------------------------------------------------------------------------------------- steps


def step(size: str) -> Callable[[Work], None]:
    """Whole training steps of one size on synthetic tokens, with the kernels."""

    def section(work: Work) -> None:
        variants = [
            ("latents, dropout 0.1", dict(tokenizer="kl16")),
            ("latents, dropout 0", dict(tokenizer="kl16", dropout=0.0)),
        ]
        if size == "B":
            variants.append(("codes, dropout 0.1", dict(tokenizer="vq16")))
        for name, settings in variants:
            if work.wants(f"{size}, {name}"):
                ours = dict(kernels="triton", attention="triton")
                work.emit(training_step(size, name, settings | ours, profile="0.1" in name))

    section.__doc__ = f"Training steps of size {size}, kernels on."
    return section


def baseline(size: str) -> Callable[[Work], None]:
    """The same steps by plain PyTorch: eager, and torch.compile of backbone, head and MLP."""

    def section(work: Work) -> None:
        for name, compiled in (("eager", False), ("compiled", True)):
            name = f"reference, {name}, latents, dropout 0"
            settings = dict(
                tokenizer="kl16",
                dropout=0.0,
                kernels="reference",
                attention="sdpa",
                adamw_ema="reference",
            )
            if work.wants(f"{size}, {name}"):
                try:
                    work.emit(training_step(size, name, settings, compiled=compiled))
                except Exception as error:  # memory, or a graph that cannot be compiled
                    work.emit(
                        {
                            "case": f"{size}, {name}",
                            "failed": f"{type(error).__name__}: {error}"[:600],
                        }
                    )

    section.__doc__ = f"The step of size {size} by plain PyTorch, eager and compiled."
    return section


def training_step(
    size: str, name: str, settings: dict, profile: bool = False, compiled: bool = False
) -> dict:
    """images/s, TFLOP/s, MFU and memory of one configuration; the loop's own step."""
    import torch

    from heptapod_fast.train.loop import training_step as one_step
    from heptapod_fast.train.metrics import peak_flops, training_flops

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    prepared, micro, lines = prepared_run(size, settings)
    if compiled:
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
    row = {
        "case": f"{size}, {name}",
        "batch": batch,
        "images_per_second": round(batch / median, 1),
        "quartiles": [round(batch / high, 1), round(batch / low, 1)],
        "tflops": round(batch / median * flops / 1e12, 1),
        "mfu": round(batch / median * flops / peak, 4) if peak else None,
        "memory_GB": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "estimated_GB": estimated(prepared),
        "first_step_seconds": round(first, 1),
        "operators": lines,
    }
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
        config = Config(
            size=size,
            data="synthetic",
            batch=batch,
            micro_batch=batch,
            out=folder,
            device=device,
            **settings,
        ).resolve()
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
    # The loop's own ranges appear on the device too and would count everything twice.
    cuda = torch.autograd.DeviceType.CUDA
    found = [
        event
        for event in profiler.key_averages()
        if event.device_type == cuda and not event.is_user_annotation
    ]
    found.sort(key=lambda event: event.self_device_time_total, reverse=True)
    rows = [
        {
            "kernel": event.key[:120],
            "us": round(event.self_device_time_total / steps, 1),
            "calls": round(event.count / steps, 1),
        }
        for event in found[:most]
    ]
    total = sum(event.self_device_time_total for event in found) / steps
    return [{"kernel": "all", "us": round(total, 1), "calls": 0}, *rows]


# By worth: whether it is right at all, what everything is compared with, how fast it trains, the
# operations with a gate (attention's heads of 80 are of the larger sizes), everything else.
SECTIONS: dict[str, Callable[[Work], None]] = {
    "smoke": smoke,
    "ceilings": ceilings,
    "step-B": step("B"),
    "op-attention": operation("attention"),
    "op-attention-LH": operation("attention", "larger"),
    **{f"op-{name}": operation(name) for name in OPERATIONS[1:6]},
    "tests-attention": attention_tests,
    "tests": all_tests,
    "step-L": step("L"),
    "step-H": step("H"),
    **{f"baseline-{size}": baseline(size) for size in BATCH},
    **{f"op-{name}": operation(name) for name in OPERATIONS[6:]},
    **{
        f"op-{name}-LH": operation(name, "larger")
        for name in OPERATIONS[1:]
        if name not in ("diffusion_loss", "flow_loss")
    },
    "op-adamw_ema-compiled": operation("adamw_ema", "slow"),
}
