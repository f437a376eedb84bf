"""The memory estimate against what training really takes, counted tensor by tensor."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from heptapod_fast.config import Config
from heptapod_fast.data import SyntheticTokens
from heptapod_fast.rng import Rng
from heptapod_fast.systems import Heptapod, NextPatch, build_system
from heptapod_fast.train import memory, recompute
from heptapod_fast.train.memory import (
    OBVIOUS_SHARE,
    Ledger,
    NoEstimateError,
    Work,
    bound,
    bytes_per_parameter,
    estimate,
    fit_into,
    memory_limit,
    obvious_fit,
)
from heptapod_fast.train.operators import choose_operators
from heptapod_fast.train.optimizer import Optimizer
from heptapod_fast.train.saving import HostBuffers
from heptapod_fast.world import ALONE, choose_precision
from tests.numerics import DEVICE, needs_triton
from tests.running import NO_HEAD, tiny_config

CLASSES, SEQUENCES = 5, 8
CPU = torch.device("cpu")
# What the project promises. Temporaries inside of an operation are not counted: a product of a
# CPU's bf16 makes a copy of its weight.
PROMISED = 0.15
CONTINUOUS = {"codes": None, "diffusion_blocks": 2, "diffusion_width": 64}
CASES = {
    "global": {"depth": 2, "head_depth": 2, "density": 2},
    "dense": {"depth": 1, "head_depth": 3, "density": 8},
    "uniform steps": {"depth": 1, "head_depth": 2, "density": 4, "steps": "uniform"},
    "local": {"depth": 2, "head_depth": 2, "head": "local", "window": 9, "density": 4},
    "dropout": {"depth": 1, "head_depth": 1, "dropout": 0.1, "width": 96},
    "diffusion": {"depth": 2, "head_depth": 2, "tokenizer": "patch"} | CONTINUOUS,
    "flow": {"depth": 1, "head_depth": 1, "tokenizer": "patch", "token_loss": "flow"} | CONTINUOUS,
    "1d-raster": {"system": "1d-raster", "depth": 4} | NO_HEAD,
    "1d-random": {"system": "1d-random", "depth": 2, "tokenizer": "patch"} | NO_HEAD | CONTINUOUS,
    "llamagen": {"system": "llamagen", "depth": 3} | NO_HEAD,
    # Logits are made in chunks.
    "many codes": {"system": "llamagen", "depth": 1, "codes": 8192, "batch": 32} | NO_HEAD,
    "npp": {"system": "npp", "depth": 2, "patches": (3, 1), "shares": (0.5, 0.5)} | NO_HEAD,
    "two streams": {"system": "sar", "depth": 3} | NO_HEAD | CONTINUOUS,
    "rings": {"system": "sar", "depth": 2, "grouping": "next-layer", "injection": "nearest"}
    | NO_HEAD
    | CONTINUOUS,
    "one stream": {"system": "sar", "depth": 2, "grouping": "next-row"} | NO_HEAD | CONTINUOUS,
}


def config_of(**settings) -> Config:
    return tiny_config("out", **{"width": 64, "heads": 4, "precision": "fp32"} | settings)


def work_of(config: Config, ranks: int = 1) -> Work:
    return Work(config, CLASSES, CPU, choose_operators(config, CPU), ranks)


def system_of(work: Work, mode: str = "off"):
    """Of a work, with values."""
    system = build_system(work.config, CLASSES, CPU, work.operators)
    system.set_dtype(choose_precision(work.config.run.precision, CPU))
    recompute.apply(system, mode)
    return system


def batch_of(work: Work):
    size = work.config.split_batch(work.world_size).micro_batch
    return SyntheticTokens(work.config.spec, CLASSES, 0).batch(torch.arange(size))


def nbytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# ------------------------------------------------------------------------------------- fixed bytes


@pytest.mark.parametrize("averages", [(), (0.9999,), (0.9999, 0.9)])
def test_fixed_bytes_are_those_of_the_tensors_that_stay(averages):
    work = work_of(config_of(ema=averages))
    optimizer = Optimizer(system_of(work), work.config.recipe)
    kept = [tensor for file in optimizer.files().values() for tensor in file.values()]
    found = estimate(work)
    assert found.fixed == nbytes(kept) - nbytes([optimizer.skipped])
    assert found.per_parameter == bytes_per_parameter(len(averages))


def test_copies_for_checkpoints_are_those_that_stay():
    """On a CPU they lie beside the state; a GPU's lie on the host."""
    work = work_of(config_of())
    optimizer = Optimizer(system_of(work), work.config.recipe)
    copied = HostBuffers(ALONE).copy(optimizer.files())
    held = [tensor for file in copied.values() for tensor in file.values()]
    found = estimate(work)
    assert found.copies == nbytes(held) - nbytes([optimizer.skipped])
    assert estimate(work_of(config_of(sync_checkpoints=True))).copies == 0
    assert estimate(work_of(config_of(batch=16), ranks=2)).copies == found.copies // 2
    on_gpu = replace(work, device=torch.device("cuda"))
    assert memory._bytes_of_copies(on_gpu, 1000) == 0


