"""The operation that docs/add-a-system.md adds is assembled from the page, and works."""

import importlib.util
import json
import re
import sys

import pytest

from heptapod_fast.kernels import offline, offline_cases, tuning
from tests.numerics import needs_triton
from tests.running import ROOT

PAGE = (ROOT / "docs" / "add-a-system.md").read_text().split("## An operation")[1]


def block_after(title: str, kind: str = "python") -> str:
    """The first block of code after a text."""
    return re.search(rf"```{kind}\n(.*?)```", PAGE.split(title)[1], re.DOTALL).group(1)


def module_of(name: str, code: str, folder):
    """A module made of code; in a file, because Triton reads the sources of its kernels."""
    file = folder / f"{name.split('.')[-1]}_{len(code)}.py"
    file.write_text(code)
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def swiglu(tmp_path_factory):
    """(the kernels, the tests of the page) with everything in its room."""
    import heptapod_fast.kernels
    import heptapod_fast.ops

    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("heptapod_fast.kernels.swiglu", "heptapod_fast.ops.swiglu"):
            patch.setitem(sys.modules, name, None)
        configs = json.loads(block_after("`kernels/configs/swiglu.json`", "json"))
        table = tuning.table
        patch.setattr(tuning, "table", lambda name: configs if name == "swiglu" else table(name))
        kernels = module_of(
            "heptapod_fast.kernels.swiglu", block_after("`kernels/swiglu.py`"), folder
        )
        patch.setattr(heptapod_fast.kernels, "swiglu", kernels, raising=False)
        module = module_of(
            "heptapod_fast.ops.swiglu", block_after("`heptapod_fast/ops/swiglu.py`"), folder
        )
        patch.setattr(heptapod_fast.ops, "swiglu", module, raising=False)
        tests = module_of("test_of_the_docs", block_after("`tests/ops/test_swiglu.py`"), folder)
        yield kernels, tests


@needs_triton
def test_the_tests_of_the_page_pass(swiglu):
    _, tests = swiglu
    for marked in ("shape", "dtype"):
        assert marked in {mark.args[0] for mark in tests.test_kernel_by_the_rule.pytestmark[:-1]}
    import torch

    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((3, 7), (2, 5, 64), (9, 2049)):
            tests.test_kernel_by_the_rule(shape, dtype)
    tests.test_operator()
    tests.test_refusals()


@needs_triton
def test_the_offline_cases_of_the_page_compile(swiglu):
    kernels, _ = swiglu
    scope = {**vars(offline_cases), "swiglu": kernels}
    exec(block_after("In `kernels/offline_cases.py`"), scope)
    cases = list(scope["swiglu_cases"]("sm_90"))
    assert [case.name for case in cases] == ["swiglu forward <= 16384", "swiglu backward <= 16384"]
    for case in cases:
        assert offline.faults(case, offline.compiled(case, "sm_90"), "sm_90") == []
