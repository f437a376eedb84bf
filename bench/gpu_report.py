"""Tables from the files that bench/gpu.py writes: GPU.md, and PENDING.md for what is not settled.

Nothing is typed: figures come from gpu/*.json, gates from the benchmarks' own cases.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

from bench.gpu_sections import OPERATIONS, SECTIONS, case_name

CONFIGS = Path(__file__).resolve().parent.parent / "kernels/configs"


def write(out: Path) -> None:
    """DIR/GPU.md and DIR/PENDING.md from DIR/gpu/*.json."""
    results = sorted(
        (json.loads(path.read_text()) for path in (out / "gpu").glob("*.json")),
        key=lambda result: (result["date"], result["gpu"]),
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "GPU.md").write_text(gpu_page(results))
    (out / "PENDING.md").write_text(pending_page(results))


# ------------------------------------------------------------------------------------------- GPU.md


def gpu_page(results: list[dict]) -> str:
    """Every result, newest last."""
    lines = [
        "# Measured on GPUs",
        "",
        "Made by `python bench/gpu.py` from `gpu/*.json`. Times are medians of CUDA-graph "
        "replays over inputs larger than L2, all contenders in turns; the share is that of "
        "the floor (bytes over measured copy bandwidth, or products over the measured square "
        "product, whichever is longer). `without graphs` is the same ratio for single calls "
        "as eager mode launches them, the host's work included.",
    ]
    if not results:
        lines += ["", "Nothing has been measured on a GPU yet; see PENDING.md."]
    for result in results:
        versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
        lines += ["", f"## {result['gpu']}, {result['date']}", "", f"{versions}."]
        for name, section in result["sections"].items():
            lines += ["", f"### {name}", ""]
            if section["status"] != "done":
                lines += [
                    f"{section['status']}: {section['why'].splitlines()[-1][:300]}"
                    if section["why"]
                    else section["status"],
                    "",
                ]
            lines += section_table(name, section["rows"], ceilings_of(result, results))
    return "\n".join(lines) + "\n"


def ceilings_of(result: dict, results: list[dict] = ()) -> dict[str, float]:
    """{"copy": bytes/s, "product": FLOP/s} of the same file, or the newest of this kind of GPU."""
    same = [other for other in results if other["gpu"] == result["gpu"]]
    for source in (result, *reversed(same)):
        found: dict[str, float] = {}
        for row in source["sections"].get("ceilings", {}).get("rows", []):
            for contender in row["contenders"].values():
                if contender["seconds"] and ": copy " in row["case"]:
                    rate = row["bytes"] / contender["seconds"]
                    found["copy"] = max(found.get("copy", 0.0), rate)
                elif contender["seconds"] and ": product square" in row["case"]:
                    found["product"] = row["flops"] / contender["seconds"]
        if found:
            return found
    return {}


def section_table(name: str, rows: list[dict], ceilings: dict[str, float]) -> list[str]:
    """Markdown of one section."""
    if name == "smoke" or name.startswith("tests"):
        return [
            f"- {row['case']}: {'passed' if row['passed'] else 'FAILED'}, {row['summary']}"
            for row in rows
        ]
    if name.startswith(("step", "baseline")):
        return step_table(rows)
    if name == "ceilings":
        return [
            "| what | us | GB/s | TFLOP/s |",
            "|---|---:|---:|---:|",
            *(ceiling_line(row) for row in rows),
        ]
    lines = [
        "| case | ours us | share of floor | best peer | its us | ratio | without graphs | "
        "gate | aim |",
        "|---|---:|---:|---|---:|---:|---:|---|---|",
    ]
    return lines + [operation_line(row, ceilings) for row in rows] + absent_peers(rows)


def absent_peers(rows: list[dict]) -> list[str]:
    """Peers that did not run, and why: not installed, refused the shape, broke."""
    cases: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, contender in row["contenders"].items():
            if contender["why"] and name != "ours":
                why = f"{'' if contender.get('missing') else 'FAILED, '}{contender['why']}"
                cases.setdefault((name, why.replace("\n", " ")[:300]), []).append(row["case"])
    lines = [
        f"- {name}: {why} ({found[0] if len(found) == 1 else f'{len(found)} cases'})"
        for (name, why), found in cases.items()
    ]
    return ["", "Peers that did not run:", "", *lines] if lines else []


def ceiling_line(row: dict) -> str:
    """One measured ceiling."""
    seconds = next(iter(row["contenders"].values()))["seconds"]
    if not seconds:
        return f"| {row['case']} | failed | | |"
    rate = f"{row['flops'] / seconds / 1e12:.0f}" if row["flops"] else ""
    return f"| {row['case']} | {seconds * 1e6:.1f} | {row['bytes'] / seconds / 1e9:.0f} | {rate} |"


def judged(row: dict, ceilings: dict[str, float]) -> dict:
    """Ours against the floor and the best peer; whether gate and aim are met (None: unknown)."""
    ours = row["contenders"].get("ours", {}).get("seconds")
    peers = {
        name: c["seconds"]
        for name, c in row["contenders"].items()
        if c["seconds"] and not name.startswith("ours")
    }
    best = min(peers, key=peers.get) if peers else None
    ratios = {name: seconds / ours for name, seconds in peers.items()} if ours else {}
    if ratios:
        ratios["best peer"] = ratios[best]
    # A peer that broke might have been the best one: then only that it is met is unknown.
    broken = any(
        c["why"] and not c.get("missing")
        for name, c in row["contenders"].items()
        if not name.startswith("ours")
    )
    floor = max(
        (
            row["bytes"] / ceilings["copy"] if "copy" in ceilings else 0.0,
            row["flops"] / ceilings["product"] if "product" in ceilings else 0.0,
        )
    )
    found = {
        "ours": ours,
        "peer": best,
        "peer_seconds": peers.get(best),
        "ratio": ratios.get("best peer"),
        "ratios": ratios,
        "share": floor / ours if floor and ours else None,
    }
    alone = [
        row["contenders"][name].get("ungraphed") if name in row["contenders"] else None
        for name in ("ours", best)
    ]
    found["ungraphed"] = alone[1] / alone[0] if None not in alone else None
    copy = row["bytes"] / ours / ceilings["copy"] if ours and "copy" in ceilings else None
    found["copy"] = copy
    for key in ("gate", "aim"):
        wanted = row.get(key, "")
        found[key] = meets(wanted, ratios, copy)
        if found[key] and broken and "best peer" in wanted:
            found[key] = None
    return found


def meets(wanted: str, ratios: dict[str, float], copy: float | None) -> bool | None:
    """Whether "1.15x best peer", "2x flex" and "75% of copy bandwidth", all that are there, are
    reached. ratios: {a peer or "best peer": its time over ours}.
    """
    answers = []
    for number, unit, peer in re.findall(r"([\d.]+)\s*(x|%) (best peer|[\w-]+)", wanted):
        found = ratios.get(peer) if unit == "x" else copy
        answers.append(
            None
            if found is None
            else found >= (float(number) if unit == "x" else float(number) / 100)
        )
    return None if not answers or None in answers else all(answers)


def operation_line(row: dict, ceilings: dict[str, float]) -> str:
    """One case of an operation."""
    found = judged(row, ceilings)
    if not found["ours"]:
        why = row["contenders"].get("ours", {}).get("why", "no contender of ours")
        first = why.splitlines()[0][:120] if why else ""
        return f"| {row['case']} | failed: {first} | | | | | | | |"
    says = {True: "met", False: "missed", None: "unknown"}
    cell = lambda key: f"{row[key]}: {says[found[key]]}" if row.get(key) else ""
    share = f"{found['share']:.0%}" if found["share"] else ""
    peer = (
        f"{found['peer']} | {found['peer_seconds'] * 1e6:.1f} | {found['ratio']:.2f}"
        if found["peer"]
        else "| |"
    )
    alone = f"{found['ungraphed']:.2f}" if found["ungraphed"] else ""
    return (
        f"| {row['case']} | {found['ours'] * 1e6:.1f} | {share} | {peer} | {alone} | "
        f"{cell('gate')} | {cell('aim')} |"
    )


def step_table(rows: list[dict]) -> list[str]:
    """Training steps, and the kernels of those that were profiled."""
    lines = [
        "| configuration | batch | images/s | quartiles | TFLOP/s | MFU | memory GB | estimated |",
        "|---|---:|---:|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['case']} | | failed: {row['failed'][:120]} | | | | | |")
            continue
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else ""
        lines.append(
            f"| {row['case']} | {row['batch']} | {row['images_per_second']} | "
            f"{row['quartiles'][0]} to {row['quartiles'][1]} | {row['tflops']} | {mfu} | "
            f"{row['memory_GB']} | {row['estimated_GB']} |"
        )
    for row in rows:
        if row.get("kernels"):
            lines += [
                "",
                f"Device time of one step, {row['case']}:",
                "",
                "| kernel | us | calls |",
                "|---|---:|---:|",
            ]
            lines += [
                f"| `{k['kernel'][:90]}` | {k['us']} | {k['calls']} |" for k in row["kernels"][:25]
            ]
    return lines


# --------------------------------------------------------------------------------------- PENDING.md


def pending_page(results: list[dict]) -> str:
    """Sections that no file settles, gates that are missed or unknown, untuned configurations."""
    lines = [
        "# Not settled on a GPU yet",
        "",
        "Made by `python bench/gpu.py` from the files in `gpu/` (`python bench/gpu.py --list` "
        "names the sections).",
    ]
    if not results:
        lines += ["", "No GPU has run this code so far; figures for one are models or absent."]
    done = {
        name
        for result in results
        for name, section in result["sections"].items()
        if section["status"] == "done"
    }
    missing = [name for name in SECTIONS if name not in done]
    if missing:
        lines += ["", "## Sections never finished", ""]
        lines += [f"- `{name}`: {SECTIONS[name].__doc__.splitlines()[0]}" for name in missing]
    lines += open_gates(results) + open_data() + open_tables()
    return "\n".join(lines) + "\n"


def open_gates(results: list[dict]) -> list[str]:
    """Gates of the benchmarks' cases by their newest measurement."""
    newest: dict[tuple[str, str], dict] = {}
    for result in results:
        for name, section in result["sections"].items():
            if name.startswith("op-"):
                for row in section["rows"]:
                    key = name[3:].removesuffix("-LH").removesuffix("-compiled"), row["case"]
                    newest[key] = judged(row, ceilings_of(result, results))
    lines = []
    for operation in OPERATIONS:
        for case in importlib.import_module(f"bench.bench_{operation}").cases("cuda"):
            found = newest.get((operation, case_name(case)), {"gate": None, "aim": None})
            if case.gate and found["gate"] is not True:
                verdict = (
                    "missed"
                    if found["gate"] is False
                    else "unknown"
                    if found.get("ours")
                    else "not measured"
                )
                if found.get("ratio"):
                    verdict += f" ({standing(found, case.gate)})"
                lines.append(f"- {case_name(case)}: {case.gate} ({verdict})")
    return ["", "## Gates", "", *lines] if lines else []


def standing(found: dict, gate: str) -> str:
    """Where a case stands in the terms of its gate."""
    named = [name for name in found["ratios"] if f"x {name}" in gate and name != "best peer"]
    said = [f"{found['ratios'][name]:.2f}x {name}" for name in named]
    said = said or [f"{found['ratio']:.2f}x the best peer, {found['peer']}"]
    if "%" in gate and found["copy"]:
        said.append(f"{found['copy']:.0%} of copy bandwidth")
    return ", ".join(said)


def open_data() -> list[str]:
    """What needs a GPU together with DALI or zarr, measured by scripts of its own."""
    folder, lines = Path(__file__).parent / "results", []
    found = {
        kind: "".join(path.read_text() for path in sorted(folder.glob(f"{kind}*.json")))
        for kind in ("decode", "loader", "cache")
    }
    if ', dali cuda"' not in found["decode"]:
        lines.append(
            "- DALI decoding on a GPU: never run; >= 3x Pillow at equal threads (`python "
            "bench/bench_decode.py --out bench/results/decode-NAME.json`)"
        )
    if '"ours, gpu' not in found["loader"]:
        lines.append(
            "- caches on the GPU: never run (`python bench/bench_loader.py --out "
            "bench/results/loader-NAME.json`)"
        )
    if '"device": "NVIDIA' not in found["cache"]:
        lines.append(
            "- building a cache on a GPU: never run (`python bench/bench_cache.py --out "
            "bench/results/cache-NAME.json`)"
        )
    return ["", "## Data", "", *lines] if lines else []


def open_tables() -> list[str]:
    """Operations whose configurations no GPU has chosen."""
    untuned = [
        path.stem
        for path in sorted(CONFIGS.glob("*.json"))
        if not json.loads(path.read_text())["tuned"]
    ]
    lines = ["", "## Configurations", ""]
    if untuned:
        lines.append(
            "- chosen from registers and occupancy alone, `python bench/tune.py` has not "
            f"run: {', '.join(untuned)}"
        )
    return lines + [
        "- sm_80 and sm_100: compiled only (OFFLINE.md lists registers and spills), "
        "never tuned or run"
    ]
