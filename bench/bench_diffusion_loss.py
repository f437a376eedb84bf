"""diffusion_loss: times, noise, x_t, then MSE + VB and its gradient, against its peers.

    python bench/bench_diffusion_loss.py
    pytest bench/bench_diffusion_loss.py --benchmark-only

"step" is what a training step does around the network: inputs, loss and gradient for a given
prediction. "loss" is the loss and its gradient alone; there peers read noise that they have stored.
In both, peers keep their noise (the kernels make it again). Peers: "eager" and "compiled" draw by
the compiled Philox operator where it is built; "compiled, traced philox" leaves Philox to the
compiler; "torch.randn" draws as MAR does, which depends on the batch and the device. Loss and
inputs are compiled apart, since the network stands between them.

Bytes of a step: x_t, t and the gradient written, prediction read twice, the rest once; of the loss
alone: without x_t, and t read twice.
"""

import functools

import torch

from bench import harness
from bench.case import Case, compiled, fastest
from heptapod_fast.ops import philox
from heptapod_fast.ops.diffusion_loss import diffusion_inputs, diffusion_loss, row_losses
from heptapod_fast.ops.diffusion_schedule import STEPS, add_noise, cosine_betas, schedule_tables

# Tokens of a micro-batch with a loss, channels of a token, repeats.
SHAPES = {
    "cuda": {
        "latents": (128 * 128, 16, 4),
        "2x2 patches": (128 * 32, 48, 4),
        "patches": (64 * 64, 192, 4),
    },
    "cpu": {"tiny": (32, 16, 4)},
}
# {what: (with the variational bound, with inputs)}
KINDS = {
    "step, MSE + VB": (True, True),
    "loss, MSE + VB": (True, False),
    "step, MSE": (False, True),
}


def draws_of(device, tokens, repeat):
    """The counters of so many tokens."""
    index = torch.arange(tokens, device=device)
    return philox.Draws(index, index.clone(), repeat, (1, 2), (3, 0xF0000004))


def inputs(device, tokens, channels, repeat):
    """(x0, prediction, draws, the schedule's tables, gradient of the loss)."""
    x0 = torch.randn(tokens, channels, device=device)
    prediction = torch.randn(tokens * repeat, 2 * channels, device=device, requires_grad=True)
    tables = schedule_tables(cosine_betas()).to(device)
    upstream = torch.randn(tokens, device=device)
    return x0, prediction, draws_of(device, tokens, repeat), tables, upstream


class Step:
    """A call: noise from x0 and counters, then the gradient of the loss in the prediction.

    noise(x0, index, slot): what the loss needs besides prediction and x0. whole: noise is drawn in
    every call, not once before.
    """

    def __init__(self, noise, loss, x0, prediction, draws, upstream, whole):
        self.noise, self.loss = noise, loss
        self.given = x0, draws.index_M, draws.slot_M
        self.prediction, self.upstream = prediction, upstream
        self.stored = None if whole else noise(*self.given)

    def __call__(self):
        drawn = self.noise(*self.given) if self.stored is None else self.stored
        found = self.loss(self.prediction, self.given[0], *drawn)
        return drawn, torch.autograd.grad(found, self.prediction, self.upstream)


# ------------------------------------------------------------------------------------------- ours


def our_noise(draws, tables, how, x0, index, slot):
    """(x_t, t)."""
    return diffusion_inputs(x0, draws, tables, how)


def our_loss(draws, tables, bound, how, prediction, x0, xt, t):
    """A loss for every token."""
    return diffusion_loss(prediction, x0, xt, t, draws, tables, bound, how)


def ours(how, bound, whole, made):
    """heptapod_fast's own operations. how: the implementation."""
    x0, prediction, draws, tables, upstream = made
    noise = functools.partial(our_noise, draws, tables, how)
    loss = functools.partial(our_loss, draws, tables, bound, how)
    return Step(noise, loss, x0, prediction, draws, upstream, whole)


# ------------------------------------------------------------------------------------------ peers


def philox_draws(draws, channels):
    """Times and noise by `philox`, whichever implementation there is."""
    return philox.to_integer(draws.times(), STEPS), draws.noise(channels)


