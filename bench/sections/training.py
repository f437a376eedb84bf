"""Whole training steps on synthetic tokens: with the kernels, and by plain PyTorch."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from bench import timer
from bench.measuring import reason
from bench.roofline import Ceilings
from bench.sections.work import Row, Work
from heptapod_fast.reports import profile
from heptapod_fast.train import memory
from heptapod_fast.train.capture import WARM_UP
from heptapod_fast.train.metrics import peak_flops

if TYPE_CHECKING:
    from bench.steps import Step

BATCH = {"B": 128, "L": 128, "H": 64}
SAR_BATCH = {"B": 64}
ROUNDS = 12
PROFILED_STEPS = 3
KERNELS_KEPT, KERNELS_SHOWN = 40, 25
OURS = dict(kernels="triton", attention="triton")
PLAIN = dict(kernels="reference", attention="sdpa", adamw_ema="reference", cuda_graph="off")
LATENTS = dict(tokenizer="kl16", dropout=0.0)
HEAD = ["configuration", "batch", "images/s", "quartiles", "TFLOP/s", "MFU", "GB", "estimated"]


class Training:
    """Sections of training steps have the same code and the same table."""

    code = ("bench/steps.py", "bench/sections/training.py")

    def table(self, rows: list[Row], ceilings: Ceilings) -> list[str]:
        """See Section.table."""
        found = ["| " + " | ".join(HEAD) + " |", "|---|---:|---:|---|---:|---:|---:|---:|"]
        found += [line(row) for row in rows]
        for row in rows:
            if row.get("kernels"):
                found += kernel_table(row)
        return found


@dataclass(frozen=True)
class Steps(Training):
    """With the kernels. size: "B", "L" or "H"."""

    size: str

    @property
    def name(self) -> str:
        """step-B."""
        return f"step-{self.size}"

    @property
    def about(self) -> str:
        """One line."""
        return f"Training steps of size {self.size}, kernels on."

    def variants(self) -> dict[str, dict[str, Any]]:
        """{name: flags}"""
        found = {
            "latents, dropout 0.1": LATENTS | dict(dropout=0.1),
            "latents, dropout 0": LATENTS,
        }
        if self.size == "B":
            found["codes, dropout 0.1"] = dict(tokenizer="vq16", dropout=0.1)
        return found

    def measure(self, work: Work) -> None:
        """See Section.measure."""
        for name, settings in self.variants().items():
            case = f"{self.size}, {name}"
            if work.wants(case):
                is_profiled = settings["dropout"] > 0
                step = synthetic_step(self.size, "cuda", BATCH[self.size], settings | OURS)
                work.emit(measured(case, step, is_profiled))


@dataclass(frozen=True)
class LlamaSteps(Training):
    """llamagen with the kernels, npp's segments, and llamagen by plain PyTorch, eager and compiled
    whole, with its loss. size: "B" or "L"."""

    size: str

    code = (*Training.code, "bench/plain_llamagen.py", "bench/bench_llamagen.py")

    @property
    def name(self) -> str:
        """step-llamagen-B."""
        return f"step-llamagen-{self.size}"

    @property
    def about(self) -> str:
        """One line."""
        return f"Training steps of llamagen {self.size} and of npp's segments; plain PyTorch."

    def variants(self) -> dict[str, dict[str, Any]]:
        """{name: flags}; a step is of the first segment."""
        return {
            "llamagen, every code": dict(system="llamagen"),
            "npp, patches of 2 x 2": dict(system="npp", levels=2),
            "npp, patches of 4 x 4": dict(system="npp", levels=3),
        }

    def measure(self, work: Work) -> None:
        """See Section.measure. Memory, or a graph that cannot be compiled, is a row too."""
        batch = BATCH[self.size]
        for name, settings in self.variants().items():
            case = f"{self.size}, {name}"
            if work.wants(case):
                step = synthetic_step(self.size, "cuda", batch, settings | OURS)
                is_profiled = settings["system"] == "llamagen"
                work.emit(measured(case, step, is_profiled))
        for how in ("eager", "compiled"):
            case = f"{self.size}, llamagen, plain PyTorch, {how}"
            if not work.wants(case):
                continue
            try:
                work.emit(plain_llamagen(case, self.size, batch, how))
            except Exception as error:
                work.emit({"case": case, "failed": reason(error)})


@dataclass(frozen=True)
class SarSteps(Training):
    """SAR B with the kernels: two streams, and one for comparison."""

    size: str

    @property
    def name(self) -> str:
        """step-sar-B."""
        return f"step-sar-{self.size}"

    @property
    def about(self) -> str:
        """One line."""
        return f"Training steps of SAR {self.size}: two streams, one stream, DDPM for flow."

    def variants(self) -> dict[str, dict[str, Any]]:
        """{name: flags}."""
        two = dict(system="sar", tokenizer="kl16", grouping="next-neighbor", injection="average")
        return {
            "two streams, flow": two,
            "two streams, ddpm": two | dict(token_loss="ddpm"),
            "one stream, flow": two | dict(grouping="next-token", injection="shift"),
        }

    def measure(self, work: Work) -> None:
        """See Section.measure."""
        for name, settings in self.variants().items():
            case = f"{self.size}, sar, {name}"
            if work.wants(case):
                step = synthetic_step(self.size, "cuda", SAR_BATCH[self.size], settings | OURS)
                work.emit(measured(case, step, is_profiled=name == "two streams, flow"))


@dataclass(frozen=True)
class Launching(Training):
    """The same step eager, captured in CUDA graphs, and captured with compiled blocks; by size and
    batch, for it is small steps that wait for the host."""

    name: str = "step-graphs"
    about: str = "Training steps eager, captured in CUDA graphs, and compiled; the idle share."

    def variants(self) -> dict[str, dict[str, Any]]:
        """{name: flags}."""
        return {
            "eager": dict(cuda_graph="off"),
            "captured": dict(cuda_graph="on"),
            "captured, blocks compiled": dict(cuda_graph="on", compile="on"),
        }

    def measure(self, work: Work) -> None:
        """See Section.measure. A step that cannot be captured is a row too."""
        for size, batch in (("tiny", 64), ("B", 16), ("B", 128)):
            for name, settings in self.variants().items():
                case = f"{size}, batch {batch}, {name}"
                if not work.wants(case):
                    continue
                try:
                    step = synthetic_step(size, "cuda", batch, settings | OURS)
                    row = timed_row(case, step.call, batch, step.flops)
                    work.emit(row | {"idle": idle_share(step.call)})
                except Exception as error:
                    work.emit({"case": case, "failed": reason(error)})

    def table(self, rows: list[Row], ceilings: Ceilings) -> list[str]:
        """See Section.table."""
        names = ["configuration", "images/s", "quartiles", "idle", "GB", "first step, s"]
        found = ["| " + " | ".join(names) + " |", "|---|---:|---|---:|---:|---:|"]
        return found + [launching_line(row) for row in rows]


def launching_line(row: Row) -> str:
    """One configuration of `Launching`."""
    if "failed" in row:
        return f"| {row['case']} | failed: {row['failed'][:120]} | | | | |"
    low, high = row["quartiles"]
    idle = "" if row["idle"] is None else f"{row['idle']:.1%}"
    return (
        f"| {row['case']} | {row['images_per_second']} | {low} to {high} | {idle} | "
        f"{row['memory_GB']} | {row['first_step_seconds']} |"
    )


def plain_llamagen(case: str, size: str, batch: int, how: str) -> Row:
    """The row of `bench/plain_llamagen.py`, with the FLOPs of our own step."""
    from bench.bench_llamagen import plain_model
    from bench.plain_llamagen import PlainStep
    from bench.steps import flops_of, sized

    gc.collect()
    settings = sized(size, batch, "cuda", system="llamagen")
    model = plain_model(settings)
    if how == "compiled":
        model.compile(dynamic=False)
    found = timed_row(case, PlainStep(model, batch), batch, flops_of(settings))
    return found | {"estimated_GB": None}


@dataclass(frozen=True)
class Baseline(Training):
    """The same step by plain PyTorch: eager, and torch.compile of backbone, head and MLP."""

    size: str

    @property
    def name(self) -> str:
        """baseline-B."""
        return f"baseline-{self.size}"

    @property
    def about(self) -> str:
        """One line."""
        return f"The step of size {self.size} by plain PyTorch, eager and compiled."

    def measure(self, work: Work) -> None:
        """See Section.measure. Memory, or a graph that cannot be compiled, is a row too."""
        for how in ("eager", "compiled"):
            case = f"{self.size}, reference, {how}, latents, dropout 0"
            if not work.wants(case):
                continue
            try:
                step = synthetic_step(self.size, "cuda", BATCH[self.size], LATENTS | PLAIN)
                if how == "compiled":
                    compile_parts(step)
                work.emit(measured(case, step))
            except Exception as error:
                work.emit({"case": case, "failed": reason(error)})


def synthetic_step(size: str, device: str, batch: int, settings: dict[str, Any]) -> Step:
    """A step of one micro-batch."""
    # Training needs more packages than operations do: where one is missing, only steps must fail.
    from bench.steps import prepared_step

    gc.collect()  # the last step's tensors
    return prepared_step(size, device, data="synthetic", batch=batch, micro_batch=batch, **settings)


def compile_parts(step: Step) -> None:
    """torch.compile with static shapes of what is worth it."""
    system = step.session.system
    for part in (system.backbone, system.head):
        part.compile(dynamic=False)
    system.token_loss.net = torch.compile(system.token_loss.net, dynamic=False)


def measured(case: str, step: Step, is_profiled: bool = False) -> Row:
    """images/s, TFLOP/s, MFU and memory."""
    config, system = step.session.config, step.session.system
    work = memory.Work(config, system.num_classes, torch.device("cuda"), system.operators)
    estimate = memory.fit_into(work, memory.memory_limit(work.device)).estimate
    row = timed_row(case, step.call, step.batch, step.flops)
    row |= {
        "estimated_GB": None if estimate is None else round(estimate.total / 1e9, 2),
        "operators": [text for text in step.lines if text.startswith("operator")],
    }
    if is_profiled:
        row["kernels"] = kernel_times(step.call)
    return row


def timed_row(case: str, call: timer.Call, batch: int, flops: float) -> Row:
    """What any step has."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    begin = time.monotonic()
    call()
    torch.cuda.synchronize()
    first = time.monotonic() - begin
    for _ in range(WARM_UP):  # the last of them is captured, where steps are
        call()
    watches = {case: timer.WallWatch(call, "cuda")}
    timing = timer.in_turns(watches, ROUNDS)[case]
    low, high = timing.quartiles
    peak = peak_flops(torch.device("cuda"))
    return {
        "case": case,
        "batch": batch,
        "images_per_second": round(batch / timing.median, 1),
        "quartiles": [round(batch / high, 1), round(batch / low, 1)],
        "tflops": round(flops / timing.median / 1e12, 1),
        "mfu": round(flops / timing.median / peak, 4) if peak else None,
        "memory_GB": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "first_step_seconds": round(first, 1),
    }