# ------------------------------------------------------------------------------------- whole steps


def measured(work: Work, mode: str, phase=None) -> int:
    """Bytes that PyTorch's allocator hands out in a whole step, at the peak, beside what stays."""
    config = work.config
    system = system_of(work, mode)
    optimizer = Optimizer(system, config.recipe, work.operators)
    batch = batch_of(work)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        if work.world_size > 1:  # as DDP has memory for its messages
            for parameter in optimizer.parameters:
                parameter.grad = torch.zeros_like(parameter)
        for _ in range(config.split_batch(work.world_size).micro_batches):
            (system.loss(batch, Rng(0), phase).total / 3.0).backward()
        optimizer.step(1e-3)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def near(work: Work, mode: str = "off") -> None:
    found = estimate(work, mode)
    of_step = found.total - found.fixed - found.copies
    assert of_step == pytest.approx(measured(work, mode), rel=PROMISED)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_takes_what_is_estimated(name, precision):
    near(work_of(config_of(**CASES[name] | {"precision": precision})))


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("name", ["local", "diffusion", "1d-raster", "llamagen", "two streams"])
def test_a_step_that_recomputes_takes_what_is_estimated(name, mode):
    near(work_of(config_of(**CASES[name] | {"dropout": 0.1, "precision": "bf16"})), mode)


@pytest.mark.parametrize("mode", recompute.MODES)
def test_gradients_of_earlier_micro_batches_count(mode):
    config = config_of(width=192, depth=1, head_depth=1, batch=4, micro_batch=2)
    near(work_of(config), mode)
    alone = estimate(work_of(config.replace(batch=2)), mode)
    both = estimate(work_of(config), mode)
    assert both.activations == alone.activations
    assert both.total > alone.total


def test_the_messages_of_several_ranks_count():
    """Memory of all gradients is there while the forward pass goes on."""
    config = config_of(width=256, depth=2, head_depth=2, batch=4)
    near(work_of(config, ranks=2))
    half = config.replace(batch=2)
    parameters = sum(p.numel() for p in work_of(config).system().parameters())
    alone, one_of_two = estimate(work_of(half)), estimate(work_of(config, ranks=2))
    assert alone.activations == one_of_two.activations
    assert alone.rest < one_of_two.rest <= alone.rest + 4 * parameters


def test_shards_are_a_part_of_what_stays_and_of_the_gradients():
    config = config_of(width=64, depth=3, head_depth=1, batch=4)
    whole = estimate(work_of(config, ranks=2))
    half = estimate(replace(work_of(config, ranks=2), shards=2))
    system = work_of(config).system()
    parameters = sum(p.numel() for p in system.parameters())
    of_blocks = [sum(p.numel() for p in unit.parameters()) for unit in system.units()]
    together = parameters - sum(of_blocks) + 2 * max(of_blocks)  # the rest, and two blocks
    assert half.fixed == whole.fixed // 2
    assert (half.activations, half.casts) == (whole.activations, whole.casts)
    assert half.rest - whole.rest == 4 * together - 4 * parameters // 2


