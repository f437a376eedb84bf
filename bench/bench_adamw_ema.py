"""A whole optimizer step (gradient clipping, AdamW, one average) against PyTorch's own parts.

    pytest bench/bench_adamw_ema.py --benchmark-only

1.4 million parameters on CPU, 207 million (size B) on CUDA. Bytes that any implementation must move
per parameter: 28 (p, m, v read and written, g read) + 8 (the average) + 4 (g again, for the norm).
"""

import pytest
import torch

from heptapod_fast.ops import dispatch
from heptapod_fast.ops.adamw_ema import adamw_ema, global_norm

BETAS, EPS, DECAY, CLIP = (0.9, 0.95), 1e-8, 0.9999, 1.0
BYTES_PER_PARAMETER = 28 + 8 + 4


def shapes(device):
    """Transformer-like: `layers` blocks of width d, some large tensors and many small ones."""
    layers, width = (29, 768) if device == "cuda" else (7, 128)
    block = [(3 * width, width), (3 * width,), (width, width), (width,), (4 * width, width),
             (4 * width,), (width, 4 * width), (width,), (width,), (width,), (width,), (width,)]
    return block * layers


def make(device):
    generator = torch.Generator(device).manual_seed(0)
    params = [torch.randn(shape, device=device, generator=generator) for shape in shapes(device)]
    return params, [torch.randn_like(p) for p in params], [p.clone() for p in params]


def size(params):
    return sum(p.numel() for p in params) * BYTES_PER_PARAMETER


@pytest.mark.parametrize("implementation", ["cuda", "cpu", "reference"])
@pytest.mark.benchmark(group="adamw_ema")
def bench_ours(measure, device, implementation):
    try:
        dispatch.choose("adamw_ema", device, torch.float32, implementation)
    except dispatch.Unavailable as error:
        pytest.skip(str(error))
    params, grads, ema = make(device)
    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    lr, step = (torch.tensor(value, device=device) for value in (1e-4, 1.0))
    decays, weight_decays = torch.tensor([DECAY], device=device), [0.02] * len(params)

    def run():
        scale = (CLIP / (global_norm(grads) + 1e-6)).clamp(max=1.0)
        adamw_ema(params, grads, *moments, [ema], lr=lr, step=step, grad_scale=scale,
                  ema_decays=decays, weight_decays=weight_decays, beta1=BETAS[0], beta2=BETAS[1],
                  eps=EPS, implementation=implementation)

    measure(run, size(params))


@pytest.mark.parametrize("variant", ["foreach", "fused"])
@pytest.mark.benchmark(group="adamw_ema")
def bench_torch(measure, device, variant):
    params, grads, ema = make(device)
    optimizer = torch.optim.AdamW(params, lr=1e-4, betas=BETAS, eps=EPS, weight_decay=0.02,
                                  **{variant: True})
    for param, grad in zip(params, grads):
        param.requires_grad_().grad = grad

    def run():
        torch.nn.utils.clip_grad_norm_(params, CLIP, foreach=True)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(ema, params, 1 - DECAY)

    measure(run, size(params))
