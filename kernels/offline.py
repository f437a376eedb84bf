"""Compiles every kernel in every configuration of the tuning table, without a GPU.

    python -m heptapod_fast.kernels.offline [--arch sm_80 sm_90 sm_100] [--only TEXT]
        [--json FILE] [--markdown FILE]

prints registers, stack, shared memory and matrix instructions of each as a table. A stack is a
spill. Kernel modules name their cases in `compile_cases(arch)`. Triton's own cache, keyed by
source, makes a second run quick.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration, as the launcher would call it.

    types: argument -> "*bf16", "i32", "fp32"...; arguments that are None at the launch belong into
    constexprs. unaligned: pointers and integers that are not divisible by 16. tensor_cores: whether
    matrix instructions must appear, on sm_90 HGMMA and no more than `hmma` of the older HMMA.
    spill: bytes of stack that are accepted, with the reason in `why`. ctas: how many programs must
    fit on an SM of sm_90 at once.
    """

    name: str
    kernel: object
    types: dict[str, str]
    constexprs: dict
    options: dict[str, int]
    unaligned: tuple[str, ...] = ()
    tensor_cores: bool = False
    spill: int = 0
    why: str = ""
    hmma: int = 0
    ctas: int = 1
    only: tuple[str, ...] = field(default=ARCHITECTURES)


def cases(arch: str) -> Iterator[Case]:
    """Every case of every kernel module, for one architecture."""
    package = importlib.import_module("heptapod_fast.kernels")
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
        if info.name == "offline":
            continue
        module = importlib.import_module(f"heptapod_fast.kernels.{info.name}")
        for case in getattr(module, "compile_cases", lambda arch: ())(arch):
            if arch in case.only:
                yield case


def compile_case(case: Case, arch: str) -> dict:
    """{"registers", "stack", "shared", "hgmma", "hmma", ...} of one case; hmma: what other
    architectures than sm_90 multiply matrices with (UTCHMMA on sm_100) too."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    types = dict(case.types) | {name: "constexpr" for name in case.constexprs}
    missing = [name for name in names if name not in types]
    if missing or set(types) - set(names):
        raise ValueError(
            f"{case.name}: arguments without a type {missing}, unknown "
            f"{sorted(set(types) - set(names))}"
        )
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if types[name][0] in "*i"
        and name not in case.unaligned
        and name not in (case.kernel.do_not_specialize or ())
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
    number = {key: int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK")}
    return {
        "case": case.name,
        "arch": arch,
        **case.options,
        "registers": number["REG"],
        "stack": number["STACK"],
        "shared": compiled.metadata.shared,
        "hgmma": assembly.count("HGMMA"),
        "hmma": len(re.findall(r"\b(?:UTC)?HMMA", assembly)),
        "allowed": case.spill,
        "why": case.why,
        "tensor_cores": case.tensor_cores,
        "hmma_allowed": case.hmma,
        "ctas_wanted": case.ctas,
        "ctas": ctas(
            arch, number["REG"], case.options.get("num_warps", 4), compiled.metadata.shared
        ),
    }


def ctas(arch: str, registers: int, warps: int, shared: int) -> int:
    """Programs that fit on an SM at once, by registers, warps and shared memory."""
    per_warp = 256 * -(-registers * 32 // 256)
    total = SHARED_LIMIT[arch] + 1024  # the driver keeps 1 KB of every program's
    return min(65536 // (per_warp * warps), 64 // warps, total // (shared + 1024))


def compile_all(architectures: list[str], only: str = "") -> list[dict]:
    """Figures of every case whose name contains `only`; as many processes as there are cores."""
    jobs = [
        (arch, i)
        for arch in architectures
        for i, case in enumerate(cases(arch))
        if only in case.name
    ]
    # Processes of their own: a forked one would share what PyTorch has started.
    workers = ProcessPoolExecutor(
        max(1, min(len(jobs), len(os.sched_getaffinity(0)))),
        mp_context=multiprocessing.get_context("spawn"),
    )
    with workers:
        return list(workers.map(_compile_job, jobs, chunksize=4))


def _compile_job(job: tuple[str, int]) -> dict:
    arch, index = job
    return compile_case(list(cases(arch))[index], arch)


def _cuobjdump(*arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    done = subprocess.run([tool, *arguments], capture_output=True, text=True)
    return done.stdout + done.stderr


def faults(found: dict) -> list[str]:
    """What is wrong with a compiled case: spills, shared memory, missing matrix instructions."""
    wrong = []
    if found["stack"] > found["allowed"]:
        wrong.append(f"{found['stack']} bytes of stack, {found['allowed']} accepted")
    if found["shared"] > SHARED_LIMIT[found["arch"]]:
        wrong.append(f"{found['shared']} bytes of shared memory")
    if found["tensor_cores"] and not found["hgmma" if found["arch"] == "sm_90" else "hmma"]:
        wrong.append("no matrix instructions")
    if found["arch"] == "sm_90" and found["tensor_cores"] and found["hmma"] > found["hmma_allowed"]:
        wrong.append(f"{found['hmma']} HMMA, {found['hmma_allowed']} accepted")
    if found["arch"] == "sm_90" and found["ctas"] < found["ctas_wanted"]:
        wrong.append(f"{found['ctas']} programs on an SM, {found['ctas_wanted']} wanted")
    return wrong


def markdown(results: list[dict]) -> str:
    """The figures as a table."""
    lines = [
        "| kernel | arch | warps | registers | stack | shared KB | programs per SM | HGMMA | "
        "HMMA |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        lines.append(
            f"| {r['case']} | {r['arch']} | {r.get('num_warps', 4)} | "
            f"{r['registers']} | {r['stack']} | {r['shared'] / 1024:.1f} | {r['ctas']} | "
            f"{r['hgmma']} | {r['hmma']} |"
        )
    return "\n".join(lines)


def page(results: list[dict]) -> str:
    """The table with what made it, and why the spills in it are accepted."""
    import triton

    excused = sorted(
        {
            f"- {r['case']}, {r['arch']}: {r['stack']} bytes, {r['why']}"
            for r in results
            if r["stack"]
        }
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
            markdown(results),
            "",
        ]
    )


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description="Compile every kernel offline.")
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    options = parser.parse_args()
    results = compile_all(options.arch, options.only)
    if not results:
        raise SystemExit(f"--only {options.only}: no case has this in its name")
    print(markdown(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(page(results))
    wrong = [f"{r['case']} on {r['arch']}: {fault}" for r in results for fault in faults(r)]
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
