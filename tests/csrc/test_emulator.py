"""csrc/*.cu, run on the CPU: against the CPU operators, in every order of threads.

The operators' own tests run on it too (`emulated` in tests/ops); emulator.py says how it is built
and put in their place, test_planted_bugs.py (slow) that it sees what it should.
"""

import pytest
import torch

from heptapod_fast.ops import library
from tests.csrc import battery, emulator
from tests.numerics import poisoned

needs_library = pytest.mark.skipif(not library.available("cpu"), reason=library.status())


@pytest.fixture(scope="module")
def emulation():
    if emulator.why_not() is not None:
        pytest.skip(emulator.why_not())
    return emulator.loaded()


@needs_library
@pytest.mark.parametrize("check", battery.CHECKS)
def test_against_the_cpu_operators(emulation, check):
    before = emulation.launches()
    with poisoned():
        battery.CHECKS[check](emulation)
    assert emulation.launches() > before


@needs_library
def test_it_stands_in_and_steps_aside(emulation):
    index = torch.arange(3)
    operator = torch.ops.heptapod_fast.philox.default
    before = emulation.launches()
    with emulation.standing_in():
        inside = operator(index, index, 1, 1, 2)
    assert emulation.launches() == before + 1
    assert torch.equal(operator(index, index, 1, 1, 2), inside)
    assert emulation.launches() == before + 1


# What it refuses, without a change of the sources: tensors that do not belong together.


def step_of(sizes):
    return battery.step_arguments(sizes, 1, torch.float32, True)


def test_accesses_outside_of_tensors(emulation):
    arguments = step_of((70,))
    arguments[2][0] = arguments[2][0][:64].clone()
    emulation.order("ascending")
    message = (
        "thread .* of block 0 reads 4 bytes outside of every tensor, 256 bytes after the begin"
    )
    with pytest.raises(RuntimeError, match=message):
        battery.emulated("adamw_ema")(*arguments)
    # It has forgotten the threads that did not end.
    battery.emulated("adamw_ema")(*step_of((70,)))


@pytest.mark.parametrize("order", emulator.ORDERS)
def test_races_between_blocks(emulation, order):
    arguments = step_of((70, 70))
    arguments[2][1] = arguments[2][0]
    emulation.order(order, seed=5)
    with pytest.raises(RuntimeError, match="of block . writes with no barrier between them"):
        battery.emulated("adamw_ema")(*arguments)


def test_tensors_that_an_operator_only_reads_may_share_memory(emulation):
    arguments = step_of((70, 70))
    arguments[1][1] = arguments[1][0]
    battery.emulated("adamw_ema")(*arguments)


# How sources become C++.


def test_launches_are_rewritten_on_their_lines():
    kernels = "__global__ void __launch_bounds__(kMost)\n    k(int n) {}\n"
    text = (
        "  k<K, G><<<chunks,\n   kThreads, 0, stream>>>(table, f(x));\n  b<<<1, 2, 0, s(d)>>>(y);"
    )
    assert emulator.rewritten(kernels + text) == kernels + (
        '  ::emulation::launcher("k", kMost, &k<K, G>, chunks,\n   kThreads, 0, stream)'
        '(table, f(x));\n  ::emulation::launcher("b", 1024, &b, 1, 2, 0, s(d))(y);'
    )


def test_big_arguments_travel_by_reference():
    text = "kernel(const __grid_constant__ Table<Slot<K>> table, const Rates r)"
    expected = "kernel(const __grid_constant__ Table<Slot<K>>& table, const Rates r)"
    assert emulator.rewritten(text) == expected


def test_nothing_of_the_sources_is_left_out():
    texts = emulator.edited()
    sources = [text for name, text in texts.items() if name.endswith(".cu")]
    assert len(sources) >= 3
    for text in sources:
        assert text.count("<<<") == emulator.rewritten(text).count("::emulation::launcher(") > 0
        assert "heptapod_fast, CUDA" in text and "CUDA, m" not in emulator.rewritten(text)
    defined = "".join(text for name, text in texts.items() if name.endswith(".cpp"))
    assert emulator.schemas(texts).count("m.def(") == defined.count("m.def(")
    for name in emulator.OPERATORS:
        assert f'"{name}(' in emulator.schemas(texts)
        assert any(f'm.impl("{name}", TORCH_BOX' in text for text in sources)
    assert sum(text.count("m.impl(") for text in sources) == len(emulator.OPERATORS)


def test_the_build_decides_about_contraction():
    build = emulator.edited()["CMakeLists.txt"]
    assert emulator.contraction("adamw_ema.cu", build) == ("-ffp-contract=off",)
    for name, text in (("philox.cu", build), ("adamw_ema.cu", build.replace("-fmad=false", "-O3"))):
        assert emulator.contraction(name, text)[0] == "-ffp-contract=fast"


def test_an_edit_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="stands 0 times in philox.cu"):
        emulator.edited([emulator.Edit("philox.cu", "no such text", "")])


def test_sources_that_do_not_compile_say_so(emulation):
    edit = emulator.Edit("philox.cu", "c0 = high1", "c0 = __popc(high1)")
    with pytest.raises(emulator.BuildFailed, match=r"csrc/philox.cu:\d+.*__popc"):
        emulator.library([edit])
