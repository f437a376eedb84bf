"""Shared by the tests of operations that are compiled for CPU and CUDA."""

import zlib

import pytest
import torch

from heptapod_fast.ops import library
from tests.csrc import emulator
from tests.numerics import DEVICE, has_triton

COMPILED = ["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)]


def usable(request):
    """The device type, and implementation, of one of COMPILED; skips what cannot run here.

    "emulated" is the CUDA code, run on the CPU in the place of the CPU operators, with threads in
    an order drawn from the test's name.
    """
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == "emulated":
        if not library.available("cpu"):
            pytest.skip(library.status())
        yield from emulated(request)
        return
    if not library.available(request.param):
        pytest.skip(library.status())
    yield request.param


def emulated(request):
    """The emulation in place of the CPU operators while a test runs."""
    missing = emulator.why_not()
    if missing:
        pytest.skip(missing)
    seed = zlib.crc32(request.node.nodeid.encode())
    emulator.loaded().order(emulator.ORDERS[seed % 3], seed)
    with emulator.running("emulated") as implementation:
        yield implementation


@pytest.fixture(params=["reference", *COMPILED])
def implementation(request):
    """The name of an implementation that can run here."""
    if request.param == "reference":
        yield request.param
        return
    yield from usable(request)


@pytest.fixture(params=COMPILED)
def device(request):
    """A device whose compiled operators are there; its name is the implementation's."""
    yield from usable(request)


@pytest.fixture(params=["triton", "cpu"])
def kernel(request):
    """The name of an implementation beside the reference, of operations that have these two."""
    if request.param == "triton" and not has_triton():
        pytest.skip("triton is not installed")
    if request.param == "cpu" and DEVICE != "cpu":
        pytest.skip("tensors are on a GPU")
    if request.param == "cpu" and not library.available("cpu"):
        pytest.skip(library.status())
    return request.param
