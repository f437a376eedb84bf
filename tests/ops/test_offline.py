"""Every kernel, in every configuration of the tuning tables, compiled for GPUs without one.

Figures of kernels that did not change come from bench/results/offline.json; the rest is compiled.
"""

import importlib
import importlib.util
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.jit import KernelInterface  # noqa: E402

import heptapod_fast.kernels  # noqa: E402
from heptapod_fast.kernels import offline, offline_figures, tuning  # noqa: E402
from heptapod_fast.kernels.fingerprint import fingerprint  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ["sm_80", "sm_90", pytest.param("sm_100", marks=pytest.mark.slow)]


def python(*words, **environment):
    """Another Python, without the interpreter of Triton unless the environment says so."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", **environment},
    )


def compile_offline(figures, *arguments):
    """`python -m heptapod_fast.kernels.offline`: (rows, what it printed).

    figures: the file that it uses and updates.
    """
    rows = figures.with_name("rows.json")
    words = ("--figures", figures, "--json", rows, "--processes", 1, *arguments)
    done = python("-m", "heptapod_fast.kernels.offline", *words)
    assert rows.exists(), done.stderr
    return json.loads(rows.read_text()), done.stdout


@pytest.fixture
def figures(tmp_path):
    """A copy of the committed file."""
    path = tmp_path / "offline.json"
    path.write_text(offline_figures.FILE.read_text())
    return path


# Every case.


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("module", offline.modules())
def test_every_case_compiles_and_fits(arch, module, figures):
    cases = list(offline.cases(arch, [module]))
    known = offline_figures.read(figures)
    keys = [offline_figures.key(case, arch) for case in cases]
    if all(key in known for key in keys):
        rows = [offline.row(case, arch, known[key]) for case, key in zip(cases, keys)]
    else:
        rows, _ = compile_offline(figures, "--arch", arch, "--module", module)
    assert rows and [row["case"] for row in rows] == [case.name for case in cases]
    assert {row["arch"] for row in rows} == {arch}
    wrong = {row["case"]: offline.faults(row) for row in rows if offline.faults(row)}
    assert not wrong


COMPILE = """
import json, sys
from heptapod_fast.kernels import offline
print(json.dumps(offline.compile_all(json.loads(sys.argv[1]), 1)))
"""


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_file_holds_what_the_compiler_says(arch, tmp_path):
    """A case of every second module on each architecture, compiled whatever is known of it."""
    known = offline_figures.read(offline_figures.FILE)
    begin = {"sm_80": 0, "sm_90": 1}[arch]
    firsts = [next(offline.cases(arch, [module])) for module in offline.modules()[begin::2]]
    expected = {case.name: known.get(offline_figures.key(case, arch)) for case in firsts}
    expected = {name: figures for name, figures in expected.items() if figures is not None}
    if not expected:
        pytest.skip("nothing is known for these kernels and this Triton")
    jobs = [(arch, name) for name in expected]
    done = python("-c", COMPILE, json.dumps(jobs), TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert dict(zip(expected, json.loads(done.stdout), strict=True)) == expected


@pytest.mark.parametrize("arch", offline.ARCHITECTURES)
def test_names_of_cases_are_unique(arch):
    names = [case.name for case in offline.cases(arch)]
    assert len(names) > 100 and len(set(names)) == len(names)


def test_every_kernel_has_a_case():
    """Kernels are what is launched, by the end of their names."""
    compiled = {case.kernel for arch in offline.ARCHITECTURES for case in offline.cases(arch)}
    for info in pkgutil.iter_modules(heptapod_fast.kernels.__path__):
        module = importlib.import_module(f"heptapod_fast.kernels.{info.name}")
        for name, value in vars(module).items():
            if isinstance(value, KernelInterface) and name.endswith("_kernel"):
                assert value in compiled, f"{info.name}.{name}"


def test_spills_are_excused_with_a_reason():
    assert all(
        case.why for arch in offline.ARCHITECTURES for case in offline.cases(arch) if case.spill
    )


# What is wrong with a case.


def test_faults_are_found():
    fine = dict(
        arch="sm_90",
        stack=0,
        allowed=0,
        shared=1024,
        hgmma=0,
        hmma=0,
        tensor_cores=False,
        hmma_allowed=0,
        ctas=1,
        ctas_wanted=1,
    )
    assert not offline.faults(fine)
    assert "8 bytes of stack" in offline.faults(fine | dict(stack=8))[0]
    assert not offline.faults(fine | dict(stack=8, allowed=8))
    assert "shared" in offline.faults(fine | dict(shared=240_000))[0]
    cores = fine | dict(tensor_cores=True, hgmma=4)
    assert "matrix" in offline.faults(cores | dict(hgmma=0, hmma=4))[0]
    assert not offline.faults(cores)
    assert not offline.faults(cores | dict(arch="sm_80", hgmma=0, hmma=4))
    assert "8 HMMA" in offline.faults(cores | dict(hmma=8))[0]
    assert not offline.faults(cores | dict(hmma=8, hmma_allowed=8))
    assert "1 programs" in offline.faults(fine | dict(ctas_wanted=2))[0]


def test_programs_on_an_sm():
    """By hand: 65536 registers, 64 warps, 228 KB of shared memory of which each program loses 1."""
    ctas = offline.ctas
    assert ctas("sm_90", 128, 4, 40 * 1024) == 4 and ctas("sm_90", 129, 4, 40 * 1024) == 3
    assert ctas("sm_90", 32, 8, 0) == 8 and ctas("sm_90", 32, 4, 113 * 1024) == 2
    assert ctas("sm_90", 32, 4, 114 * 1024) == 1 and ctas("sm_80", 32, 4, 82 * 1024) == 1


# The file.


def test_the_file_is_of_the_pinned_triton():
    pins = (ROOT / "constraints.txt").read_text().split()
    (version,) = [pin.removeprefix("triton==") for pin in pins if pin.startswith("triton==")]
    known = offline_figures.read(offline_figures.FILE)
    assert len(known) > 300
    assert {key.split("; ")[2] for key in known} == {f"triton {version}"}
    lines = offline_figures.FILE.read_text().splitlines()
    assert len(lines) == len(known) + 2


def test_only_what_is_not_in_the_file_is_compiled(figures):
    """Known cases are taken from it, others are put into it, and those that are gone leave it."""
    (case,) = offline.cases("sm_90", ["columns"])
    key = offline_figures.key(case, "sm_90")
    known = offline_figures.read(figures)
    known.pop(key, None)
    other = {offline_figures.key(case, "sm_80"): dict(registers=7)}
    offline_figures.write(figures, known | other | {"sm_90; gone; triton 1.0; 0": {}})

    arguments = ("--arch", "sm_90", "--module", "columns")
    rows, printed = compile_offline(figures, *arguments)
    assert "\n1 compiled, 0 taken from" in printed
    updated = offline_figures.read(figures)
    assert rows == [offline.row(case, "sm_90", updated[key])] and rows[0]["registers"] > 16
    assert updated.keys() - known.keys() - other.keys() == {key}
    assert updated.items() >= other.items()

    again, printed = compile_offline(figures, *arguments)
    assert "\n0 compiled, 1 taken from" in printed and again == rows
    assert offline_figures.read(figures) == updated

    arguments = ("--arch", "sm_90", "--only", "column_sum", "no such case", "--fresh")
    again, printed = compile_offline(figures, *arguments)
    assert "\n1 compiled, 0 taken from" in printed and again == rows


def test_keys_depend_on_everything_that_figures_do(monkeypatch):
    (case,) = offline.cases("sm_90", ["dropout"])

    def key(arch="sm_90", **changes):
        return offline_figures.key(offline.Case(**(vars(case) | changes)), arch)

    assert key() == key() == key(spill=8, why="a reason", hmma=3, ctas=2)
    others = [
        key("sm_80"),
        key(name="another"),
        key(options=dict(num_warps=8)),
        key(types=case.types | dict(x_ptr="*fp32")),
        key(constexprs=case.constexprs | dict(BLOCK=2048)),
        key(unaligned=("width",)),
        key(kernel=next(offline.cases("sm_90", ["columns"])).kernel),
    ]
    monkeypatch.setattr("triton.__version__", "9.9")
    others.append(key())
    assert len({*others, offline_figures.key(case, "sm_90")}) == len(others)
    monkeypatch.undo()
    assert key() not in others


def test_a_file_is_replaced_at_once(tmp_path, monkeypatch):
    path = tmp_path / "figures.json"
    offline_figures.write(path, {"b": dict(x=1), "a": dict(x=2)})
    assert path.read_text() == '{\n"b": {"x": 1},\n"a": {"x": 2}\n}\n'
    offline_figures.write(path, {})
    assert offline_figures.read(path) == {} and offline_figures.read(tmp_path / "none") == {}

    def fail(*paths):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        offline_figures.write(path, {"c": {}})
    assert offline_figures.read(path) == {} and list(tmp_path.iterdir()) == [path]


# The hash of a kernel's source.

SOURCE = '''
import triton
import triton.language as tl

FACTOR = tl.constexpr(3)
LIMITS = (5, 7)
UNUSED = 1
FREE = ["count"]


@triton.jit
def inner(x):
    return tl.where(x < 4, x, 0)


@triton.jit
def helper(x, LIMIT: tl.constexpr):
    return inner(x) * FACTOR + LIMIT


@triton.jit
def unused(x):
    return x


@triton.jit(do_not_specialize=FREE)
def kernel(x_ptr, count, BLOCK: tl.constexpr):
    """Doubles."""
    at = tl.arange(0, BLOCK)  # [BLOCK]
    x = tl.load(x_ptr + at, mask=at < count)
    tl.store(x_ptr + at, helper(x, LIMITS[0]), mask=at < count)
'''


@pytest.fixture
def fingerprint_of(tmp_path):
    """The fingerprint of `kernel` in a module of this text."""
    made = []

    def load(text):
        path = tmp_path / f"kernels_{len(made)}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        made.append(module)
        return fingerprint(module.kernel)

    return load


@pytest.mark.parametrize(
    "old, new",
    [
        ("at < count)\n    tl.store", "at <= count)\n    tl.store"),  # the body
        ("x_ptr, count", "x_ptr, number, count"),  # the arguments
        ("* FACTOR", "- FACTOR"),  # a called function
        ("x < 4", "x < 6"),  # one that this calls
        ("constexpr(3)", "constexpr(2)"),  # a constant of a called function
        ("(5, 7)", "(6, 7)"),  # a constant
        ('["count"]', "[]"),  # a constant of the decorator
    ],
)
def test_fingerprints_change_with_what_is_computed(fingerprint_of, old, new):
    assert SOURCE.count(old) == 1
    assert fingerprint_of(SOURCE) != fingerprint_of(SOURCE.replace(old, new))


@pytest.mark.parametrize(
    "old, new",
    [
        ("Doubles.", "Adds."),  # a docstring
        ("# [BLOCK]", "# offsets"),  # a comment
        ("    return inner(x)", "    # More.\n\n    return inner(x)"),  # lines
        ("x_ptr + at, helper", "x_ptr\n        + at, helper"),  # formatting
        ("UNUSED = 1", "UNUSED = 2"),
        ("return x\n", "return x + 1\n"),  # a function that is not called
        ("import triton\n", "import math\n\nimport triton\n"),  # line numbers
    ],
)
def test_fingerprints_do_not_change_with_how_it_is_written(fingerprint_of, old, new):
    assert SOURCE.count(old) == 1
    assert fingerprint_of(SOURCE) == fingerprint_of(SOURCE.replace(old, new))


def test_fingerprints_reach_into_modules(fingerprint_of, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for value in (3, 4):
        name = f"constants_of_{value}"
        (tmp_path / f"{name}.py").write_text(f"FACTOR = {value}\n")
        text = SOURCE.replace("FACTOR = tl.constexpr(3)", f"import {name} as constants")
        found.append(fingerprint_of(text.replace("* FACTOR", "* constants.FACTOR")))
    assert found[0] != found[1]


def test_a_global_without_a_stable_text_is_refused(fingerprint_of):
    with pytest.raises(TypeError, match="FACTOR is a object, whose value has no stable text"):
        fingerprint_of(SOURCE.replace("tl.constexpr(3)", "object()"))
    with pytest.raises(TypeError, match="MISSING is defined nowhere"):
        fingerprint_of(SOURCE.replace("x < 4", "x < MISSING"))


def test_the_compilers_kernels_have_the_interpreters_fingerprints():
    """What the interpreter replaces, `triton.jit` and the functions of `tl`, plays no part."""
    code = (
        "from heptapod_fast.kernels import offline\n"
        "from heptapod_fast.kernels.fingerprint import fingerprint\n"
        "print(*sorted({fingerprint(case.kernel) for case in offline.cases('sm_90')}))"
    )
    found = []
    for interpret in "01":
        done = python("-c", code, TRITON_INTERPRET=interpret)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.split())
    assert len(found[0]) > 10 and found[0] == found[1]


# The tables of configurations.


def test_tables_cover_the_model_and_refuse_beyond():
    cpu = torch.device("cpu")
    for path in sorted(tuning.FOLDER.glob("*.json")):
        table = tuning.table(path.stem)
        assert "tuned" in table and {"sm_80", "sm_90"} <= table.keys()
        for kernel in table["sm_90"]:
            assert table["sm_80"].keys() == table["sm_90"].keys()
            most = tuning.largest(path.stem, kernel)
            assert tuning.lookup(path.stem, kernel, most, cpu) == table["sm_90"][kernel][str(most)]
            with pytest.raises(ValueError, match=f"above {most}"):
                tuning.lookup(path.stem, kernel, most + 1, cpu)
    with pytest.raises(RuntimeError, match="8.0 or newer, this GPU has 7.5"):
        tuning.nearest("bias_gelu", 75)
    assert tuning.nearest("bias_gelu", 89) == "sm_80"
    assert tuning.nearest("bias_gelu", 100) == "sm_90"
