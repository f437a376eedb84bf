"""Whole systems on a GPU: train, agree with the CPU, sample. Without one they only sample."""

import pytest
import torch

from heptapod_fast.rng import Rng
from tests.numerics import DEVICE

pytestmark = pytest.mark.gpu
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CASES = [
    ("discrete", dict(density=2)),
    ("continuous", dict(density=2)),
    ("discrete", dict(head="local", window=4, density=4)),
    ("discrete", dict(steps="uniform", dropout=0.1)),
    ("discrete", dict(system="1d-random")),
    ("continuous", dict(token_loss="flow")),
    ("discrete", dict(system="llamagen", dropout=0.1)),
    ("discrete", dict(system="npp")),
    ("continuous", dict(system="sar", dropout=0.1)),
    ("continuous", dict(system="sar", grouping="next-row", injection="shift")),
]


@on_a_gpu
@pytest.mark.parametrize("tokens, settings", CASES)
def test_loss_and_gradients_agree_with_the_cpu(make_system, make_batch, tokens, settings):
    results = []
    for device in ("cpu", "cuda"):
        system = make_system(tokens, device=device, **settings)
        loss = system.loss(make_batch(system, 8).to(device), Rng(0)).mean
        loss.backward()
        results.append((loss.item(), [p.grad.cpu() for p in system.parameters()]))
    (cpu_loss, cpu_grads), (gpu_loss, gpu_grads) = results
    assert gpu_loss == pytest.approx(cpu_loss, rel=1e-4)
    for expected, found in zip(cpu_grads, gpu_grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@on_a_gpu
@pytest.mark.parametrize("tokens, settings", CASES)
def test_a_step_does_not_wait_for_the_device(make_system, make_batch, tokens, settings):
    system = make_system(tokens, device="cuda", **settings)
    batch = make_batch(system, 8).to("cuda")
    system.loss(batch, Rng(0)).mean.backward()  # loads kernels, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        system.loss(batch, Rng(0)).total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tokens, settings", CASES)
def test_sampling_takes_classes_from_the_cpu(make_system, tokens, settings):
    system = make_system(tokens, device=DEVICE, **settings).eval()
    few = {"diffusion_steps": 5} if tokens == "continuous" else {}
    found = system.sample(torch.tensor([0, 1, 2]), Rng(0), system.options(**few))
    assert found.device.type == DEVICE and len(found) == 3
