"""The operation that docs/add-a-system.md adds is assembled from the page, and works."""

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if importlib.util.find_spec("heptapod_fast.ops.swiglu") is not None:
    pytest.skip("swiglu is there: the page was followed", allow_module_level=True)

from heptapod_fast.kernels import offline_cases, tuning
from tests.numerics import needs_triton
from tests.running import ROOT

PAGE = (ROOT / "docs" / "add-a-system.md").read_text().split("## An operation")[1]


def block_after(title: str, kind: str = "python") -> str:
    """The first block of code after a text."""
    return re.search(rf"```{kind}\n(.*?)```", PAGE.split(title)[1], re.DOTALL).group(1)


def module_of(name: str, code: str, folder: Path):
    """A module made of code; in a file, because Triton reads the sources of its kernels."""
    file = folder / f"{name.replace('.', '_')}.py"
    file.write_text(code)
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def rooms(folder: Path):
    """(the kernels, the tests of the page), with everything in its room."""
    with pytest.MonkeyPatch.context() as patch:
        configs = json.loads(block_after("`kernels/configs/swiglu.json`", "json"))
        table = tuning.table
        patch.setattr(tuning, "table", lambda name: configs if name == "swiglu" else table(name))
        kernels = put(patch, "heptapod_fast.kernels", "`kernels/swiglu.py`", folder)
        put(patch, "heptapod_fast.ops", "`heptapod_fast/ops/swiglu.py`", folder)
        code = block_after("`tests/ops/test_swiglu.py`")
        yield kernels, module_of("test_of_the_docs", code, folder)


def put(patch: pytest.MonkeyPatch, package: str, title: str, folder: Path):
    """The module swiglu of a package, from the page."""
    name = f"{package}.swiglu"
    module = module_of(name, block_after(title), folder)
    patch.setitem(sys.modules, name, module)
    patch.setattr(importlib.import_module(package), "swiglu", module, raising=False)
    return module


@pytest.fixture(scope="module")
def swiglu(tmp_path_factory):
    """See `rooms`."""
    with rooms(tmp_path_factory.mktemp("docs")) as found:
        yield found


@needs_triton
@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 64), (9, 2049)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_kernel_by_the_rule(swiglu, shape, dtype):
    _, tests = swiglu
    tests.test_kernel_by_the_rule(shape, dtype)


@needs_triton
def test_its_operator(swiglu):
    _, tests = swiglu
    tests.test_operator()


def test_its_refusals(swiglu):
    _, tests = swiglu
    tests.test_refusals()


# Compiling needs a process in which Triton's interpreter is off.
COMPILE = """
import json, sys
from tests.ops import test_the_docs_operation as docs
from heptapod_fast.kernels import offline
with docs.rooms(docs.Path(sys.argv[1])) as (kernels, _):
    cases = list(docs.cases_of_the_page(kernels, "sm_90"))
    rows = [offline.row(case, "sm_90", offline.compile_case(case, "sm_90")) for case in cases]
print(json.dumps([[row["case"], offline.faults(row)] for row in rows]))
"""


def cases_of_the_page(kernels, arch):
    """What the page adds to kernels/offline_cases.py."""
    scope = {**vars(offline_cases), "swiglu": kernels}
    exec(block_after("In `kernels/offline_cases.py`"), scope)
    return scope["swiglu_cases"](arch)


@needs_triton
def test_its_offline_cases_compile(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        ["swiglu forward <= 16384", []],
        ["swiglu backward <= 16384", []],
    ]
