"""How fast a run was, what the time of all its sessions went to, and what a long run would take at
this rate. Where the records do not say, as those of older versions, it is "n/a"."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from heptapod_fast.config import Config
from heptapod_fast.progress import duration
from heptapod_fast.reports.charts import save_time_and_rate
from heptapod_fast.reports.tables import share, show, table
from heptapod_fast.train.metrics import FLOPS_FORMULA, PARTS, PEAKS
from heptapod_fast.train.records import Record

# What wall time goes to: first what trains, then what does not.
WORDS = {
    "forward_backward": "forward and backward",
    "optimizer": "optimizer",
    "data": "waiting for data",
    "checkpoint": "checkpoints",
    "sampling": "samples",
    "restart": "restart",
    "rest": "the rest",
}
USEFUL = ("forward_backward", "optimizer")
CHART = "throughput.png"
# The projection: the length of the papers' runs.
EPOCHS = 800
IMAGENET_IMAGES = 1_281_167
DEVICES = (1, 8, 64)
SECONDS_PER_DAY = 24 * 60 * 60


def throughput(config: Config, records: list[Record], sessions: list[Record]) -> dict[str, Any]:
    """Figures by name; those that are not known are left out.

    Args:
        records: of the progress lines.
        sessions: lines of sessions.jsonl.
    """
    rate = median(record["images_per_second"] for record in records)
    tflops = median(record["tflops"] for record in records)
    tokens = config.spec.num_tokens
    ranks = {session["ranks"] for session in sessions}
    numbers: dict[str, Any] = {
        "images_per_second_median": rate,
        "tokens_per_image": tokens,
        "tokens_per_second": rate * tokens,
        "tflops_median": tflops,
    }
    if len(ranks) == 1:
        devices = ranks.pop()
        numbers |= {
            "images_per_second_per_device": rate / devices,
            "tokens_per_second_per_device": rate * tokens / devices,
            "tflops_per_device": tflops / devices,
            "projected_days": projected_days(rate / devices),
        }
    numbers |= model_flops_utilization(records, sessions)
    memory = [record["memory_peak_gb"] for record in records if "memory_peak_gb" in record]
    if memory:
        numbers["memory_peak_gb"] = max(memory)
    seconds = wall_time(records, sessions)
    if seconds:
        wall = sum(seconds.values())
        useful = sum(seconds[part] for part in USEFUL)
        numbers |= {
            "wall_seconds": round(wall, 3),
            "wall_seconds_of": seconds,
            "goodput": round(useful / max(wall, 1e-9), 4),
            "images_per_second_of_wall_time": records[-1]["images"] / max(wall, 1e-9),
        }
    return numbers


def model_flops_utilization(records: list[Record], sessions: list[Record]) -> dict[str, Any]:
    """The median share of the peak and the peak; {} where a device's peak is not known."""
    shares = [record["mfu"] for record in records if "mfu" in record]
    peaks = {PEAKS.get(session["device"]) for session in sessions}
    if not shares or len(peaks) != 1:
        return {}
    peak = peaks.pop()
    return {"mfu_median": median(shares), "peak_tflops": peak / 1e12} if peak else {}


def wall_time(records: list[Record], sessions: list[Record]) -> dict[str, float]:
    """{part: seconds} of the wall time of all sessions, in the order of WORDS; {} where a record or
    a session does not say.

    What a session that failed did after its last record is recorded nowhere. "lost" is the time of
    whole records, of which the first may have begun before the checkpoint. A checkpoint that begins
    while a GPU is still at work counts both: then the sum is a little more than the clock's.
    """
    has_parts = all("data_seconds" in record for record in records)
    has_starts = all("lost_seconds" in session for session in sessions)
    if not (has_parts and has_starts):
        return {}
    lines = [*records, *sessions]

    def total(name: str) -> float:
        return sum((line.get(f"{name}_seconds", 0.0) for line in lines), 0.0)

    seconds = {part: total(part) for part in PARTS}
    seconds["restart"] = total("start") + total("lost")
    wall = total("step") + total("other") + seconds["restart"]
    seconds["rest"] = max(wall - sum(seconds.values()), 0.0)
    return {part: round(seconds[part], 3) for part in WORDS}


