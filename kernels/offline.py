"""Compiles every kernel in every configuration of the tuning tables, without a GPU.

    python -m heptapod_fast.kernels.offline [--arch sm_80 sm_90 sm_100] [--module NAME ...]
        [--only TEXT ...] [--fresh] [--json FILE] [--markdown FILE]

prints registers, stack, shared memory and matrix instructions of each as a table. A stack is a
spill. The cases are in offline_cases.py. Figures are kept in bench/results/offline.json under a
hash of the kernel's source (offline_figures.py): only what changed is compiled, and the file is
brought up to date. --fresh compiles everything that was chosen.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from heptapod_fast.kernels import offline_cases, offline_figures
from heptapod_fast.kernels.offline_case import ARCHITECTURES, Case

SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}


def modules() -> tuple[str, ...]:
    """Names of the kernel modules, in the order of the table."""
    return tuple(sorted(offline_cases.BY_MODULE))


def cases(arch: str, chosen: Sequence[str] = ()) -> Iterator[Case]:
    """Every case of the chosen kernel modules (none: of all), for one architecture."""
    for module in chosen or modules():
        for case in offline_cases.BY_MODULE[module](arch):
            if arch in case.only:
                yield case


def compile_case(case: Case, arch: str) -> dict[str, int]:
    """Figures of one case: registers, stack, shared memory, matrix instructions.

    hgmma: those of Hopper's warp groups. hmma: those of a warp, and UTCHMMA on sm_100.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    types = dict(case.types) | {name: "constexpr" for name in case.constexprs}
    missing = [name for name in names if name not in types]
    unknown = sorted(set(types) - set(names))
    if missing or unknown:
        raise ValueError(f"{case.name}: arguments without a type {missing}, unknown {unknown}")
    unspecialised = (*case.unaligned, *(case.kernel.do_not_specialize or ()))
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if types[name][0] in "*i" and name not in unspecialised
    }
    constexprs = {(names.index(name),): value for name, value in case.constexprs.items()}
    source = ASTSource(case.kernel, {name: types[name] for name in names}, constexprs, divisible)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", int(arch[3:]), 32), options=dict(case.options)
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        assembly = _cuobjdump("--dump-sass", file.name)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "hgmma": assembly.count("HGMMA"),
        "hmma": len(re.findall(r"\b(?:UTC)?HMMA", assembly)),
    }