@pytest.mark.parametrize("name", ["global", "many codes", "npp", "two streams"])
def test_wider_and_deeper(name):
    near(work_of(config_of(**CASES[name] | {"width": 160, "depth": 4, "batch": 16})))


# ------------------------------------------------------------------------------------- activations


def saved_bytes(work: Work) -> int:
    """What autograd keeps for the backward pass of a micro-batch, beside parameters and batch."""
    system = system_of(work)
    batch = batch_of(work)
    given = [*system.parameters(), *system.buffers(), batch.tokens, batch.labels, batch.index]
    own = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # The tensor is held, so that its address is not given to another one.
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = system.loss(batch, Rng(0))
    assert loss.total.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("name", CASES)
def test_activations_are_what_autograd_keeps(name):
    work = work_of(config_of(**CASES[name] | {"precision": "bf16"}))
    found = estimate(work)
    # The loss and its count live too.
    assert found.activations + found.casts == pytest.approx(saved_bytes(work), abs=64)


@needs_triton
@pytest.mark.skipif(DEVICE != "cpu", reason="tensors of these tests are on the CPU")
@pytest.mark.parametrize("name", ["global", "llamagen"])
def test_activations_are_what_the_kernels_keep(name):
    """The estimate launches none: what an operator keeps follows from its fake implementation."""
    kernels = {"kernels": "triton", "attention": "triton", "precision": "bf16"}
    tiny = {"width": 64, "heads": 2, "depth": 1, "batch": 2}
    head = {"head_depth": 1} if "system" not in CASES[name] else {}
    config = config_of(**CASES[name] | kernels | tiny | head)
    work = work_of(config)
    found = estimate(work)
    assert found.activations + found.casts == pytest.approx(saved_bytes(work), rel=0.01)
    assert found != estimate(work_of(config.replace(kernels="reference", attention="reference")))


def test_casts_are_the_weights_of_products():
    config = config_of(**CASES["llamagen"])
    linear = [m for m in work_of(config).system().modules() if isinstance(m, nn.Linear)]
    expected = 2 * sum(module.weight.numel() for module in linear)
    assert estimate(work_of(config.replace(precision="bf16"))).casts == expected
    assert estimate(work_of(config)).casts == 0


def test_activations_grow_with_the_micro_batch_and_nothing_else_does():
    one, four = (estimate(work_of(config_of(micro_batch=size))) for size in (2, 8))
    assert four.activations == pytest.approx(4 * one.activations, rel=0.01)
    assert four.fixed == one.fixed


def test_modes_take_less_and_less():
    work = work_of(config_of(**CASES["global"] | {"dropout": 0.1}))
    off, selective, full = (estimate(work, mode) for mode in recompute.MODES)
    assert off.activations > selective.activations > full.activations
    assert off.total > selective.total > full.total


def test_the_largest_phase_counts(monkeypatch):
    """npp's last phase is plain LlamaGen, whatever the order."""
    largest = estimate(work_of(config_of(**CASES["npp"]))).total
    assert largest == estimate(work_of(config_of(**CASES["llamagen"] | {"depth": 2}))).total
    in_order = NextPatch.phases
    monkeypatch.setattr(NextPatch, "phases", lambda *given: reversed([*in_order(*given)]))
    assert estimate(work_of(config_of(**CASES["npp"]))).total == largest


# -------------------------------------------------------------------------------------- the ledger


def test_the_ledger_counts_storages_once_and_as_long_as_they_live():
    given = torch.ones(1000)
    with Ledger() as ledger:
        view = given[10:].view(10, 99)
        assert ledger.bytes == 0
        made = view * 2
        part, other = made[:3].split([1, 2])
        made.add_(1)
        assert ledger.bytes == 4 * 990
        del made, part
        assert ledger.bytes == 4 * 990
        del other
        assert ledger.bytes == 0
    assert ledger.peak == 4 * 990
    halves = ledger.__torch_dispatch__(lambda: torch.ones(8).split(4), ())
    assert ledger.bytes == 4 * 8
    del halves
    assert ledger.bytes == 0


