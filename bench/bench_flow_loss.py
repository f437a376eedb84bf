"""flow_loss: times, noise, x_t, then the velocity error and its gradient, against its peers.

    pytest bench/bench_flow_loss.py --benchmark-only

Cases and peers as in bench/bench_diffusion_loss.py.
"""

import functools

import torch

from bench import harness
from bench.bench_diffusion_loss import SHAPES
from heptapod_fast.ops import philox
from heptapod_fast.ops.flow_loss import flow_inputs, flow_loss


def inputs(device, tokens, channels, repeat):
    index = torch.arange(tokens, device=device)
    draws = philox.Draws(index, index.clone(), repeat, (1, 2), (3, 0xF0000004))
    x0 = torch.randn(tokens, channels, device=device)
    prediction = torch.randn(tokens * repeat, channels, device=device, requires_grad=True)
    return x0, prediction, draws, torch.randn(tokens, device=device)


def philox_draws(draws, channels):
    """Times and noise by `philox`, whichever implementation there is."""
    return philox.to_uniform(draws.times()), draws.noise(channels)


def traced_draws(draws, channels):
    """The same in plain PyTorch."""
    rows = draws.rows()
    time = philox.reference(*rows, 1, draws.time_key)[:, 0]
    words = philox.reference(*rows, (channels + 3) // 4, draws.noise_key)
    return philox.to_uniform(time), philox.to_normal(words)[:, :channels]


def torch_draws(draws, channels):
    rows, device = len(draws.index_M) * draws.repeat, draws.index_M.device
    return torch.rand(rows, device=device), torch.randn(rows, channels, device=device)


def ours(device, whole):
    how = harness.fastest(device)

    def prepare(made):
        x0, prediction, draws, upstream = made

        def call():
            noised = flow_inputs(x0, draws, how) if whole else ()
            loss = flow_loss(prediction, x0, draws, how)
            return noised, torch.autograd.grad(loss, prediction, upstream)

        return call

    return prepare


def peer(draw, whole, wrap=lambda f: f):
    def prepare(made):
        x0, prediction, draws, upstream = made
        repeat = draws.repeat

        def noised(x0, index, slot):
            time, noise = draw(draws._replace(index_M=index, slot_M=slot), x0.shape[1])
            rows = x0.repeat_interleave(repeat, dim=0)
            return (1 - time)[:, None] * rows + time[:, None] * noise, time, noise

        def loss(prediction, x0, noise):
            velocity = noise - x0.repeat_interleave(repeat, dim=0)
            return (prediction - velocity).square().mean(-1).view(-1, repeat).mean(1)

        noised, loss = wrap(noised), wrap(loss)
        stored = noised(x0, draws.index_M, draws.slot_M)

        def call():
            drawn = noised(x0, draws.index_M, draws.slot_M) if whole else stored
            found = loss(prediction, x0, drawn[2])
            return drawn, torch.autograd.grad(found, prediction, upstream)

        return call

    return prepare


def contenders(device, whole):
    found = {
        "ours": ours(device, whole),
        "eager": peer(philox_draws, whole),
        "compiled": peer(philox_draws, whole, harness.compiled),
    }
    if whole:
        found["eager, torch.randn"] = peer(torch_draws, whole)
    if whole and device == "cuda":
        found |= {
            "compiled, traced philox": peer(traced_draws, whole, harness.compiled),
            "compiled, torch.randn": peer(torch_draws, whole, harness.compiled),
        }
    return found


def bytes_moved(tokens, channels, repeat, whole):
    """float32 rows, int64 indices and slots."""
    rows = tokens * repeat
    loss = rows * 3 * channels * 4 + tokens * (2 * channels * 4 + 2 * 16 + 8)
    return loss + (rows * (channels * 4 + 4) + tokens * (channels * 4 + 16) if whole else 0)


def cases(device):
    found = []
    for name, (tokens, channels, repeat) in SHAPES[device].items():
        for whole in (True, False):
            found.append(
                harness.Case(
                    "flow_loss",
                    f"{'step' if whole else 'loss'}, {name}, {tokens} x {repeat} x {channels}",
                    functools.partial(inputs, device, tokens, channels, repeat),
                    contenders(device, whole),
                    bytes=bytes_moved(tokens, channels, repeat, whole),
                    gate=">= 2x best peer" if whole else "",
                    aim=">= 4x best peer" if whole else "",
                )
            )
    return found


bench_flow_loss = harness.benchmark_of(cases)
