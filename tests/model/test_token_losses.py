"""Token losses: the diffusion MLP layer by layer, its draws, and how often each part runs."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from heptapod_fast import ops
from heptapod_fast.model import sampled_mlp
from heptapod_fast.model.sampled_mlp import SampledMlp
from heptapod_fast.model.token_losses import (
    Categorical,
    Contrast,
    Diffusion,
    Flow,
    timestep_features,
)
from heptapod_fast.ops.diffusion_loss import row_losses
from heptapod_fast.ops.dispatch import AUTO, Operators
from heptapod_fast.rng import Rng
from heptapod_fast.sampling import SampleOptions, respaced, sample_codes
from tests.numerics import needs_triton
from tests.running import fill

D, C, W, REPEAT = 12, 3, 8, 4


def diffusion(bound=True, blocks=2, limit=0.0, operators=AUTO):
    return fill(
        Diffusion(
            D,
            C,
            blocks=blocks,
            mlp_width=W,
            repeat=REPEAT,
            bound=bound,
            limit=limit,
            operators=operators,
        )
    )


def rows(count=5):
    generator = torch.Generator().manual_seed(2)
    z, x0 = torch.randn(count, D, generator=generator), torch.randn(count, C, generator=generator)
    return z, x0, torch.arange(count) + 3, torch.arange(count) * 7


def upstream_mlp(m, x, t, z):
    """MAR's SimpleMLPAdaLN written out: every row its own time embedding and condition."""
    linear = lambda layer, value: value @ layer.weight.t() + layer.bias
    angle = t.float()[:, None] * torch.exp(-math.log(1e4) * torch.arange(128) / 128)
    features = torch.cat((angle.cos(), angle.sin()), dim=1).to(z.dtype)
    y = linear(m.time2, F.silu(linear(m.time1, features))) + linear(m.condition, z)
    x = linear(m.input, x)
    for block in m.blocks:
        shift, scale, gate = linear(block.modulation, F.silu(y)).chunk(3, dim=1)
        h = F.layer_norm(x, (W,), block.norm.weight, block.norm.bias, 1e-6) * (1 + scale) + shift
        x = x + gate * linear(block.fc2, F.silu(linear(block.fc1, h)))
    shift, scale = linear(m.modulation, F.silu(y)).chunk(2, dim=1)
    return linear(m.output, F.layer_norm(x, (W,), eps=1e-6) * (1 + scale) + shift)


def test_mlp_is_upstreams():
    m, (z, x, *_) = diffusion(), rows(6)
    t = torch.tensor([0, 1, 10, 500, 998, 999])
    torch.testing.assert_close(
        m.net(x, t, m.condition(z)), upstream_mlp(m, x, t, z), rtol=1e-4, atol=1e-5
    )


def test_rows_share_the_condition_of_their_token():
    m, (z, *_) = diffusion(), rows(3)
    x, t = torch.randn(12, C), torch.arange(12) * 90
    condition = m.condition(z)
    torch.testing.assert_close(
        m.net(x, t, condition), m.net(x, t, condition.repeat_interleave(4, dim=0))
    )