# -------------------------------------------------------------------------------------- the choice


def test_the_first_mode_that_fits_is_taken():
    work = work_of(config_of(**CASES["global"]))
    totals = {mode: estimate(work, mode).total for mode in recompute.MODES}
    for mode, total in totals.items():
        planned = fit_into(work, total)
        assert (planned.mode, planned.warning) == (mode, "")
        assert planned.estimate == estimate(work, mode)
        assert planned.bytes == total
        assert len(planned.lines()) == 1
        assert planned.lines()[0].startswith(f"recompute {mode} (off needs")
    assert fit_into(work, math.inf).mode == "off"
    assert "inf" not in fit_into(work, math.inf).reason


def test_what_does_not_fit_says_which_micro_batch_would():
    work = work_of(config_of(batch=12, micro_batch=12))
    sizes = (2, 4, 6)  # the even ones that divide 12
    totals = {}
    for size in sizes:
        changed = replace(work, config=work.config.replace(micro_batch=size))
        totals[size] = estimate(changed, "full").total
    assert sorted(totals.values()) == list(totals.values())
    for largest in sizes:
        planned = fit_into(work, totals[largest])
        assert planned.mode == "full"
        assert f"--micro-batch {largest} would fit" in planned.warning
        assert "--micro-batch 12" in planned.lines()[1]
    assert "no --micro-batch would fit" in fit_into(work, 1000).warning


def test_what_is_asked_for_is_taken():
    for mode in recompute.MODES:
        work = work_of(config_of(recompute=mode))
        planned = fit_into(work, math.inf)
        assert planned.mode == mode
        assert planned.reason.startswith("asked for")
        assert planned.estimate == estimate(work, mode)
        assert fit_into(work, 1e5).mode == mode
        assert f"--recompute {mode} needs about" in fit_into(work, 1e5).warning


def test_a_step_that_cannot_be_counted_is_no_reason_not_to_train(monkeypatch):
    original = Heptapod.forward

    def forward(self, batch, rng, phase=None):
        float(batch.labels.sum())
        return original(self, batch, rng, phase)

    monkeypatch.setattr(Heptapod, "forward", forward)
    work = work_of(config_of())
    with pytest.raises(NoEstimateError, match="DataDependent"):
        estimate(work)
    planned = fit_into(work, 1e4)
    assert (planned.mode, planned.estimate, planned.warning) == ("off", None, "")
    assert "no estimate of memory" in planned.lines()[0]
    assert planned.bytes > 2**60
    asked = replace(work, config=work.config.replace(recompute="full"))
    assert fit_into(asked, 1e4).mode == "full"


@pytest.mark.parametrize("name", ["dense", "dropout", "local", "diffusion", "npp", "two streams"])
def test_a_bound_is_one(name):
    """With room to spare: float32 and heads of 4 channels have the most bytes for their FLOPs."""
    narrow = {"width": 32, "heads": 8, "precision": "fp32"}
    work = work_of(config_of(**CASES[name] | narrow))
    assert bound(work) > 1.5 * estimate(work).total


def test_what_obviously_fits_is_not_counted(monkeypatch):
    work = work_of(config_of())
    most = bound(work)
    limit = most / OBVIOUS_SHARE
    assert obvious_fit(work, 0.99 * limit) is None
    assert obvious_fit(work, math.inf) is None
    monkeypatch.setattr(memory, "estimate", None)
    found = obvious_fit(work, 1.01 * limit)
    assert (found.mode, found.bytes, found.warning) == ("off", most, "")
    assert found.lines()[0].startswith("recompute off (less than")
    asked = replace(work, config=work.config.replace(recompute="full"))
    assert obvious_fit(asked, 1.01 * limit).lines()[0].startswith("recompute full (asked for; less")


def test_limits(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 1000))
    assert memory_limit(torch.device("cuda")) == 900
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    assert memory_limit(CPU) == 1000
    assert memory_limit(CPU, ranks_here=4) == 250
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    assert memory_limit(CPU) == math.inf