def traced_draws(draws, channels):
    """The same in plain PyTorch."""
    rows = draws.rows()
    t = philox.reference(*rows, 1, draws.time_key)[:, 0]
    words = philox.reference(*rows, (channels + 3) // 4, draws.noise_key)
    return philox.to_integer(t, STEPS), philox.to_normal(words)[:, :channels]


def torch_draws(draws, channels):
    """Times and noise by PyTorch's generator."""
    rows, device = len(draws.index_M) * draws.repeat, draws.index_M.device
    times = torch.randint(0, STEPS, (rows,), device=device)
    return times, torch.randn(rows, channels, device=device)


def peer_noise(draw, draws, tables, x0, index, slot):
    """(x_t, t, noise)."""
    t, noise = draw(draws._replace(index_M=index, slot_M=slot), x0.shape[1])
    return add_noise(x0.repeat_interleave(draws.repeat, dim=0), noise, t, tables), t, noise


def peer_loss(repeat, tables, bound, prediction, x0, xt, t, noise):
    """A loss for every token."""
    rows = x0.repeat_interleave(repeat, dim=0)
    each = row_losses(prediction, rows, xt, noise, t, tables, bound)
    return each.view(-1, repeat).mean(1)


def as_it_is(function):
    """Not compiled."""
    return function


def peer(draw, wrap, bound, whole, made):
    """Plain PyTorch. draw: times and noise of draws. wrap: `as_it_is` or `compiled`."""
    x0, prediction, draws, tables, upstream = made
    noise = wrap(functools.partial(peer_noise, draw, draws, tables))
    loss = wrap(functools.partial(peer_loss, draws.repeat, tables, bound))
    return Step(noise, loss, x0, prediction, draws, upstream, whole)


# ------------------------------------------------------------------------------------------ cases


def peers_of(device, whole, prepare, draws):
    """{name: contender}. prepare(draw, wrap) makes one; draws: by philox, traced and PyTorch's."""
    by_philox, traced, by_torch = draws
    found = {"eager": prepare(by_philox, as_it_is), "compiled": prepare(by_philox, compiled)}
    if whole:
        found["eager, torch.randn"] = prepare(by_torch, as_it_is)
    if whole and device == "cuda":
        found["compiled, traced philox"] = prepare(traced, compiled)
        found["compiled, torch.randn"] = prepare(by_torch, compiled)
    return found


def contenders(device, bound, whole):
    """Ours and all peers."""

    def prepare(draw, wrap):
        return functools.partial(peer, draw, wrap, bound, whole)

    draws = philox_draws, traced_draws, torch_draws
    own = functools.partial(ours, fastest(device), bound, whole)
    return {"ours": own} | peers_of(device, whole, prepare, draws)


def bytes_moved(tokens, channels, repeat, bound, whole):
    """float32 rows and int64 times, indices and slots; without the bound no times, and of the
    prediction the half that is eps (its gradient is written whole)."""
    rows = tokens * repeat
    loss = rows * (3 * 2 * channels * 4 + 2 * 8) + tokens * (2 * channels * 4 + 2 * 16 + 8)
    if not bound:
        loss = rows * (2 + 2) * channels * 4 + tokens * (2 * 16 + 8)
    drawing = rows * (channels * 4 + 8) + tokens * (channels * 4 + 16)
    return loss + drawing if whole else loss


def case(device, size, kind):
    """One kind at one shape."""
    tokens, channels, repeat = SHAPES[device][size]
    bound, whole = KINDS[kind]
    return Case(
        "diffusion_loss",
        f"{kind}, {size}, {tokens} x {repeat} x {channels}",
        functools.partial(inputs, device, tokens, channels, repeat),
        contenders(device, bound, whole),
        bytes=bytes_moved(tokens, channels, repeat, bound, whole),
        gate=">= 2x best peer" if bound and whole else "",
        aim=">= 4x best peer" if bound and whole else "",
    )


def cases(device):
    """Every shape and kind."""
    return [case(device, size, kind) for size in SHAPES[device] for kind in KINDS]


bench_diffusion_loss = harness.bench(cases)

if __name__ == "__main__":
    harness.main(cases)
