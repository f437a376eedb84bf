"""The 1D baselines: orders, target positions at the input, loss over all N, counts."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from heptapod_fast.data.tokens import Batch
from heptapod_fast.rng import Rng

RNG, TOKENS = Rng(9), 16
SYSTEMS = ("1d-raster", "1d-random")
KINDS = ("discrete", "continuous")


def inputs_of(system, batch):
    """What the backbone is fed: (B, N, D)."""
    seen = []
    handle = system.backbone.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    loss = system.loss(batch, RNG)
    handle.remove()
    return seen[0].detach(), loss


def test_orders(make_system):
    index = torch.arange(50)
    assert torch.equal(
        make_system(system="1d-raster").orders(index, RNG), torch.arange(TOKENS).expand(50, -1)
    )
    order = make_system(system="1d-random").orders(index, RNG)
    assert len(order.unique(dim=0)) == 50
    assert torch.equal(order.sort(1).values, torch.arange(TOKENS).expand(50, -1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SYSTEMS)
def test_input_is_the_token_before_and_the_position_of_the_target(
    make_system, make_batch, name, kind
):
    system = make_system(kind, system=name)
    batch, net = make_batch(system, 3), system.backbone
    x, order = inputs_of(system, batch)[0], system.orders(batch.index, RNG)
    for b in range(3):
        for i in range(TOKENS):
            before = (
                net.label(batch.labels[b])
                if i == 0
                else net.token(batch.tokens[b, order[b, i - 1]])
            )
            expected = before + net.position.weight[order[b, i]] + net.time.weight[i]
            torch.testing.assert_close(x[b, i], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_next_token_is_predicted_from_those_before_it(make_system, make_batch, kind):
    """Changing the k-th token of the order moves the loss of its own step and of later ones."""
    system = make_system(kind, system="1d-random")
    batch = make_batch(system, 1)
    order, states = system.orders(batch.index, RNG)[0], []
    system.backbone.register_forward_hook(lambda m, inputs, out: states.append(out.detach()))
    system.loss(batch, RNG)
    for k in range(TOKENS):
        tokens = batch.tokens.clone()
        tokens[0, order[k]] = (tokens[0, order[k]] + 1) % 11
        system.loss(Batch(tokens, batch.labels, batch.index), RNG)
        changed = (states[-1] - states[0])[0].abs().amax(-1) > 1e-6
        assert not changed[: k + 1].any() and changed[k + 1 :].all()


@pytest.mark.parametrize("name", SYSTEMS)
def test_loss_is_the_sum_over_all_positions(make_system, make_batch, name):
    system = make_system(system=name)
    batch = make_batch(system, 3)
    x, loss = inputs_of(system, batch)
    logits = system.token_loss.logits(system.backbone(x))
    target = batch.tokens.gather(1, system.orders(batch.index, RNG))
    expected = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")
    torch.testing.assert_close(loss.total, expected)
    assert loss.count == system.expected_count(3) == 3 * TOKENS


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_do_not_change_the_loss(make_system, make_batch, kind, dropout):
    system = make_system(kind, system="1d-random", dropout=dropout).train()
    whole = system.loss(make_batch(system, 6, first=3), RNG)
    parts = [system.loss(make_batch(system, 1, first=3 + i), RNG) for i in range(6)]
    torch.testing.assert_close(sum(p.total for p in parts), whole.total, rtol=1e-4, atol=1e-3)


def test_dropout_acts_in_training_only(make_system, make_batch):
    system = make_system(system="1d-raster", dropout=0.3)
    batch = make_batch(system, 4)
    total = lambda system: float(system.loss(batch, RNG).total.detach())
    trained = [total(system.train()) for _ in range(2)]
    assert trained[0] == trained[1] != total(system.eval())


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_those_that_torch_counts(make_system, make_batch, kind):
    system, batch = make_system(kind, system="1d-random"), 4
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        system.loss(make_batch(system, batch), RNG)
    masked_half = batch * 2 * 4 * 32 * (TOKENS**2 - TOKENS * (TOKENS + 1) / 2)
    table = 2 * 1000 * (256 * 16 + 16 * 16) if kind == "continuous" else 0
    formula = batch * sum(system.flops_per_image().values())
    assert counter.get_total_flops() - masked_half - table == pytest.approx(formula, rel=1e-9)


def test_it_has_no_head_and_one_row_per_position(make_system):
    state = make_system(system="1d-random").state_dict()
    assert not any(name.startswith("head") for name in state)
    assert state["backbone.position.weight"].shape == (TOKENS, 32)
    assert state["backbone.time.weight"].shape == (TOKENS, 32)