@needs_triton
def test_kernels_give_every_parameter_its_gradient():
    gradients = {}
    for implementation in ("reference", "triton"):
        operators = Operators({"diffusion_mlp": implementation})
        m, (z, *_) = diffusion(operators=operators), rows(3)
        out = m.net(torch.ones(12, C), torch.arange(12) * 90, m.condition(z))
        (out * torch.arange(6.0)).sum().backward()
        gradients[implementation] = {name: p.grad for name, p in m.named_parameters()}
    assert all(bool(g.any()) for g in gradients["reference"].values())
    torch.testing.assert_close(gradients["triton"], gradients["reference"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bound", [True, False])
def test_loss_is_the_mean_over_repeats_with_fresh_draws(bound):
    m, (z, x0, index, slot) = diffusion(bound), rows()
    total, loss = m.loss(z, x0, Rng(1), index, slot)
    torch.testing.assert_close(total, loss.sum())
    for r in range(len(z)):
        each, drawn = [], []
        for i in range(REPEAT):
            key = torch.tensor(int(slot[r]) * REPEAT + i)
            t = Rng(1).integers("diffusion.time", index[r], 1, 1000, key)
            noise = Rng(1).normal("diffusion.noise", index[r], C, key)[None]
            xt = ops.add_noise(x0[r : r + 1], noise, t, m.tables)
            each.append(
                row_losses(
                    upstream_mlp(m, xt, t, z[r : r + 1]),
                    x0[r : r + 1],
                    xt,
                    noise,
                    t,
                    m.tables,
                    bound,
                )
            )
            drawn.append((int(t), float(noise[0, 0])))
        torch.testing.assert_close(loss[r], torch.cat(each).mean(), rtol=1e-3, atol=1e-4)
        assert len(set(drawn)) == REPEAT


def test_draws_of_a_row_are_its_own():
    m, (z, x0, index, slot) = diffusion(), rows()
    _, loss = m.loss(z, x0, Rng(1), index, slot)
    _, alone = m.loss(z[2:3], x0[2:3], Rng(1), index[2:3], slot[2:3])
    assert torch.allclose(alone, loss[2:3])
    _, same = m.loss(z[:1].expand(5, -1), x0[:1].expand(5, -1), Rng(1), index, slot)
    assert len(same.unique()) == 5


def test_timesteps_cover_0_to_999():
    t = Rng(1).integers("diffusion.time", torch.arange(20_000), 1, 1000)
    assert int(t.min()) == 0 and int(t.max()) == 999


def watch(monkeypatch, m, note):
    """Calls note(name, input, output) for the first and last layer, which are no module calls."""
    plain, names = F.linear, {id(m.input.weight): "input", id(m.output.weight): "output"}

    def linear(x, weight, bias=None):
        out = plain(x, weight, bias)
        if id(weight) in names:
            note(names[id(weight)], x, out)
        return out

    monkeypatch.setattr(F, "linear", linear)


def test_condition_runs_once_per_token_and_time_once_per_call(monkeypatch):
    m, (z, x0, index, slot) = diffusion(), rows()
    seen = {}
    note = lambda name, x: seen.setdefault(name, []).append(len(x))
    watch(monkeypatch, m, lambda name, x, out: note(name, x))
    for name in ("condition", "time1", "time2"):
        getattr(m, name).register_forward_pre_hook(
            lambda module, inputs, name=name: note(name, inputs[0])
        )
    m.loss(z, x0, Rng(1), index, slot)
    assert seen == {
        "condition": [5],
        "time1": [1000],
        "time2": [1000],
        "input": [5 * REPEAT],
        "output": [5 * REPEAT],
    }


def test_time_features_are_cosines_then_sines():
    features = timestep_features(torch.arange(1000).float())
    for t, k in ((0, 0), (1, 0), (999, 0), (37, 50), (999, 127)):
        angle = t * 10000 ** (-k / 128)
        assert float(features[t, k]) == pytest.approx(math.cos(angle), abs=1e-4)
        assert float(features[t, 128 + k]) == pytest.approx(math.sin(angle), abs=1e-4)


def test_time_table_equals_direct_embedding():
    m = diffusion()
    for t in (0, 17, 999):
        direct = m.time2(F.silu(m.time1(m.sinusoids[t])))
        torch.testing.assert_close(m.embed_time(torch.float32)[t], direct)


def test_first_and_last_layer_work_in_float32(monkeypatch):
    m, (z, x0, index, slot) = diffusion(), rows()
    dtypes = {}
    watch(monkeypatch, m, lambda name, x, out: dtypes.update({name: out.dtype}))
    m.condition.register_forward_hook(
        lambda module, inputs, out: dtypes.update(condition=out.dtype)
    )
    total, loss = m.loss(z.bfloat16(), x0, Rng(1), index, slot)
    assert dtypes == {"input": torch.float32, "output": torch.float32, "condition": torch.bfloat16}
    assert total.dtype == loss.dtype == torch.float32


def test_categorical_loss_and_logits_agree():
    m, (z, _, index, slot) = fill(Categorical(D, 7)), rows()
    target = torch.tensor([0, 6, 2, 2, 5])
    expected = F.cross_entropy(m.logits(z), target, reduction="none")
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0])
    total, loss = m.loss(z, target, Rng(0), index, slot, weight)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(total, (weight * expected).sum())
    assert not loss.requires_grad and total.requires_grad
    assert m.logits(z.bfloat16()).dtype == torch.float32


