"""The optimizer: decay groups, learning rate, averages, clipping, skipped steps, checkpoints."""

import pytest
import torch
from torch import nn

from heptapod_fast.ops import library
from heptapod_fast.train.optimizer import Optimizer, decays, ema_decay, learning_rate

ADAM = ("exp_avgs", "exp_avg_sqs")


def optimizer_of(make_system, **settings) -> tuple:
    system = make_system(**settings)
    return system, Optimizer(system, system.config, "reference")


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
def test_decay_groups_are_mars(make_system, head):
    system, optimizer = optimizer_of(make_system, tokens="continuous", head=head)
    expected = [0.02 if mar_rule(n, p) else 0.0 for n, p in system.named_parameters()]
    assert optimizer.weight_decays == expected
    assert 0.0 in expected and 0.02 in expected


def test_tables_and_learned_tokens_decay_and_the_diffusion_mlp_does_not(make_system):
    system, optimizer = optimizer_of(make_system, tokens="continuous")
    decay = dict(zip(optimizer.names, optimizer.weight_decays, strict=True))
    tables = [
        f"{name}.weight"
        for name, module in system.named_modules()
        if isinstance(module, nn.Embedding)
    ]
    assert len(tables) >= 4 and all(decay[name] == 0.02 for name in [*tables, "head.mask_token"])
    mlp = [name for name in decay if name.startswith("token_loss.")]
    assert mlp and not any(decay[name] for name in mlp)


def test_the_output_layer_of_discrete_tokens_decays():
    weight, bias = torch.zeros(5, 4), torch.zeros(5)
    assert decays("token_loss.output.weight", weight, continuous=False)
    assert not decays("token_loss.output.bias", bias, continuous=False)
    assert not decays("token_loss.output.weight", weight, continuous=True)


def test_rate_rises_linearly_then_stays(make_config):
    config = make_config(images=1000, warmup=0.1, lr_per_256=0.32, lr_schedule="constant")
    peak = 0.32 * 8 / 256
    points = {0: 0.0, 50: peak / 2, 99: 0.99 * peak, 100: peak, 101: peak, 1000: peak}
    assert {i: learning_rate(config, i) for i in points} == pytest.approx(points)


def test_cosine_ends_at_one_percent_and_stays_there(make_config):
    config = make_config(images=1100, warmup=1 / 11, lr_per_256=0.32, lr_schedule="cosine")
    peak = 0.01
    points = {100: peak, 600: peak * 0.505, 1100: peak * 0.01, 1200: peak * 0.01}
    assert {i: learning_rate(config, i) for i in points} == pytest.approx(points)


def test_no_warmup_starts_at_the_peak(make_config):
    config = make_config(warmup=0.0, lr_schedule="constant")
    assert learning_rate(config, 8) == config.learning_rate


def test_average_ramps():
    assert [ema_decay(0.9999, s) for s in (1, 8)] == [2 / 11, 9 / 18]
    assert ema_decay(0.9999, 10**6) == 0.9999 and ema_decay(0.5, 100) == 0.5


def test_averages_follow_the_ramp(make_system):
    _, optimizer = optimizer_of(make_system, ema=(0.9999, 0.1))
    start = [p.detach().clone() for p in optimizer.parameters]
    fill_gradients(optimizer)
    optimizer.step(1e-2)
    for name, decay in (("ema-0.9999", 2 / 11), ("ema-0.1", 0.1)):
        expected = [decay * a + (1 - decay) * p for a, p in zip(start, optimizer.parameters)]
        torch.testing.assert_close(optimizer.emas[name], expected)


@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_steps_equal_torch_with_clip_grad_norm(make_system, size):
    system, optimizer = optimizer_of(make_system, clip=1.0)
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
def test_the_compiled_operators_take_the_same_steps(make_system):
    results = []
    for implementation in ("cpu", "reference"):
        system = make_system(ema=(0.5, 0.9), clip=1.0)
        optimizer = Optimizer(system, system.config, implementation)
        norms = []
        for _ in range(3):
            fill_gradients(optimizer)
            norms.append(optimizer.step(1e-2))
        results.append((norms, everything(optimizer)))
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)


def test_correction_scales_gradients_before_clipping(make_system):
    results = []
    for size, correction in ((1e-4, 1.0), (1e-3, 0.1)):
        _, optimizer = optimizer_of(make_system)
        fill_gradients(optimizer, size)
        results.append((optimizer.step(1e-2, correction), everything(optimizer)))
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_gradient_skips_the_step_bitwise_and_counts(make_system, bad):
    _, optimizer = optimizer_of(make_system, ema=(0.9, 0.99))
    fill_gradients(optimizer)
    optimizer.step(1e-2)
    before = everything(optimizer)
    fill_gradients(optimizer)
    optimizer.parameters[-1].grad.view(-1)[0] = bad
    assert not optimizer.step(1e-2).isfinite()
    after = everything(optimizer)
    assert int(optimizer.skipped) == 1 and optimizer.step_count == 2
    assert sum(not torch.equal(a, b) for a, b in zip(before, after)) == 1  # the counter itself
    fill_gradients(optimizer)
    optimizer.step(1e-2)
    assert all(t.isfinite().all() for t in everything(optimizer))


def test_averaged_puts_the_live_weights_back(make_system):
    system, optimizer = optimizer_of(make_system)
    fill_gradients(optimizer)
    optimizer.step(1e-2)
    live = [p.detach().clone() for p in optimizer.parameters]
    with pytest.raises(KeyError), optimizer.averaged("ema-0.9999"):
        now = [p.detach() for p in system.parameters()]
        assert all(map(torch.equal, now, optimizer.emas["ema-0.9999"]))
        assert not all(map(torch.equal, now, live))
        raise KeyError
    assert all(map(torch.equal, system.parameters(), live))
    with optimizer.averaged(None):
        assert all(map(torch.equal, system.parameters(), live))


def test_checkpoint_round_trip(make_system):
    _, first = optimizer_of(make_system, ema=(0.9, 0.99))
    for _ in range(2):
        fill_gradients(first)
        first.step(1e-2)
    files = {
        name: {k: t.clone() for k, t in tensors.items()} for name, tensors in first.files().items()
    }
    assert set(files) == {"model", "ema-0.9", "ema-0.99", "optimizer"}
    _, second = optimizer_of(make_system, ema=(0.9, 0.99))
    second.load(files.__getitem__, first.step_count)
    for optimizer in (first, second):
        fill_gradients(optimizer)
        optimizer.step(1e-2)
    assert all(map(torch.equal, everything(first), everything(second)))


def test_tensors_of_another_model_are_refused(make_system):
    _, small = optimizer_of(make_system)
    _, deep = optimizer_of(make_system, depth=3)
    _, wide = optimizer_of(make_system, width=64)
    with pytest.raises(ValueError, match="model of the checkpoint does not fit.*missing"):
        deep.load(small.files().__getitem__, 1)
    with pytest.raises(ValueError, match=r"model: .* is \(.*expected \("):
        wide.load(small.files().__getitem__, 1)