def profiled(call: timer.Call) -> torch.profiler.profile:
    """What torch.profiler sees of some steps."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(PROFILED_STEPS):
            call()
        torch.cuda.synchronize()
    return profiler


def idle_share(call: timer.Call) -> float | None:
    """Of the time of some steps, what the GPU ran no kernel in; the profiler slows the host down,
    and so makes it larger."""
    return profile.of_torch(profiled(call), PROFILED_STEPS, on_gpu=True).idle


def kernel_times(call: timer.Call) -> list[Row]:
    """Device time per step of everything together, and of the longest kernels."""
    profiler = profiled(call)
    # The loop's own ranges appear on the device too and would count everything twice.
    cuda = torch.autograd.DeviceType.CUDA
    found = [
        event
        for event in profiler.key_averages()
        if event.device_type == cuda and not event.is_user_annotation
    ]
    found.sort(key=lambda event: event.self_device_time_total, reverse=True)
    total = sum(event.self_device_time_total for event in found)
    rows = [{"kernel": "all", "us": round(total / PROFILED_STEPS, 1), "calls": 0}]
    for event in found[:KERNELS_KEPT]:
        rows.append(
            {
                "kernel": event.key[:120],
                "us": round(event.self_device_time_total / PROFILED_STEPS, 1),
                "calls": round(event.count / PROFILED_STEPS, 1),
            }
        )
    return rows


def line(row: Row) -> str:
    """One configuration."""
    if "failed" in row:
        return f"| {row['case']} | | failed: {row['failed'][:120]} | | | | | |"
    mfu = f"{row['mfu']:.1%}" if row["mfu"] else ""
    estimated = "" if row["estimated_GB"] is None else row["estimated_GB"]
    low, high = row["quartiles"]
    return (
        f"| {row['case']} | {row['batch']} | {row['images_per_second']} | {low} to {high} | "
        f"{row['tflops']} | {mfu} | {row['memory_GB']} | {estimated} |"
    )


def kernel_table(row: Row) -> list[str]:
    """The kernels of a step that was profiled."""
    head = ["", f"Device time of one step, {row['case']}:", ""]
    head += ["| kernel | us | calls |", "|---|---:|---:|"]
    shown = row["kernels"][:KERNELS_SHOWN]
    return head + [f"| `{k['kernel'][:90]}` | {k['us']} | {k['calls']} |" for k in shown]
