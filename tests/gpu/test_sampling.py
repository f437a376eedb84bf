"""Replayed steps of sampling on a GPU: the tokens of steps that are launched anew."""

import pytest
import torch

from heptapod_fast.rng import Rng
from heptapod_fast.sampling.replay import WARM_UP

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CASES = {
    "codes": ("discrete", {}, {}),
    "two at a step": ("discrete", {}, {"positions_per_step": 2}),
    "cosine": ("discrete", {"grid": 16}, {"positions_per_step": 2, "position_schedule": "cosine"}),
    "local": ("discrete", {"head": "local", "window": 4}, {}),
    "vectors": ("continuous", {}, {"diffusion_steps": 10}),
    "flow": ("continuous", {"token_loss": "flow"}, {"diffusion_steps": 10}),
    "1d-random": ("continuous", {"system": "1d-random"}, {"diffusion_steps": 10}),
    "llamagen": ("discrete", {"system": "llamagen"}, {"guidance": 2.0}),
}


@pytest.mark.parametrize("name", CASES)
def test_replayed_steps_draw_the_same_tokens(make_system, monkeypatch, name):
    kind, settings, given = CASES[name]
    system = make_system(kind, device="cuda", **settings).eval()
    classes = torch.arange(12) % 3
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda self: replays.append(1) or replay(self)
    )
    found = []
    for asked in ("off", "on"):
        options = system.options(cuda_graph=asked, **given)
        found.append(system.sample(classes, Rng(2), options))
    assert len(replays) >= system.num_tokens // 4 - WARM_UP - 1
    assert torch.equal(*found)
