"""The optimizer: decay groups, averages, clipping, skipped steps, checkpoints."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from heptapod_fast import checkpoints
from heptapod_fast.ops import library
from heptapod_fast.ops.dispatch import Operators
from heptapod_fast.systems import System
from heptapod_fast.train.optimizer import Optimizer
from heptapod_fast.train.parallelize import Parallel
from tests.conftest import small_config, small_system

RECIPE = ("ema", "clip")


def optimizer_of(implementation: str = "reference", **settings) -> tuple[System, Optimizer]:
    """A small system and its optimizer. settings: of the system, and of the recipe."""
    asked = {"adamw_ema": implementation, "global_norm": implementation}
    of_system = {name: value for name, value in settings.items() if name not in RECIPE}
    system = small_system(**of_system)
    recipe = small_config(**settings).recipe
    return system, Optimizer(system, recipe, Operators(asked))


def fill_gradients(optimizer, size=1.0):
    generator = torch.Generator().manual_seed(3)
    for parameter in optimizer.parameters:
        parameter.grad = size * torch.randn(parameter.shape, generator=generator)


def everything(optimizer) -> list:
    return [t.detach().clone() for tensors in optimizer.files().values() for t in tensors.values()]


def mar_rule(name, parameter) -> bool:
    """mar:util/misc.py:291-303, with MAR's name of the diffusion MLP: does it decay?"""
    name = name.replace("token_loss.", "diffloss.")
    return not (parameter.dim() == 1 or name.endswith(".bias") or "diffloss" in name)


@pytest.mark.parametrize("head", ["global", "local"])
def test_decay_groups_are_mars(head):
    system, optimizer = optimizer_of(tokens="continuous", head=head)
    expected = [0.02 if mar_rule(n, p) else 0.0 for n, p in system.named_parameters()]
    assert optimizer.weight_decays == expected
    assert set(expected) == {0.0, 0.02}


def test_tables_and_learned_tokens_decay_and_the_diffusion_mlp_does_not():
    system, optimizer = optimizer_of(tokens="continuous")
    decay = dict(zip(optimizer.names, optimizer.weight_decays, strict=True))
    tables = [
        f"{name}.weight"
        for name, module in system.named_modules()
        if isinstance(module, nn.Embedding)
    ]
    assert len(tables) >= 4
    assert all(decay[name] == 0.02 for name in [*tables, "head.mask_token"])
    mlp = [name for name in decay if name.startswith("token_loss.")]
    assert mlp
    assert not any(decay[name] for name in mlp)


def test_the_output_layer_of_discrete_tokens_decays():
    _, optimizer = optimizer_of()
    decay = dict(zip(optimizer.names, optimizer.weight_decays, strict=True))
    assert decay["token_loss.output.weight"] == 0.02
    assert decay["token_loss.output.bias"] == 0.0


def test_averages_follow_the_ramp():
    _, optimizer = optimizer_of(ema=(0.9999, 0.1))
    start = [p.detach().clone() for p in optimizer.parameters]
    fill_gradients(optimizer)
    optimizer.step(1e-2)
    for name, decay in (("ema-0.9999", 2 / 11), ("ema-0.1", 0.1)):
        expected = [decay * a + (1 - decay) * p for a, p in zip(start, optimizer.parameters)]
        torch.testing.assert_close(optimizer.emas[name], expected)


@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_steps_equal_torch_with_clip_grad_norm(size):
    system, optimizer = optimizer_of(clip=1.0)
    twins = [nn.Parameter(p.detach().clone()) for p in optimizer.parameters]
    theirs = torch.optim.AdamW(
        [{"params": [t], "weight_decay": w} for t, w in zip(twins, optimizer.weight_decays)],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    for _ in range(3):
        fill_gradients(optimizer, size)
        for twin, parameter in zip(twins, optimizer.parameters):
            twin.grad = parameter.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(twins, 1.0)
        theirs.step()
        torch.testing.assert_close(optimizer.step(1e-2), norm)
    torch.testing.assert_close(
        [p.detach() for p in optimizer.parameters],
        [t.detach() for t in twins],
        atol=2e-6,
        rtol=1e-5,
    )


@pytest.mark.skipif(not library.available("cpu"), reason=library.status())
def test_the_compiled_operators_take_the_same_steps():
    results = []
    for implementation in ("cpu", "reference"):
        _, optimizer = optimizer_of(implementation, ema=(0.5, 0.9), clip=1.0)
        norms = []
        for _ in range(3):
            fill_gradients(optimizer)
            norms.append(optimizer.step(1e-2))
        results.append((norms, everything(optimizer)))
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)


