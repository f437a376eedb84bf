"""diffusion_loss: times, noise, x_t, then MSE + VB and its gradient, against its peers.

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
from heptapod_fast.ops import philox
from heptapod_fast.ops.diffusion_loss import (
    STEPS,
    add_noise,
    cosine_betas,
    diffusion_inputs,
    diffusion_loss,
    row_losses,
    schedule_tables,
)

# Tokens of a micro-batch with a loss, channels of a token, repeats.
SHAPES = {
    "cuda": {
        "latents": (128 * 128, 16, 4),
        "2x2 patches": (128 * 32, 48, 4),
        "patches": (64 * 64, 192, 4),
    },
    "cpu": {"tiny": (32, 16, 4)},
}


def inputs(device, tokens, channels, repeat):
    index = torch.arange(tokens, device=device)
    draws = philox.Draws(index, index.clone(), repeat, (1, 2), (3, 0xF0000004))
    x0 = torch.randn(tokens, channels, device=device)
    prediction = torch.randn(tokens * repeat, 2 * channels, device=device, requires_grad=True)
    tables = schedule_tables(cosine_betas()).to(device)
    return x0, prediction, draws, tables, torch.randn(tokens, device=device)


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
    rows, device = len(draws.index_M) * draws.repeat, draws.index_M.device
    return (
        torch.randint(0, STEPS, (rows,), device=device),
        torch.randn(rows, channels, device=device),
    )


def ours(device, bound, whole):
    how = harness.fastest(device)

    def prepare(made):
        x0, prediction, draws, tables, upstream = made
        xt, t = diffusion_inputs(x0, draws, tables, how)

        def loss(prediction, xt, t):
            return diffusion_loss(prediction, x0, xt, t, draws, tables, bound, how)

        def call():
            noised = diffusion_inputs(x0, draws, tables, how) if whole else (xt, t)
            return torch.autograd.grad(loss(prediction, *noised), prediction, upstream)

        return call

    return prepare


def peer(draw, bound, whole, wrap=lambda f: f):
    def prepare(made):
        x0, prediction, draws, tables, upstream = made
        repeat = draws.repeat

        def noised(x0, index, slot):
            t, noise = draw(draws._replace(index_M=index, slot_M=slot), x0.shape[1])
            return add_noise(x0.repeat_interleave(repeat, dim=0), noise, t, tables), t, noise

        def loss(prediction, x0, xt, t, noise):
            each = row_losses(
                prediction, x0.repeat_interleave(repeat, dim=0), xt, noise, t, tables, bound
            )
            return each.view(-1, repeat).mean(1)

        noised, loss = wrap(noised), wrap(loss)
        stored = noised(x0, draws.index_M, draws.slot_M)

        def call():
            drawn = noised(x0, draws.index_M, draws.slot_M) if whole else stored
            return torch.autograd.grad(loss(prediction, x0, *drawn), prediction, upstream)

        return call

    return prepare


def contenders(device, bound, whole):
    found = {
        "ours": ours(device, bound, whole),
        "eager": peer(philox_draws, bound, whole),
        "compiled": peer(philox_draws, bound, whole, harness.compiled),
    }
    if whole:
        found["eager, torch.randn"] = peer(torch_draws, bound, whole)
    if whole and device == "cuda":
        found |= {
            "compiled, traced philox": peer(traced_draws, bound, whole, harness.compiled),
            "compiled, torch.randn": peer(torch_draws, bound, whole, harness.compiled),
        }
    return found


def bytes_moved(tokens, channels, repeat, bound, whole):
    """float32 rows and int64 times, indices and slots; without the bound no times, and of the
    prediction the half that is eps (its gradient is written whole)."""
    rows = tokens * repeat
    loss = rows * (3 * 2 * channels * 4 + 2 * 8) + tokens * (2 * channels * 4 + 2 * 16 + 8)
    if not bound:
        loss = rows * (2 + 2) * channels * 4 + tokens * (2 * 16 + 8)
    return loss + (rows * (channels * 4 + 8) + tokens * (channels * 4 + 16) if whole else 0)


def cases(device):
    found = []
    for name, (tokens, channels, repeat) in SHAPES[device].items():
        for bound, whole in ((True, True), (True, False), (False, True)):
            what = "MSE + VB" if bound else "MSE"
            found.append(
                harness.Case(
                    "diffusion_loss",
                    f"{'step' if whole else 'loss'}, {what}, {name}, "
                    f"{tokens} x {repeat} x {channels}",
                    functools.partial(inputs, device, tokens, channels, repeat),
                    contenders(device, bound, whole),
                    bytes=bytes_moved(tokens, channels, repeat, bound, whole),
                    gate=">= 2x best peer" if bound and whole else "",
                    aim=">= 4x best peer" if bound and whole else "",
                )
            )
    return found


bench_diffusion_loss = harness.benchmark_of(cases)
