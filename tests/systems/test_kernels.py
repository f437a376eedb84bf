"""Whole systems with every kernel in place of its reference: the wiring, on CPU or GPU."""

import pytest
import torch

from heptapod_fast.ops import dispatch
from heptapod_fast.rng import Rng
from tests.numerics import DEVICE, needs_triton

HEPTAPOD = dict(depth=1, head_depth=1)
# A grid of 3 where windows do not need 4: the interpreter takes milliseconds for every program.
CASES = [
    ("discrete", dict(HEPTAPOD, grid=3, dropout=0.1)),
    ("continuous", dict(HEPTAPOD, grid=3, dropout=0.1, diffusion_repeat=2)),
    ("continuous", dict(HEPTAPOD, grid=3, diffusion_loss="mse", diffusion_repeat=1)),
    ("discrete", dict(HEPTAPOD, head="local", window=4, density=2, dropout=0.1)),
    ("discrete", dict(HEPTAPOD, grid=3, steps="uniform", loss_weight="step")),
    ("discrete", dict(system="1d-random", grid=3, depth=1)),
    ("discrete", dict(system="llamagen", grid=3, depth=1, dropout=0.1)),
]


def operators(on, attention=False):
    """Operators: every one that has a Triton kernel runs it (on), or its reference. Attention has
    no kernel for float32."""
    asked = {}
    for operation in dispatch.operations("triton"):
        has_kernel = on and (attention or operation != "attention")
        asked[operation] = "triton" if has_kernel else "reference"
    return dispatch.Operators(asked)


REFERENCE, KERNELS, KERNELS_AND_ATTENTION = operators(False), operators(True), operators(True, True)


def loss_and_gradients(system, batch):
    system.zero_grad()
    loss = system.loss(batch, Rng(0)).mean
    loss.backward()
    return loss.detach(), [p.grad for p in system.parameters()]


@needs_triton
@pytest.mark.parametrize("tokens, settings", CASES)
def test_kernels_give_the_loss_and_gradients_of_the_reference(
    make_system, make_batch, tokens, settings
):
    """With dropout, of either kind of tokens and head, also the same bits in another run."""
    system, with_kernels = (
        make_system(tokens, device=DEVICE, operators=operators, **settings).train()
        for operators in (REFERENCE, KERNELS)
    )
    batch = make_batch(system, 2).to(DEVICE)
    expected_loss, expected = loss_and_gradients(system, batch)
    loss, gradients = loss_and_gradients(with_kernels, batch)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    for (name, _), found, wanted in zip(system.named_parameters(), gradients, expected):
        scale = float(wanted.abs().max())
        torch.testing.assert_close(
            found,
            wanted,
            rtol=1e-3,
            atol=1e-4 * scale + 1e-7,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    if settings.get("dropout"):
        again, gradients_again = loss_and_gradients(with_kernels, batch)
        assert torch.equal(loss, again)
        assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again))


@pytest.mark.parametrize(
    "tokens, settings",
    [
        *CASES,
        ("continuous", dict(HEPTAPOD, token_loss="flow", dropout=0.1)),
        ("discrete", dict(system="npp", depth=1, dropout=0.1)),
        ("continuous", dict(system="sar", depth=2, dropout=0.1)),
    ],
)
def test_every_operation_runs_as_the_run_says(
    make_system, make_batch, monkeypatch, tokens, settings
):
    system = make_system(tokens, operators=REFERENCE, **settings).train()
    asked = []
    select = dispatch.select

    def recorded(operation, device, dtype, forced="auto", *rest, **named):
        asked.append((operation, forced))
        return select(operation, device, dtype, forced, *rest, **named)

    monkeypatch.setattr(dispatch, "select", recorded)
    system.loss(make_batch(system, 2), Rng(0)).mean.backward()
    left_open = {operation for operation, forced in asked if forced == "auto"}
    assert len(asked) > 5
    assert left_open <= {"philox"}  # random bits are the same however they are made


@needs_triton
@pytest.mark.parametrize(
    "tokens, settings",
    [
        ("discrete", dict(grid=3)),
        ("continuous", dict(grid=3)),
        ("discrete", dict(head="local", window=4, density=2)),
        ("discrete", dict(grid=2, width=128)),
    ],
)
def test_bf16_gradients_are_as_close_to_float32_as_the_references(
    make_system, make_batch, tokens, settings
):
    """Relative to each parameter's largest gradient; the kernels round less often."""
    settings = dict(HEPTAPOD, width=64, dropout=0.1) | settings
    systems = [
        make_system(tokens, device=DEVICE, operators=operators, **settings).train()
        for operators in (REFERENCE, KERNELS_AND_ATTENTION)
    ]
    batch = make_batch(systems[0], 4).to(DEVICE)
    _, exact = loss_and_gradients(systems[0], batch)
    errors = []
    for system in systems:
        system.set_dtype(torch.bfloat16)
        _, found = loss_and_gradients(system, batch)
        errors.append(sum(float((f - e).norm() / e.norm()) for f, e in zip(found, exact)))
    assert errors[1] < 1.2 * errors[0]


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backbone_is_one_graph(make_system, make_batch, dtype):
    """torch.compile(fullgraph=True) of the backbone, with dropout, kernels on."""
    operators = KERNELS_AND_ATTENTION if dtype == torch.bfloat16 else KERNELS
    system = make_system(
        "discrete", device=DEVICE, operators=operators, width=64, dropout=0.1, **HEPTAPOD
    ).train()
    x = torch.randn(2, 16, 64, device=DEVICE, dtype=dtype)
    index = torch.arange(2, device=DEVICE)
    dropout = system.dropout("backbone", index, 0, system.backbone.dropout_sites, Rng(0))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: system.backbone(x, dropout), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), system.backbone(x, dropout))