def test_correction_scales_gradients_before_clipping():
    results = []
    for size, correction in ((1e-4, 1.0), (1e-3, 0.1)):
        _, optimizer = optimizer_of()
        fill_gradients(optimizer, size)
        results.append((optimizer.step(1e-2, correction), everything(optimizer)))
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_gradient_skips_the_step_bitwise_and_counts(bad):
    _, optimizer = optimizer_of(ema=(0.9, 0.99))
    fill_gradients(optimizer)
    optimizer.step(1e-2)
    before = everything(optimizer)
    fill_gradients(optimizer)
    optimizer.parameters[-1].grad.view(-1)[0] = bad
    assert not optimizer.step(1e-2).isfinite()
    after = everything(optimizer)
    assert int(optimizer.skipped) == 1
    assert optimizer.step_count == 2
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert sum(changed) == 1  # the counter itself
    fill_gradients(optimizer)
    optimizer.step(1e-2)
    assert all(t.isfinite().all() for t in everything(optimizer))


def test_a_system_with_averaged_weights_gets_its_own_back():
    system, optimizer = optimizer_of()
    fill_gradients(optimizer)
    optimizer.step(1e-2)
    live = [p.detach().clone() for p in optimizer.parameters]
    average = optimizer.emas["ema-0.9999"]
    parallel = Parallel(system)
    with pytest.raises(KeyError), parallel.whole(average) as averaged:
        now = [p.detach() for p in averaged.parameters()]
        assert all(map(torch.equal, now, average))
        assert not all(map(torch.equal, now, live))
        raise KeyError
    assert all(map(torch.equal, system.parameters(), live))
    with parallel.whole(optimizer.parameters) as same:
        assert all(map(torch.equal, same.parameters(), live))


def reading(files):
    """What fills tensors from these."""

    def read_into(name, tensors):
        assert tensors.keys() == files[name].keys()
        for key, tensor in tensors.items():
            tensor.copy_(files[name][key])

    return read_into


def test_checkpoint_round_trip():
    _, first = optimizer_of(ema=(0.9, 0.99))
    for _ in range(2):
        fill_gradients(first)
        first.step(1e-2)
    files = {
        name: {k: t.clone() for k, t in tensors.items()} for name, tensors in first.files().items()
    }
    assert set(files) == {"model", "ema-0.9", "ema-0.99", "optimizer"}
    _, second = optimizer_of(ema=(0.9, 0.99))
    second.load(reading(files), first.step_count)
    for optimizer in (first, second):
        fill_gradients(optimizer)
        optimizer.step(1e-2)
    assert all(map(torch.equal, everything(first), everything(second)))


def test_tensors_of_another_model_are_refused(tmp_path):
    _, small = optimizer_of()
    _, deep = optimizer_of(depth=3)
    _, wide = optimizer_of(width=64)
    checkpoints.save(tmp_path, small.files(), {"step": 1}, keep=None)
    found = checkpoints.load_newest(tmp_path, print)
    with pytest.raises(ValueError, match="model of the checkpoint does not fit.*missing"):
        deep.load(found.read_into, 1)
    with pytest.raises(ValueError, match=r"model: .* is \(.*expected \("):
        wide.load(found.read_into, 1)


def test_snapshots_are_half_as_large_where_values_allow_it():
    _, optimizer = optimizer_of(ema=(0.9, "post-hoc"))
    large = optimizer.names[0]
    fill_gradients(optimizer)
    with torch.no_grad():
        optimizer.parameters[0].fill_(1e6)
    optimizer.step(0.1)
    found = optimizer.snapshot()
    assert list(found) == ["power-0.05", "power-0.1"]
    for name, tensors in found.items():
        assert list(tensors) == optimizer.names
        for key, average in zip(tensors, optimizer.emas[name], strict=True):
            expected = torch.float32 if key == large else torch.float16
            assert tensors[key].dtype == expected
            torch.testing.assert_close(tensors[key].float(), average, rtol=1e-3, atol=1e-7)
    tensors = found["power-0.1"]
    assert tensors[large].data_ptr() != optimizer.emas["power-0.1"][0].data_ptr()


def test_scalars_go_to_a_gpu_from_pinned_memory(monkeypatch):
    """A copy from other memory may wait for all that the GPU has to do."""
    optimizer = Optimizer(small_system(), small_config().recipe)
    pinned = []
    copies = []
    make = torch.tensor

    def spy(values, pin_memory=False):
        pinned.append(pin_memory)
        return make(values)

    def copy(host, non_blocking):
        copies.append((host.tolist()[1], non_blocking))

    monkeypatch.setattr(torch, "tensor", spy)
    for is_cuda in (True, False):
        optimizer.scalars = SimpleNamespace(is_cuda=is_cuda, copy_=copy)
        optimizer.begin(1e-3)
    assert pinned == [True, False]
    assert copies == [(1.0, True), (2.0, True)]
