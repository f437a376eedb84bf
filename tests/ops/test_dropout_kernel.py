"""The Triton kernel of dropout: equal to the reference in the interpreter, compiles for GPUs."""

import os

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
triton = pytest.importorskip("triton")

from heptapod_fast.kernels import dropout as module  # noqa: E402

from heptapod_fast.model.transformer import Drop  # noqa: E402
from heptapod_fast.ops import dispatch  # noqa: E402
from heptapod_fast.ops import dropout as reference  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []


def draw(shape, packed):
    keys = torch.randint(0, 2**32, (2, shape[0]), device=DEVICE)
    counter = torch.randint(0, 2**20, (shape[0],) if packed else shape[1:-1], device=DEVICE)
    view = (shape[0],) + (1,) * (len(shape) - 2)
    return torch.randn(shape, device=DEVICE), keys[0].view(view), keys[1].view(view), counter


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 4, 1030), (6, 33), (1, 1, 1), (5, 2, 64)])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_kernel_equals_reference(shape, p):
    x, key0, key1, counter = draw(shape, packed=len(shape) == 2)
    expected = reference(x, key0, key1, counter, p, implementation="reference")
    assert torch.equal(module.dropout(x, key0, key1, counter, p), expected)


@pytest.mark.parametrize("packed", [False, True])
def test_kernel_reads_the_keys_of_a_table(packed, monkeypatch):
    """As the model calls it: keys are columns of a (P, sites, 2) table, strided views."""
    monkeypatch.setitem(dispatch._registry["dropout"], "triton",
                        (lambda device, dtype: None, lambda device, dtype: None))
    keys = torch.randint(0, 2**32, (3, 4, 2), device=DEVICE)
    drop = Drop(keys, torch.arange(5, device=DEVICE), 0.5)
    x = torch.randn(3, 5, 16, device=DEVICE)
    if packed:
        sequence = torch.tensor([2, 0, 1, 2], device=DEVICE)
        element = torch.tensor([1, 4, 0, 3], device=DEVICE)
        drop, x = drop.packed(sequence, element), x[sequence, element]
    shape = (-1,) + (1,) * (x.dim() - 2)
    for site in range(4):
        key0, key1 = (keys[:, site, i] if not packed else keys[sequence, site, i] for i in (0, 1))
        expected = reference(x, key0.view(shape), key1.view(shape), drop.counter_PN, 0.5,
                             implementation="reference")
        assert torch.equal(drop(x, site), expected)


@pytest.mark.parametrize("arch", [80, 90])
def test_kernel_compiles_without_spills(arch, tmp_path):
    """In a process of its own, because the interpreter replaces the compiler in this one."""
    script = tmp_path / "compile.py"
    script.write_text(COMPILE.format(arch=arch))
    import subprocess
    import sys

    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True,
                          env={**os.environ, "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["stack", "0"], done.stdout


COMPILE = """
import re, subprocess, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from heptapod_fast.kernels.dropout import _dropout
names = _dropout.arg_names
types = dict(x_ptr="*bf16", out_ptr="*bf16", key0_ptr="*i64", key1_ptr="*i64", counter_ptr="*i64",
             width="i32", rows_per_key="i32", counters="i32", threshold="i64", scale="fp32",
             BLOCK="constexpr")
source = ASTSource(_dropout, types, constexprs={{"BLOCK": 1024}})
kernel = triton.compile(source, target=GPUTarget("cuda", {arch}, 32), options=dict(num_warps=4))
with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(kernel.asm["cubin"])
    file.flush()
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True,
                           text=True)
print("stack", re.search(r"STACK:(\\d+)", usage.stdout + usage.stderr)[1])
"""