def _cuobjdump(*arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    done = subprocess.run([tool, *arguments], capture_output=True, text=True)
    return done.stdout + done.stderr


def ctas(arch: str, registers: int, warps: int, shared: int) -> int:
    """Programs that fit on an SM at once, by registers, warps and shared memory."""
    per_warp = 256 * -(-registers * 32 // 256)
    total = SHARED_LIMIT[arch] + 1024  # the driver keeps 1 KB of every program's
    return min(65536 // (per_warp * warps), 64 // warps, total // (shared + 1024))


def row(case: Case, arch: str, figures: dict[str, int]) -> dict:
    """The figures of a case with its name, its options and what is accepted."""
    warps = case.options.get("num_warps", 4)
    return {
        "case": case.name,
        "arch": arch,
        **case.options,
        **figures,
        "allowed": case.spill,
        "why": case.why,
        "tensor_cores": case.tensor_cores,
        "hmma_allowed": case.hmma,
        "ctas_wanted": case.ctas,
        "ctas": ctas(arch, figures["registers"], warps, figures["shared"]),
    }


def faults(found: dict) -> list[str]:
    """What is wrong with a row: spills, shared memory, missing matrix instructions."""
    wrong = []
    if found["stack"] > found["allowed"]:
        wrong.append(f"{found['stack']} bytes of stack, {found['allowed']} accepted")
    if found["shared"] > SHARED_LIMIT[found["arch"]]:
        wrong.append(f"{found['shared']} bytes of shared memory")
    instruction = "hgmma" if found["arch"] == "sm_90" else "hmma"
    if found["tensor_cores"] and not found[instruction]:
        wrong.append("no matrix instructions")
    if found["arch"] == "sm_90" and found["tensor_cores"] and found["hmma"] > found["hmma_allowed"]:
        wrong.append(f"{found['hmma']} HMMA, {found['hmma_allowed']} accepted")
    if found["arch"] == "sm_90" and found["ctas"] < found["ctas_wanted"]:
        wrong.append(f"{found['ctas']} programs on an SM, {found['ctas_wanted']} wanted")
    return wrong


def compile_all(jobs: list[tuple[str, str]], processes: int) -> list[dict[str, int]]:
    """Figures of (architecture, name of a case) pairs, by so many processes at a time."""
    if processes == 1 or len(jobs) < 2:
        return [_compile_job(job) for job in jobs]
    # Processes of their own: a forked one would share what PyTorch has started.
    workers = ProcessPoolExecutor(
        min(processes, len(jobs)), mp_context=multiprocessing.get_context("spawn")
    )
    with workers:
        return list(workers.map(_compile_job, jobs, chunksize=4))


def _compile_job(job: tuple[str, str]) -> dict[str, int]:
    arch, name = job
    return compile_case(_by_name(arch)[name], arch)


@functools.cache
def _by_name(arch: str) -> dict[str, Case]:
    return {case.name: case for case in cases(arch)}


def markdown(rows: list[dict]) -> str:
    """The rows as a table."""
    lines = [
        "| kernel | arch | warps | registers | stack | shared KB | programs per SM | HGMMA | "
        "HMMA |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        lines.append(
            f"| {r['case']} | {r['arch']} | {r.get('num_warps', 4)} | "
            f"{r['registers']} | {r['stack']} | {r['shared'] / 1024:.1f} | {r['ctas']} | "
            f"{r['hgmma']} | {r['hmma']} |"
        )
    return "\n".join(lines)


def page(rows: list[dict]) -> str:
    """The table with what made it, and why the spills in it are accepted."""
    import triton

    excused = sorted(
        {f"- {r['case']}, {r['arch']}: {r['stack']} bytes, {r['why']}" for r in rows if r["stack"]}
    )
    return "\n".join(
        [
            "# Kernels, compiled without a GPU",
            "",
            "Made by `python -m heptapod_fast.kernels.offline`, Triton "
            f"{triton.__version__}. A stack is a spill. Programs per SM: how many fit at once, by "
            "registers, warps and shared memory.",
            "",
            *(["Accepted spills:", "", *excused, ""] if excused else []),
            markdown(rows),
            "",
        ]
    )


def bring_up_to_date(path: Path, figures: dict[str, dict]) -> None:
    """Write the figures that still belong to a case; the others are of kernels that are gone."""
    wanted = [offline_figures.key(case, arch) for arch in ARCHITECTURES for case in cases(arch)]
    offline_figures.write(path, {key: figures[key] for key in wanted if key in figures})


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compile every kernel offline.")
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--module", nargs="+", default=[], choices=modules(), help="default: all")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of cases")
    parser.add_argument("--fresh", action="store_true", help="compile what is known too")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--figures", type=Path, default=offline_figures.FILE, help="what is known")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    return parser.parse_args()


def main() -> None:
    """See the module's docstring."""
    options = parse_arguments()
    chosen = [
        (arch, case, offline_figures.key(case, arch))
        for arch in options.arch
        for case in cases(arch, options.module)
        if any(part in case.name for part in options.only)
    ]
    if not chosen:
        raise SystemExit(f"--only {' '.join(options.only)}: no case has this in its name")

    known = offline_figures.read(options.figures)
    missing = [entry for entry in chosen if options.fresh or entry[2] not in known]
    compiled = compile_all([(arch, case.name) for arch, case, _ in missing], options.processes)
    known |= {key: figures for (_, _, key), figures in zip(missing, compiled, strict=True)}
    if options.figures.parent.exists():
        bring_up_to_date(options.figures, known)

    rows = [row(case, arch, known[key]) for arch, case, key in chosen]
    print(markdown(rows))
    print(f"{len(missing)} compiled, {len(chosen) - len(missing)} taken from {options.figures}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(page(rows))
    wrong = [f"{r['case']} on {r['arch']}: {fault}" for r in rows for fault in faults(r)]
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
