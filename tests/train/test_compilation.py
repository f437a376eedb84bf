"""--compile: one compilation for all blocks of a kind, and the losses of the eager run."""

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from heptapod_fast.ops import dispatch
from heptapod_fast.rng import Rng
from heptapod_fast.train import compilation, recompute
from heptapod_fast.train.compilation import choose
from tests.cases import EVERY_SYSTEM
from tests.conftest import small_batch, small_system
from tests.numerics import needs_triton
from tests.running import command, final_tensors, flags, train_here

CPU = torch.device("cpu")
DROPOUT = {"dropout": 0.1}
CASES = EVERY_SYSTEM


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def system_of(name, depth=2, **more):
    tokens, settings = CASES[name]
    depths = {"depth": depth}
    if settings.get("system", "heptapod") == "heptapod":
        depths["head_depth"] = depth
    return small_system(tokens, **settings | DROPOUT | depths | more)


def loss_and_gradients(system, phase=None):
    loss = system.loss(small_batch(system, 4), Rng(0), phase).total
    loss.backward()
    found = [loss.detach(), *(p.grad for p in system.parameters())]
    system.zero_grad()
    return found


def close(found, expected):
    largest = max(float(x.abs().max()) for x in expected[1:] if x is not None)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_the_eager_system(name):
    plain, compiled = system_of(name), system_of(name)
    counter = CompileCounterWithBackend("eager")
    compilation.apply(compiled, counter)
    for phase in plain.phases(64):
        close(loss_and_gradients(compiled, phase), loss_and_gradients(plain, phase))
    assert counter.frame_count > 0


@pytest.mark.parametrize("name, mode", [("local", "full"), ("llamagen", "selective")])
def test_units_that_recompute_too(name, mode):
    plain, compiled = system_of(name), system_of(name)
    recompute.apply(compiled, mode)
    counter = CompileCounterWithBackend("aot_eager")
    compilation.apply(compiled, counter)
    close(loss_and_gradients(compiled), loss_and_gradients(plain))
    assert counter.frame_count > 0


def compilations(name, depth, mode="off", **more):
    torch._dynamo.reset()
    system = system_of(name, depth, **more)
    recompute.apply(system, mode)
    counter = CompileCounterWithBackend("eager")  # frames are counted, whatever is made of them
    compilation.apply(system, counter)
    for _ in range(2):
        loss_and_gradients(system)
    return counter.frame_count


MANY = [(name, "off") for name in CASES] + [("1d-raster", "full"), ("llamagen", "selective")]


@pytest.mark.parametrize("name, mode", MANY)
def test_one_compilation_serves_all_blocks_of_a_kind(name, mode):
    """The first block has no sum to take yet, the last one may pack: three kinds, of backbone and
    head each."""
    few = compilations(name, 3, mode)
    assert few <= 6
    assert compilations(name, 5, mode) == few


@needs_triton
def test_kernels_are_opaque_to_it():
    kernels = dict.fromkeys(dispatch.operations("triton"), "triton")
    operators = dispatch.Operators(kernels)
    given = {"operators": operators, "heads": 1, "depth": 1, "grid": 2}
    plain, compiled = (small_system("discrete", system="1d-raster", **given) for _ in range(2))
    for system in (plain, compiled):
        system.set_dtype(torch.bfloat16)
    compilation.apply(compiled, "aot_eager")
    found, expected = loss_and_gradients(compiled), loss_and_gradients(plain)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-2, atol=0)


def test_sampling_compiles_nothing():
    plain, compiled = system_of("1d-raster"), system_of("1d-raster")
    counter = CompileCounterWithBackend("aot_eager")
    compilation.apply(compiled, counter)
    classes = torch.tensor([0, 1])
    found = compiled.eval().sample(classes, Rng(0))
    assert torch.equal(found, plain.eval().sample(classes, Rng(0)))
    assert counter.frame_count == 0


def test_names_of_parameters_stay():
    system = system_of("global")
    names = [name for name, _ in system.named_parameters()]
    compilation.apply(system, "aot_eager")
    assert [name for name, _ in system.named_parameters()] == names


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler for inductor")
def test_inductor_takes_a_block():
    plain, compiled = system_of("llamagen", 1), system_of("llamagen", 1)
    compilation.apply(compiled)
    close(loss_and_gradients(compiled), loss_and_gradients(plain))


# -------------------------------------------------------------------------------------- the choice


def test_the_choice():
    assert choose("on", CPU).is_on and not choose("off", CPU).is_on
    assert not choose("auto", CPU).is_on and choose("auto", torch.device("cuda")).is_on
    assert choose("auto", CPU).line().startswith("compile   off (auto: ")


def test_a_run_that_is_compiled(tmp_path, monkeypatch):
    counter = CompileCounterWithBackend("aot_eager")
    apply = compilation.apply
    monkeypatch.setattr(compilation, "apply", lambda system: apply(system, counter))
    said = []
    for name in ("on", "off"):
        settings = {"images": 16, "sample_every": 16, "compile": name, "precision": "fp32"}
        train_here(tmp_path / name, say=said.append, **settings)
    assert "compile   on (asked for)" in said
    assert any(line.startswith("compile   off") for line in said)
    assert counter.frame_count > 0
    plain, compiled = (final_tensors(tmp_path / name) for name in ("off", "on"))
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-5)


def test_a_dry_run_says_so(tmp_path):
    words = flags(out=tmp_path, compile="on")
    assert "  compile   on (asked for)\n" in command("train", "--dry-run", *words).out