def linear_products(function):
    """FLOPs of the products that a call runs, as torch counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


def test_flops_of_the_categorical_loss():
    m, (z, _, index, slot) = fill(Categorical(D, 7)), rows()
    counted = linear_products(lambda: m.loss(z, torch.zeros(5).long(), Rng(0), index, slot))
    assert m.flops(5) == counted == 2 * 5 * D * 7


@pytest.mark.parametrize("blocks", [1, 3])
def test_flops_of_the_diffusion_loss(blocks):
    m, (z, x0, index, slot) = diffusion(blocks=blocks), rows()
    table = 2 * 1000 * (256 * W + W * W)  # once per step, whatever the batch
    assert m.flops(5) == linear_products(lambda: m.loss(z, x0, Rng(1), index, slot)) - table


def test_a_categorical_draw_is_that_of_its_logits():
    m, (z, _, index, slot) = fill(Categorical(D, 7)), rows()
    options = SampleOptions(temperature=0.8, top_k=5)
    code, chance = m.draw(z, Rng(3), index, slot, options)
    uniform = Rng(3).uniform("sample.token", index, 1, slot)[:, 0]
    expected, probability = sample_codes(m.logits(z), uniform, options)
    assert torch.equal(code, expected)
    torch.testing.assert_close(chance, probability)


def test_a_diffusion_draw_denoises_with_its_own_network():
    """DDIM, written out in float64 around the MLP of upstream. The limit keeps the first steps,
    which multiply errors by thousands, within bounds."""
    limit = 2.0
    m, (z, _, index, slot) = diffusion(limit=limit), rows()
    options = SampleOptions(diffusion_steps=4, diffusion_sampler="ddim")
    drawn, chance = m.draw(z, Rng(3), index, slot, options)
    assert chance is None
    double = copy.deepcopy(m).double()
    abar = (1 - ops.cosine_betas()).cumprod(0)
    x = Rng(3).normal("sample.start", index, C, slot).double()
    times = respaced(4).tolist()
    for step in reversed(range(4)):
        t = torch.full((len(z),), times[step])
        now = float(abar[times[step]])
        before = float(abar[times[step - 1]]) if step else 1.0
        eps = upstream_mlp(double, x, t, z.double()).chunk(2, dim=1)[0]
        x0 = ((x - math.sqrt(1 - now) * eps) / math.sqrt(now)).clamp(-limit, limit)
        eps = (x - math.sqrt(now) * x0) / math.sqrt(1 - now)
        x = math.sqrt(before) * x0 + math.sqrt(1 - before) * eps
    assert x.abs().max() <= limit
    torch.testing.assert_close(drawn, x.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_mlp_that_samples_is_upstreams(blocks, monkeypatch):
    """Every time its own row, in float64; many rows in parts."""
    m, (z, x0, _, _) = diffusion(blocks=blocks).double(), rows()
    z, x = z.double(), x0.double()
    t = torch.tensor([0, 3, 500, 998, 999])
    y = m.embed(m.sinusoids[t]) + m.condition(z)
    found = SampledMlp(m.weights(), 1e-6)(x, y)
    torch.testing.assert_close(found, upstream_mlp(m, x, t, z), rtol=1e-7, atol=1e-8)
    monkeypatch.setattr(sampled_mlp, "ROWS", 2)
    torch.testing.assert_close(SampledMlp(m.weights(), 1e-6)(x, y), found, rtol=1e-9, atol=1e-10)


# --------------------------------------------------------------------------------- flow matching


def flow(limit=0.0, operators=AUTO):
    return fill(Flow(D, C, blocks=2, mlp_width=W, repeat=REPEAT, limit=limit, operators=operators))


def test_flow_loss_is_its_definition():
    """Straight lines from data at time 0 to noise at 1, in float64, row by row."""
    m, (z, x0, index, slot) = flow(), rows()
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0])
    total, loss = m.loss(z, x0, Rng(1), index, slot, weight)
    double = copy.deepcopy(m).double()
    for row in range(5):
        losses = []
        for k in range(REPEAT):
            one = index[row : row + 1], slot[row : row + 1] * REPEAT + k
            t = Rng(1).uniform("flow.time", one[0], 1, one[1]).double()
            noise = Rng(1).normal("flow.noise", one[0], C, one[1]).double()
            xt = (1 - t) * x0[row].double() + t * noise
            v = upstream_mlp(double, xt, 1000 * t[0], z[row : row + 1].double())
            losses.append((v - (noise - x0[row])).square().mean())
        expected = torch.stack(losses).mean()
        torch.testing.assert_close(loss[row].double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(total, (weight * loss).sum())


@needs_triton
def test_flow_kernels_give_every_parameter_its_gradient():
    z, x0, index, slot = rows()
    names = ("flow_loss", "diffusion_mlp")
    found = []
    for how in ("reference", "triton"):
        m = flow(operators=Operators(dict.fromkeys(names, how)))
        leaf = z.clone().requires_grad_()
        m.loss(leaf, x0, Rng(1), index, slot)[0].backward()
        assert all(p.grad is not None and p.grad.any() for p in m.parameters())
        found.append([leaf.grad, *(p.grad for p in m.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def test_flops_of_the_flow_loss():
    m, (z, x0, index, slot) = flow(), rows()
    assert m.flops(5) == linear_products(lambda: m.loss(z, x0, Rng(1), index, slot))


@pytest.mark.parametrize("sampler", [None, "euler", "heun"])
def test_a_flow_draw_follows_its_own_network(sampler):
    m, (z, _, index, slot) = flow(), rows()
    options = SampleOptions(diffusion_steps=3, diffusion_sampler=sampler, temperature=0.5)
    drawn, chance = m.draw(z, Rng(3), index, slot, options)
    assert chance is None
    double = copy.deepcopy(m).double()

    def velocity(x, time):
        return upstream_mlp(double, x, torch.full((len(z),), 1000.0 * time), z.double())

    x = 0.5 * Rng(3).normal("sample.start", index, C, slot).double()
    for time in (1.0, 2 / 3, 1 / 3):
        first = velocity(x, time)
        end = x - first / 3
        if sampler == "heun":
            end = x - (first + velocity(end, time - 1 / 3)) / 6
        x = end
    torch.testing.assert_close(drawn, x.float(), rtol=1e-2, atol=1e-2)


def test_a_flow_draw_stays_within_the_limit():
    m, (z, _, index, slot) = flow(limit=0.5), rows()
    with torch.no_grad():
        m.output.bias += 100.0
    for sampler in ("euler", "heun"):
        options = SampleOptions(diffusion_steps=5, diffusion_sampler=sampler)
        drawn, _ = m.draw(z, Rng(3), index, slot, options)
        assert float(drawn.detach().abs().max()) <= 0.5


@pytest.mark.parametrize("make", [flow, diffusion, lambda: fill(Categorical(D, 7))])
def test_guidance_of_scale_one_is_none(make):
    m, (z, _, index, slot) = make(), rows()
    steps = {} if isinstance(m, Categorical) else {"diffusion_steps": 2}
    options = SampleOptions(**steps)
    plain, _ = m.draw(z, Rng(3), index, slot, options)
    one, _ = m.draw(z, Rng(3), index, slot, options, Contrast(torch.zeros_like(z), 1.0))
    other, _ = m.draw(z, Rng(3), index, slot, options, Contrast(torch.zeros_like(z), 9.0))
    torch.testing.assert_close(plain, one, rtol=1e-3, atol=1e-3)
    assert not torch.equal(plain, other)


def test_guidance_of_diffusion_leaves_the_variance():
    m, (z, *_) = diffusion(), rows()
    own, other = torch.randn(2, 5, 2 * C)
    found = m.combine(Contrast(z, 3.0), own, other)
    assert torch.equal(found[:, C:], own[:, C:])
    torch.testing.assert_close(found[:, :C], other[:, :C] + 3 * (own - other)[:, :C])


def test_samplers_of_another_kind_are_refused():
    for m, wrong in ((flow(), "ddpm"), (diffusion(), "heun")):
        with pytest.raises(ValueError, match=f"--diffusion-sampler {wrong}: .* drawn by"):
            m.check_options(SampleOptions(diffusion_sampler=wrong))
        m.check_options(SampleOptions(diffusion_sampler=m.SAMPLERS[1]))
