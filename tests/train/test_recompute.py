"""--recompute: the same bits, less kept, and no other names of anything."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from heptapod_fast.ops import dispatch
from heptapod_fast.rng import Rng
from heptapod_fast.train import recompute
from heptapod_fast.train.session import Ending
from tests.cases import EVERY_SYSTEM
from tests.conftest import small_batch, small_system
from tests.numerics import needs_triton
from tests.running import command, final_files, flags, refused, tiny_config, train_here

DROPOUT = {"dropout": 0.1}
CASES = EVERY_SYSTEM | {"uniform": ("discrete", {"steps": "uniform"})}
AGAIN = ("selective", "full")


def system_of(name: str, mode: str = "off", dtype=torch.float32, **more):
    tokens, settings = CASES[name]
    system = small_system(tokens, **settings | DROPOUT | more)
    system.set_dtype(dtype)
    recompute.apply(system, mode)
    return system


def loss_and_gradients(system, phase=None) -> list[torch.Tensor]:
    loss = system.loss(small_batch(system, 4), Rng(0), phase).total
    loss.backward()
    return [loss.detach(), *(p.grad for p in system.parameters())]


def same(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", AGAIN)
@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_the_same_bits(name, mode, dtype):
    plain, again = system_of(name, dtype=dtype), system_of(name, mode, dtype)
    for phase in plain.phases(64):
        same(loss_and_gradients(again, phase), loss_and_gradients(plain, phase))
        plain.zero_grad()
        again.zero_grad()


@needs_triton
def test_with_kernels_too_whose_attention_selective_keeps(monkeypatch):
    from heptapod_fast.kernels import attention as kernels

    calls = []
    forward = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *given: calls.append(1) or forward(*given))
    operators = dispatch.Operators(dict.fromkeys(dispatch.operations("triton"), "triton"))
    found = {}
    count = {}
    for mode in recompute.MODES:
        settings = {"operators": operators, "heads": 1, "depth": 1, "grid": 2}
        system = system_of("1d-raster", mode, torch.bfloat16, **settings)
        found[mode] = loss_and_gradients(system)
        count[mode] = len(calls)
        calls.clear()
    for mode in AGAIN:
        same(found[mode], found["off"])
    blocks = len(system.units())
    assert count == {"off": blocks, "selective": blocks, "full": 2 * blocks}


@pytest.mark.parametrize("name", ["global", "llamagen", "two streams"])
def test_what_runs_again(name):
    """full: all products of the units. selective: those of plain attention, of two batched
    matrices, alone."""
    counted = {}
    for mode in recompute.MODES:
        system = system_of(name, mode)
        with FlopCounterMode(display=False) as counter:
            loss_and_gradients(system)
        by_operation = counter.get_flop_counts()["Global"]
        batched = by_operation.pop(torch.ops.aten.bmm)
        counted[mode] = (sum(by_operation.values()), batched)
    off, selective, full = (counted[mode] for mode in recompute.MODES)
    assert selective[0] == off[0]
    assert selective[1] > off[1]
    assert full[0] > off[0]
    # Early stopping: what the last tensor needed does not run.
    assert full[1] >= selective[1]


@pytest.mark.parametrize("mode", AGAIN)
def test_units_can_be_compiled(mode):
    """Without a compiler: what is tested is whether a unit can be traced as a whole."""
    torch._dynamo.reset()
    system = system_of("llamagen", mode, depth=1)
    for unit in system.units():
        unit.compile(backend="aot_eager", fullgraph=True)
    expected = loss_and_gradients(system_of("llamagen", depth=1))
    torch.testing.assert_close(loss_and_gradients(system), expected)


@pytest.mark.parametrize("mode", recompute.MODES)
def test_names_and_modules_stay(mode):
    plain, again = system_of("local"), system_of("local", mode)
    assert list(plain.state_dict()) == list(again.state_dict())
    kinds = [(name, type(module)) for name, module in plain.named_modules()]
    assert kinds == [(name, type(module)) for name, module in again.named_modules()]
    again.load_state_dict(plain.state_dict())


def test_off_changes_nothing():
    assert all("forward" not in vars(unit) for unit in system_of("global").units())


def test_another_mode_is_refused():
    with pytest.raises(ValueError, match="--recompute half: expected one of off, selective, full"):
        recompute.apply(small_system(), "half")


@pytest.mark.parametrize("mode", AGAIN)
def test_sampling_keeps_and_repeats_nothing(mode, monkeypatch):
    plain, again = system_of("global").eval(), system_of("global", mode).eval()
    monkeypatch.setattr(recompute, "checkpoint", None)  # nobody calls it
    classes = torch.tensor([0, 2])
    assert torch.equal(plain.sample(classes, Rng(0)), again.sample(classes, Rng(0)))


def test_a_copy_has_parameters_of_its_own():
    again = system_of("global", "full")
    twin = copy.deepcopy(again)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    same(loss_and_gradients(twin), loss_and_gradients(system_of("global")))


# ------------------------------------------------------------------------------------ with wrappers


def gradients_of_wrapped(model, system, first: int) -> dict[str, torch.Tensor]:
    """Of a step on another half of a batch on each rank, whole."""
    from torch.distributed.tensor import DTensor

    model(small_batch(system, 2, first), Rng(0)).total.backward()
    found = {}
    for name, parameter in system.named_parameters():
        gradient = parameter.grad
        found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return found


def wrapped(system, wrapper: str):
    """A system as it is spread over the ranks of this group."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    if wrapper == "ddp":
        return DistributedDataParallel(system)
    mesh = dist.init_device_mesh("cpu", (2,))
    for unit in system.units():
        fully_shard(unit, mesh=mesh)
    return fully_shard(system, mesh=mesh)


