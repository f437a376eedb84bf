"""flow_loss: times, noise, x_t, then the velocity error and its gradient, against its peers.

    python bench/bench_flow_loss.py
    pytest bench/bench_flow_loss.py --benchmark-only

Cases and peers as in bench/bench_diffusion_loss.py.
"""

import functools

import torch

from bench import harness
from bench.bench_diffusion_loss import SHAPES, Step, draws_of, peers_of
from bench.case import Case, fastest
from heptapod_fast.ops import philox
from heptapod_fast.ops.flow_loss import flow_inputs, flow_loss

KINDS = {"step": True, "loss": False}  # whether inputs are drawn in every call


def inputs(device, tokens, channels, repeat):
    """(x0, prediction, draws, gradient of the loss)."""
    x0 = torch.randn(tokens, channels, device=device)
    prediction = torch.randn(tokens * repeat, channels, device=device, requires_grad=True)
    return x0, prediction, draws_of(device, tokens, repeat), torch.randn(tokens, device=device)


# ------------------------------------------------------------------------------------------- ours


def our_noise(draws, how, x0, index, slot):
    """(x_t, times)."""
    return flow_inputs(x0, draws, how)


def our_loss(draws, how, prediction, x0, *drawn):
    """A loss for every token; noise is made again, nothing of what was drawn is read."""
    return flow_loss(prediction, x0, draws, how)


def ours(how, whole, made):
    """heptapod_fast's own operations. how: the implementation."""
    x0, prediction, draws, upstream = made
    noise = functools.partial(our_noise, draws, how)
    loss = functools.partial(our_loss, draws, how)
    return Step(noise, loss, x0, prediction, draws, upstream, whole)


# ------------------------------------------------------------------------------------------ peers


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
    """Times and noise by PyTorch's generator."""
    rows, device = len(draws.index_M) * draws.repeat, draws.index_M.device
    return torch.rand(rows, device=device), torch.randn(rows, channels, device=device)


def peer_noise(draw, draws, x0, index, slot):
    """(x_t, times, noise)."""
    time, noise = draw(draws._replace(index_M=index, slot_M=slot), x0.shape[1])
    rows = x0.repeat_interleave(draws.repeat, dim=0)
    return (1 - time)[:, None] * rows + time[:, None] * noise, time, noise


def peer_loss(repeat, prediction, x0, xt, time, noise):
    """A loss for every token."""
    velocity = noise - x0.repeat_interleave(repeat, dim=0)
    return (prediction - velocity).square().mean(-1).view(-1, repeat).mean(1)


def peer(draw, wrap, whole, made):
    """Plain PyTorch. draw: times and noise of draws."""
    x0, prediction, draws, upstream = made
    noise = wrap(functools.partial(peer_noise, draw, draws))
    loss = wrap(functools.partial(peer_loss, draws.repeat))
    return Step(noise, loss, x0, prediction, draws, upstream, whole)


# ------------------------------------------------------------------------------------------ cases


def contenders(device, whole):
    """Ours and all peers."""

    def prepare(draw, wrap):
        return functools.partial(peer, draw, wrap, whole)

    draws = philox_draws, traced_draws, torch_draws
    own = functools.partial(ours, fastest(device), whole)
    return {"ours": own} | peers_of(device, whole, prepare, draws)


def bytes_moved(tokens, channels, repeat, whole):
    """float32 rows, int64 indices and slots."""
    rows = tokens * repeat
    loss = rows * 3 * channels * 4 + tokens * (2 * channels * 4 + 2 * 16 + 8)
    drawing = rows * (channels * 4 + 4) + tokens * (channels * 4 + 16)
    return loss + drawing if whole else loss


def case(device, size, kind):
    """One kind at one shape."""
    tokens, channels, repeat = SHAPES[device][size]
    whole = KINDS[kind]
    return Case(
        "flow_loss",
        f"{kind}, {size}, {tokens} x {repeat} x {channels}",
        functools.partial(inputs, device, tokens, channels, repeat),
        contenders(device, whole),
        bytes=bytes_moved(tokens, channels, repeat, whole),
        gate=">= 2x best peer" if whole else "",
        aim=">= 4x best peer" if whole else "",
    )


def cases(device):
    """Every shape and kind."""
    return [case(device, size, kind) for size in SHAPES[device] for kind in KINDS]


bench_flow_loss = harness.bench(cases)

if __name__ == "__main__":
    harness.main(cases)
