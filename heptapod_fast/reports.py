"""Reports made from files: of a training run, and of a folder of benchmark results."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

from heptapod_fast.pictures import save_chart
from heptapod_fast.progress import duration
from heptapod_fast.runs import RunDir
from heptapod_fast.train.metrics import FLOPS_FORMULA, read_metrics

BENCH_PAGE = """# Measured

Made by `python tools/report.py bench/results` from the JSON files here. Single operations on CPU
are at toy shapes and show that the benchmarks work; `ours` is then what runs by default there: C++
for adamw_ema and global_norm, else the reference.

"""
DETAILS = ("min and max", "files", "MB", "preprocessing", "CPU ms per image")  # not in the README
MARKS = "<!-- bench:begin -->", "<!-- bench:end -->"


def report_run(folder: Path) -> None:
    """Throughput, loss curve and evaluation of one run."""
    run = RunDir(folder)
    config = run.read_config()
    if not run.metrics.exists():
        raise ValueError(f"{run.metrics} does not exist yet: the run has logged nothing")
    records = [r for r in read_metrics(run.metrics) if r.get("loss") is not None]
    if not records:
        raise ValueError(f"{run.metrics} has no record with a loss")
    last, rates = records[-1], [r["images_per_second"] for r in records]
    kept = ("system", "size", "data", "tokenizer", "image_size", "batch", "seed")
    numbers = {name: getattr(config, name) for name in kept}
    sessions = read_metrics(run.sessions)
    numbers |= {
        name: ", ".join(sorted({str(r[name]) for r in sessions}))
        for name in ("device", "ranks", "torch", "activations")
    }
    numbers |= {
        "images": last["images"],
        "steps": last["step"],
        "epochs": last["epoch"],
        "loss": last["loss"],
        "images_per_second_median": median(rates),
        "images_per_second_range": [min(rates), max(rates)],
        "tflops_median": median(r["tflops"] for r in records),
        "skipped_steps": last["skipped"],
    }
    if "mfu" in last:
        numbers["mfu_median"] = median(r["mfu"] for r in records)
    if (evaluation := folder / "evaluation.json").exists():
        numbers["evaluation"] = json.loads(evaluation.read_text())
    (folder / "report.json").write_text(json.dumps(numbers, indent=1) + "\n")
    lines = [
        f"# {config.system} {config.size} on {config.data}",
        "",
        f"{last['images']:,} of {config.images:,} images, last session "
        f"{duration(last['seconds'])}.",
        "",
        *table(numbers, leave_out="evaluation"),
    ]
    lines += ["", f"FLOPs: {FLOPS_FORMULA}."]
    if len(records) > 1:
        save_chart(
            [r["images"] for r in records],
            [r["loss"] for r in records],
            folder / "loss.png",
            f"{config.system} {config.size}: training loss",
            "images",
            "loss",
        )
        lines += ["", "![loss](loss.png)"]
    if evaluation.exists():
        lines += ["", "## Evaluation", "", *table(numbers["evaluation"])]
        lines += ["", "![samples](evaluation.png)"]
    (folder / "report.md").write_text("\n".join(lines) + "\n")
    print(f"written: {folder / 'report.md'}")


def table(values: dict, leave_out: str = "") -> list[str]:
    """Markdown of two columns."""
    rows = [f"| {k.replace('_', ' ')} | {show(v)} |" for k, v in values.items() if k != leave_out]
    return ["| | |", "|---|---|", *rows]


def show(value) -> str:
    """A number as a reader wants it."""
    if value is None:
        return ""
    if isinstance(value, list):
        return " to ".join(map(show, value))
    return (
        f"{value:,.4g}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )


def report_bench(folder: Path, root: Path) -> None:
    """One table per results file; for ROOT/bench/results, ROOT/README.md gets the short form."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ValueError(f"{folder} holds no JSON results: run make bench first")
    pages = [
        "\n\n".join([bench_table(path, brief) for path in files] + runs_table(folder / "runs"))
        for brief in (False, True)
    ]
    (folder / "README.md").write_text(BENCH_PAGE + pages[0] + "\n")
    print(f"written: {folder / 'README.md'}")
    readme = root / "README.md"
    ours = folder.resolve() == root / "bench" / "results"
    if ours and readme.exists() and MARKS[0] in readme.read_text():
        before, rest = readme.read_text().split(MARKS[0])
        _, after = rest.split(MARKS[1])
        readme.write_text(f"{before}{MARKS[0]}\n{pages[1]}\n{MARKS[1]}{after}")
        print(f"written: {readme}")


def bench_table(path: Path, brief: bool = False) -> str:
    """Markdown of one pytest-benchmark file. ValueError names a file that is none.

    brief: without the single operations, which CPUs run at toy shapes.
    """
    data = json.loads(path.read_text())
    if not isinstance(data, dict) or "benchmarks" not in data:
        raise ValueError(f"{path} is not a result of pytest-benchmark")
    machine = data.get("machine_info", {})
    lines = [
        f"**{path.stem}**: {machine.get('device', 'unknown device')}, Python "
        f"{machine.get('python_version', '?')}, torch {machine.get('torch', '?')}; "
        f"{data.get('datetime', '')[:10]}; `{machine.get('command', 'pytest bench/')}`",
        "",
        "| benchmark | median ms | quartiles | notes |",
        "|---|---:|---|---|",
    ]
    for b in data["benchmarks"]:
        s = b["stats"]
        if brief and "us" in b["extra_info"]:
            continue
        notes = ", ".join(
            f"{k} {show(v)}"
            for k, v in b["extra_info"].items()
            if not (brief and any(word in k for word in DETAILS))
        )
        lines.append(
            f"| {b['name']} | {1e3 * s['median']:.3f} | {1e3 * s['q1']:.3f} to "
            f"{1e3 * s['q3']:.3f} | {notes} |"
        )
    return "\n".join(lines)


def runs_table(folder: Path) -> list[str]:
    """One table of the training runs whose report.json was copied into `folder`; [] without any."""
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not rows:
        return []
    lines = [
        "**Training runs** (`report.json` of each in `bench/results/runs`)",
        "",
        "| run | images | images/s, median | symmetry accuracy | device |",
        "|---|---:|---:|---:|---|",
    ]
    for r in rows:
        accuracy = r.get("evaluation", {}).get("symmetry_accuracy")
        lines.append(
            f"| {r['system']} {r['size']}, {r['data']} {r['image_size']} px, "
            f"{r['tokenizer']} | {r['images']:,} | {r['images_per_second_median']:.0f} | "
            f"{show(accuracy)} | {r['device']}, torch {r['torch']} |"
        )
    return ["\n".join(lines)]