def projected_days(rate_per_device: float) -> dict[str, float]:
    """{number of devices: days} of EPOCHS epochs of ImageNet, if n devices are n times as fast."""
    images = EPOCHS * IMAGENET_IMAGES
    one_device = images / max(rate_per_device, 1e-9) / SECONDS_PER_DAY
    return {str(devices): one_device / devices for devices in DEVICES}


# ------------------------------------------------------------------------------------ on the page


def throughput_section(
    numbers: dict[str, Any], records: list[Record], sessions: list[Record], folder: Path, name: str
) -> list[str]:
    """Paragraphs of Markdown; the chart is written to `folder`."""
    parts = ["## Throughput", rates_table(numbers, sessions), f"FLOPs: {FLOPS_FORMULA}."]
    split = numbers.get("wall_seconds_of", {})
    images = [record["images"] for record in records]
    rates = [record["images_per_second"] for record in records]
    in_words = {WORDS[part]: seconds for part, seconds in split.items()}
    wall = duration(numbers.get("wall_seconds", 0.0))
    title = f"{name}: what {wall} of wall time went to"
    if save_time_and_rate(in_words, images, rates, folder / CHART, title):
        parts.append(f"![throughput]({CHART})")
    parts += ["## Wall time", wall_time_table(numbers)]
    parts += [f"## {EPOCHS} epochs of ImageNet, projected", projection(numbers)]
    return parts


def rates_table(numbers: dict[str, Any], sessions: list[Record]) -> str:
    """Rates of all devices and of one, MFU, memory."""

    def row(words: str, name: str, per_device: str | None = None) -> list[Any]:
        return [words, known(numbers, name), known(numbers, per_device) if per_device else ""]

    devices = ", ".join(sorted({str(session["device"]) for session in sessions}))
    mfu = f"n/a: no dense peak is known of {devices}"
    if "mfu_median" in numbers:
        peak = show(numbers["peak_tflops"])
        mfu = f"{share(numbers['mfu_median'])} of {peak} TFLOP/s, the dense bf16 peak of {devices}"
    is_cpu = any("processor" in session for session in sessions)
    whose = "the process, data included" if is_cpu else "tensors on the GPU of rank 0"
    rows = [
        row("images/s", "images_per_second_median", "images_per_second_per_device"),
        row("tokens/s", "tokens_per_second", "tokens_per_second_per_device"),
        row("TFLOP/s", "tflops_median", "tflops_per_device"),
        row("images/s of wall time", "images_per_second_of_wall_time"),
        ["MFU", mfu, ""],
        row(f"memory peak, GB ({whose})", "memory_peak_gb"),
    ]
    return table(["median of the progress lines", "all devices", "per device"], rows, [1, 2])


def wall_time_table(numbers: dict[str, Any]) -> str:
    """Seconds and shares of what the wall time went to."""
    if "wall_seconds" not in numbers:
        return "n/a: this run has records of an older version, which do not say."
    wall = numbers["wall_seconds"]
    rows = [
        [WORDS[part], seconds, share(seconds / max(wall, 1e-9))]
        for part, seconds in numbers["wall_seconds_of"].items()
    ]
    rows.append(["all sessions", wall, f"goodput {share(numbers['goodput'])}"])
    return "\n\n".join(
        [
            table(["", "seconds", "share"], rows, numbers=[1, 2]),
            "Goodput: the share of forward, backward and optimizer. Restart: from the start of a "
            "session to its first step, and progress lines whose steps were done again because "
            "they lay behind the last checkpoint. Of rank 0; what a session that failed did after "
            "its last progress line is not in it.",
        ]
    )


def projection(numbers: dict[str, Any]) -> str:
    """Days on several numbers of devices."""
    if "projected_days" not in numbers:
        return "n/a: the sessions ran on different numbers of devices."
    rows = numbers["projected_days"].items()
    return "\n\n".join(
        [
            table(["devices", "days"], rows, numbers=[0, 1]),
            f"A projection, not a measurement: {EPOCHS} x {IMAGENET_IMAGES:,} images with the "
            "settings of this run, by its rate per device, steps alone, and under the assumption "
            "of perfect scaling (n devices are n times as fast).",
        ]
    )


def known(numbers: dict[str, Any], name: str) -> Any:
    """A figure, or "n/a"."""
    return numbers.get(name, "n/a")