def run_all_wrappers(rank: int, folder: str) -> None:
    """In a process of a group of two; rank 0 leaves what came out."""
    torch.set_num_threads(1)
    init = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    found = {}
    for wrapper in ("ddp", "fsdp"):
        for mode in recompute.MODES:
            system = system_of("global", mode)
            model = wrapped(system, wrapper)
            found[wrapper, mode] = gradients_of_wrapped(model, system, first=2 * rank)
    if rank == 0:
        torch.save(found, f"{folder}/found")
    dist.barrier()
    dist.destroy_process_group()


def test_wrappers_of_the_units_go_around_it(tmp_path):
    """DDP, and fully_shard of every unit."""
    torch.multiprocessing.spawn(run_all_wrappers, (str(tmp_path),), nprocs=2, join=True)
    found = torch.load(tmp_path / "found")
    plain = {name: p.grad for name, p in system_of("global").named_parameters()}
    for wrapper in ("ddp", "fsdp"):
        off = found[wrapper, "off"]
        assert list(off) == list(plain)
        for mode in AGAIN:
            same(found[wrapper, mode].values(), off.values())


# ------------------------------------------------------------------------------------------- runs


def test_a_run_is_the_same_in_every_mode_and_may_change_it(tmp_path):
    said = []
    folders = {mode: tmp_path / mode for mode in recompute.MODES}
    for mode, out in folders.items():
        train_here(out, say=said.append, recompute=mode, dropout=0.1)
    assert [line.split(" (")[0] for line in said if line.startswith("recompute")] == [
        f"recompute {mode}" for mode in recompute.MODES
    ]
    mixed = tmp_path / "mixed"
    train_here(mixed, stop_at=24, recompute="full", dropout=0.1)
    _, _, ending = train_here(mixed, recompute="selective", dropout=0.1)
    assert ending is Ending.FINISHED
    for out in (folders["selective"], folders["full"], mixed):
        assert final_files(out) == final_files(folders["off"])


def test_a_session_recomputes_what_its_line_says(tmp_path):
    said = []
    session, _, _ = train_here(tmp_path, say=said.append, recompute="full", images=8)
    assert all("forward" in vars(unit) for unit in session.system.units())
    assert any(line.startswith("recompute full (asked for") for line in said)
    chosen, _, _ = train_here(tmp_path / "auto", say=said.append, images=8)
    assert chosen.config.run.recompute == "auto"
    assert any(line.startswith("recompute off (less than") for line in said)


def test_a_word_that_is_no_mode_is_refused(tmp_path):
    result = command("train", *flags(out=tmp_path / "run"), "--recompute", "some")
    refused(result, "--recompute")


def test_the_mode_is_not_part_of_what_a_run_is():
    plain = tiny_config(None)
    assert plain.run.recompute == "auto"
    assert plain.replace(recompute="full").identity() == plain.identity()
