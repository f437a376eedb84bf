"""The kernels of csrc/rows.h: the same bits for every instruction set, and no byte beyond a row."""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from heptapod_fast.ops import library
from heptapod_fast.ops.dropout_mask import DropoutMask
from tests.csrc import emulator
from tests.running import ROOT

pytestmark = pytest.mark.skipif(not library.available("cpu"), reason=library.status())

# Below, at and beyond lanes (16), pieces (256) and blocks of rows (32).
SHAPES = [(1, 1), (3, 7), (32, 16), (33, 130), (70, 256), (5, 300)]


@pytest.fixture
def use():
    """use(name): take the kernels for an instruction set; whether this processor has it."""
    function = ctypes.CDLL(str(library.PATH)).heptapod_use_rows
    function.argtypes = [ctypes.c_char_p]
    yield lambda name: bool(function(name.encode()))
    assert function(b"")


def mask_for(rows):
    return DropoutMask(torch.randint(0, 2**32, (rows, 2)), torch.randint(0, 2**20, (1,)), 0.3)


def results(shape, dtype, drop):
    """What every operator gives for inputs drawn from the test's seed."""
    operators = torch.ops.heptapod_fast
    rows, width = shape
    x, branch, grad, grad_sum = (3 * torch.randn(4, rows, width)).to(dtype).unbind()
    shift, weight, bias = torch.randn(3, width).unbind()
    parts = DropoutMask.parts(mask_for(rows) if drop else None)
    found = []
    for silu in (False, True):
        found.append(operators.bias_gelu_cpu(x, shift, *parts, silu))
        found += operators.bias_gelu_backward_cpu(grad, x, shift, *parts, silu)
    found += operators.layer_norm_cpu(x, None, None, 1e-6)
    total, y, stats = operators.add_layer_norm_cpu(x, branch, shift, weight, bias, *parts, 1e-6)
    found += [total, y, stats]
    found += operators.layer_norm_backward_cpu(grad, grad_sum, total, stats, weight, *parts, True)
    found += operators.layer_norm_backward_cpu(grad, None, total, stats, None, *parts, False)
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("drop", [False, True])
def test_every_instruction_set_gives_the_same_bits(use, shape, dtype, drop):
    assert use("baseline")
    state = torch.get_rng_state()
    expected = results(shape, dtype, drop)
    assert any(bool(tensor.any()) for tensor in expected)
    for name in ("avx2", "avx512"):
        if not use(name):
            continue
        torch.set_rng_state(state)
        found = results(shape, dtype, drop)
        assert all(map(torch.equal, expected, found)), name


def test_an_unknown_instruction_set_changes_nothing(use):
    assert not use("quantum")


@pytest.mark.slow
def test_the_kernels_touch_nothing_beyond_their_rows(tmp_path):
    """Under the address and undefined-behaviour sanitizers, at every width around a vector."""
    compiler = emulator.compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "rows"
    sources = [ROOT / "csrc" / "rows_baseline.cpp", Path(__file__).with_name("rows_main.cpp")]
    words = [compiler, "-std=c++17", "-O1", "-g", "-fsanitize=address,undefined"]
    words += ["-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}", *map(str, sources)]
    built = subprocess.run([*words, "-o", str(program)], capture_output=True, text=True)
    if built.returncode and "asan" in built.stderr:
        pytest.skip("the C++ compiler has no sanitizers")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "all widths\n"
