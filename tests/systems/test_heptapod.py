"""Heptapod: what each step may see, the packed loss against a dense one, and the counts."""

import itertools
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from heptapod_fast import grid
from heptapod_fast.data.tokens import Batch
from heptapod_fast.rng import Rng
from heptapod_fast.systems import build_system
from tests.running import dense

RNG = Rng(9)
TOKENS = 16
KINDS = ("discrete", "continuous")
EVERY_STEP = torch.arange(TOKENS).expand(2, -1)
HEADS = (dict(head="global"), dict(head="local", window=4))


def orders(batch):
    return grid.random_orders(batch.index, TOKENS, RNG)


def with_token_changed(batch, sequence, position):
    tokens = batch.tokens.clone()
    if tokens.dim() == 2:
        tokens[sequence, position] = (tokens[sequence, position] + 1) % 11
    else:
        tokens[sequence, position] += 1.0
    return Batch(tokens, batch.labels, batch.index)


def vectors(system, batch):
    """The head's output for every sequence, step and query: (B, N, queries, D)."""
    order, steps = orders(batch), EVERY_STEP[: len(batch)]
    h = system.states(batch, order, RNG)
    head = system.global_head if system.settings.head == "global" else system.local_head
    rows, z = head(h, order, steps, batch.index, RNG)
    return z.view(len(batch), TOKENS, -1, z.shape[-1])


# --------------------------------------------------------------------------------------- causality


@pytest.mark.parametrize("kind", KINDS)
def test_states_see_the_tokens_before_them_only(make_system, make_batch, kind):
    system = make_system(kind)
    batch = make_batch(system, 2)
    order = orders(batch)
    h = system.states(batch, order, RNG)
    for k in range(TOKENS):
        other = system.states(with_token_changed(batch, 0, order[0, k]), order, RNG)
        changed = (other - h).abs().amax(-1) > 1e-6
        assert not changed[1].any() and not changed[0, : k + 1].any()
        assert changed[0, k + 1 :].all()


def test_states_see_the_class(make_system, make_batch):
    system = make_system()
    batch = make_batch(system, 2)
    other = Batch(batch.tokens, (batch.labels + 1) % 3, batch.index)
    difference = system.states(batch, orders(batch), RNG) - system.states(other, orders(batch), RNG)
    assert (difference.abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", HEADS, ids=("global", "local"))
def test_no_step_sees_an_unseen_token(make_system, make_batch, head, kind):
    system = make_system(kind, density=TOKENS, steps="uniform", **head)
    batch = make_batch(system, 2)
    z, order = vectors(system, batch), orders(batch)
    for k in range(TOKENS):
        other = vectors(system, with_token_changed(batch, 0, order[0, k]))
        changed = (other - z).abs().amax(-1) > 1e-6
        assert not changed[1].any() and not changed[0, : k + 1].any()
        assert changed[0, k + 1 :].all()


@pytest.mark.parametrize("head", HEADS, ids=("global", "local"))
def test_predictions_do_not_know_the_order_to_come(make_system, make_batch, head):
    """Shuffling what comes after the next token changes no output."""
    system = make_system(density=1, steps="uniform", **head)
    batch, step = make_batch(system, 1), 5
    order = orders(batch)
    other = torch.cat((order[:, : step + 1], order[:, step + 1 :].flip(1)), 1)
    outputs = []
    for each in (order, other):
        h = system.states(batch, each, RNG)
        run = system.global_head if head["head"] == "global" else system.local_head
        outputs.append(run(h, each, torch.tensor([[step]]), batch.index, RNG)[1])
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------- the loss


def dense_loss(system, batch):
    """Every step's head run in full, every position scored, the seen ones masked out."""
    settings = system.settings
    order, n = orders(batch), settings.density
    steps = grid.draw_steps(batch.index, TOKENS, n, settings.steps, RNG)
    x = system.head.assemble(system.states(batch, order, RNG), order, steps)
    for block in system.head.blocks:
        x = dense(block, x)
    z = system.head.norm(x)[:, 1:].flatten(0, 1)
    pair = torch.arange(len(batch) * n).repeat_interleave(TOKENS)
    position = torch.arange(TOKENS).repeat(len(batch) * n)
    slot = pair % n * TOKENS + position
    unseen = (grid.ranks(order)[:, None] >= steps[..., None]).flatten(0, 1).float()
    count = float(unseen.sum())
    if settings.loss_weight == "step":
        unseen, count = unseen / unseen.sum(1, keepdim=True), float(len(unseen))
    rows = grid.Rows(pair // n, pair % n, position, slot, unseen.flatten())
    total, _ = system.token_losses(z, batch, rows, RNG)
    return total, count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(density=5),
        dict(density=TOKENS),
        dict(loss_weight="step", density=3),
        dict(steps="uniform", density=2),
        dict(steps="mar"),
        dict(steps="mar", loss_weight="step"),
        dict(head_depth=1),
    ],
)
def test_loss_equals_a_masked_dense_computation(make_system, make_batch, settings, kind):
    system = make_system(kind, **settings)
    batch = make_batch(system, 6)
    ours, (total, count) = system.loss(batch, RNG), dense_loss(system, batch)
    torch.testing.assert_close(ours.total, total, rtol=1e-4, atol=1e-4)
    assert float(ours.count) == pytest.approx(count)
    torch.testing.assert_close(ours.mean, total / count, rtol=1e-4, atol=1e-4)
    parameters = list(system.parameters())
    grads = [
        torch.autograd.grad(value, parameters, allow_unused=True) for value in (ours.total, total)
    ]
    for a, b in zip(*grads):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()) + 1e-6)


@pytest.mark.parametrize("loss_weight", ["position", "step"])
def test_local_loss_by_hand(make_system, make_batch, loss_weight):
    system = make_system(head="local", window=4, density=3, loss_weight=loss_weight)
    batch = make_batch(system, 4)
    order = orders(batch)
    steps = grid.draw_steps(batch.index, TOKENS, 3, "antithetic", RNG)
    h, total, count = system.states(batch, order, RNG), 0.0, 0.0
    for b in range(4):
        for t in steps[b].tolist():
            window = system.head.window_positions(order[b, t : t + 1])
            z = system.head(h[b : b + 1, : t + 1], torch.tensor([[t]]), window)
            open_ = [w for w, p in enumerate(window[0].tolist()) if p in order[b, t:]]
            log_p = system.token_loss.logits(z).log_softmax(-1)
            terms = [-float(log_p[w, batch.tokens[b, window[0, w]]].detach()) for w in open_]
            total += sum(terms) / (len(terms) if loss_weight == "step" else 1)
            count += 1 if loss_weight == "step" else len(terms)
    loss = system.loss(batch, RNG)
    assert float(loss.total.detach()) == pytest.approx(total, rel=1e-4)
    assert float(loss.count) == pytest.approx(count)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings",
    [dict(density=2), dict(steps="uniform", density=2), dict(head="local", window=4, density=2)],
    ids=("antithetic", "uniform", "local"),
)
def test_micro_batches_do_not_change_the_loss(make_system, make_batch, settings, kind, dropout):
    system = make_system(kind, dropout=dropout, **settings).train()
    whole = system.loss(make_batch(system, 8, first=24), RNG)
    parts = [system.loss(make_batch(system, 2, first=24 + 2 * i), RNG) for i in range(4)]
    torch.testing.assert_close(sum(p.total for p in parts), whole.total, rtol=1e-4, atol=1e-3)
    assert float(sum(p.count for p in parts)) == pytest.approx(float(whole.count))
    parameters = [system.backbone.blocks[0].qkv.weight, system.head.blocks[-1].proj.weight]
    cut = torch.autograd.grad(sum(p.total for p in parts), parameters)
    for a, b in zip(cut, torch.autograd.grad(whole.total, parameters)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


@pytest.mark.parametrize("head", HEADS, ids=("global", "local"))
def test_dropout_acts_in_training_only_and_repeats(make_system, make_batch, head):
    system = make_system(dropout=0.3, **head)
    batch = make_batch(system, 4)
    total = lambda system: float(system.loss(batch, RNG).total.detach())
    trained = [total(system.train()) for _ in range(2)]
    calm = total(system.eval())
    assert trained[0] == trained[1] != calm
    system.settings = make_system(dropout=0.0, **head).settings
    assert total(system.train()) == calm


def test_dropout_masks_differ_between_steps_layers_and_sequences(make_system):
    system = make_system(dropout=0.5, density=2).train()
    dropout = system.head_dropout("head", torch.arange(2), 17, system.head.dropout_sites, RNG)
    assert dropout.key_PS2.shape == (4, 6, 2)
    assert len(dropout.key_PS2.flatten(0, 1).unique(dim=0)) == 24
    cross = system.head_dropout("cross", torch.arange(2), 17, 2, RNG)
    assert cross.key_PS2.shape == (4, 2, 2)
    assert not (cross.key_PS2[:, :, None] == dropout.key_PS2[:, None]).all(-1).any()


def test_start_of_training_is_the_uniform_guess(make_config, make_batch):
    config = make_config()
    system = build_system(config, 3)
    loss = system.loss(make_batch(system, 64), RNG)
    assert float(loss.mean.detach()) == pytest.approx(math.log(11), abs=0.05)


# --------------------------------------------------------------------------------------- the counts


@pytest.mark.parametrize("density", [1, 3, TOKENS])
def test_count_of_antithetic_steps_is_exact(make_system, make_batch, density):
    system = make_system(density=density)
    for first in (0, 10):
        loss = system.loss(make_batch(system, 10, first), RNG)
        assert float(loss.count) == system.expected_count(10) == 5 * density * (TOKENS + 1)


@pytest.mark.parametrize(
    "settings",
    [
        dict(steps="uniform"),
        dict(head="local", window=4),
        dict(head="local", window=1),
        dict(head="local", window=4, steps="uniform", density=3),
        dict(loss_weight="step", density=2),
        dict(head="local", window=4, loss_weight="step"),
        dict(rows_per_step=3, density=2),
        dict(rows_per_step=3, steps="uniform"),
        dict(rows_per_step=3, loss_weight="step"),
    ],
)
def test_expected_count_is_the_mean(make_system, make_batch, settings):
    system = make_system(**settings)
    with torch.no_grad():
        count = float(system.loss(make_batch(system, 4000), RNG).count)
    assert count == pytest.approx(system.expected_count(4000), rel=0.02)


@pytest.mark.parametrize(
    "settings", [dict(), dict(head="local", window=4), dict(loss_weight="step")]
)
def test_expected_count_of_mar_steps_is_the_mean(make_system, settings):
    system = make_system(steps="mar", **settings)
    index, counts = torch.arange(400), []
    order = grid.random_orders(index, TOKENS, RNG)
    for first in range(400):
        steps = grid.draw_steps(index[first:], TOKENS, 1, "mar", RNG)[:1].expand(400, 1)
        if system.settings.head == "local":
            window = system.head.window_positions(order.gather(1, steps).flatten())
            rows = grid.window_rows(window, grid.ranks(order), steps, system.settings.loss_weight)
        else:
            rows = grid.padded_rows(grid.ranks(order), steps, system.settings.loss_weight)
        counts.append(float(rows.weight_R.sum()))
    assert sum(counts) / 400 == pytest.approx(system.expected_count(400), rel=0.01)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("loss_weight", ["position", "step"])
def test_sampled_rows_have_the_gradient_of_all_on_average(
    make_system, monkeypatch, rows, loss_weight
):
    """All 24 orders of 2 x 2 tokens, at every step: the loss, its count and every gradient."""
    orders = torch.tensor(list(itertools.permutations(range(4))))
    monkeypatch.setattr(grid, "random_orders", lambda index, tokens, rng: orders)
    found = []
    for sampled in (rows, None):
        system = make_system(grid=2, loss_weight=loss_weight, rows_per_step=sampled)
        system.set_dtype(torch.float32)
        tokens = torch.tensor([[3, 1, 4, 1]]).expand(24, -1)
        batch = Batch(tokens, torch.ones(24, dtype=torch.int64), torch.arange(24))
        total = 0.0
        count = 0.0
        for step in range(4):
            steps = torch.full((24, 1), step)
            monkeypatch.setattr(grid, "draw_steps", lambda *_, steps=steps: steps)
            if sampled is None:
                # All rows, of steps that are no pairs.
                h = system.states(batch, orders, RNG)
                every = grid.padded_rows(grid.ranks(orders), steps, loss_weight)
                z = system.head(h, orders, steps, every.pair_R(1), every.position_R)
                loss, _ = system.token_losses(z, batch, every, RNG)
                total = total + loss
                count += float(every.total_weight())
            else:
                loss = system.loss(batch, RNG)
                total = total + loss.total
                count += float(loss.count)
        gradients = torch.autograd.grad(total, list(system.parameters()))
        found.append((float(total.detach()), count, gradients))
    (total, count, gradients), (expected, of_all, expected_gradients) = found
    assert total == pytest.approx(expected, rel=1e-5) and count == pytest.approx(of_all)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_sampled_rows_cost_what_they_are(make_system):
    whole, few = make_system(density=3), make_system(density=3, rows_per_step=2)
    rows = few.settings.rows_of_steps(few.spec)
    assert rows == pytest.approx(3 * (1 + 15 / 16))  # at the last step but one is unseen
    per_row = whole.flops_per_image()["token loss"] / (3 * 17 / 2)
    assert few.flops_per_image()["token loss"] == pytest.approx(rows * per_row)
    saved = whole.flops_per_image()["head"] - few.flops_per_image()["head"]
    assert saved == pytest.approx(2 * 9 * 32**2 * (3 * 17 / 2 - rows))


@pytest.mark.parametrize(
    "settings, named",
    [
        (dict(rows_per_step=17), "--rows-per-step 17: expected 1 to 16"),
        (dict(rows_per_step=0), "--rows-per-step 0"),
        (dict(rows_per_step=2, head="local", window=4), "--rows-per-step 2 needs --head global"),
    ],
)
def test_rows_that_cannot_be_sampled(make_config, settings, named):
    with pytest.raises(ValueError, match=named):
        make_config(**settings)


def counted(system, batch):
    """Forward FLOPs by part, as torch counts them."""
    found, began = {}, {}
    parts = {"embedding": system.backbone.token, "backbone": system.backbone, "head": system.head}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for name, module in parts.items():
            module.register_forward_pre_hook(
                lambda m, i, name=name: began.update({name: counter.get_total_flops()})
            )
            module.register_forward_hook(
                lambda m, i, o, name=name: found.update(
                    {name: counter.get_total_flops() - began[name]}
                )
            )
        system.loss(batch, RNG)
        return found | {"token loss": counter.get_total_flops() - sum(found.values())}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [dict(), dict(density=3), dict(density=2, head_depth=1)])
def test_flops_are_those_that_torch_counts(make_system, make_batch, settings, kind):
    system, batch = make_system(kind, **settings), 4
    found, formula = counted(system, make_batch(system, batch)), system.flops_per_image()
    assert set(found) == set(formula)
    width, depth = 32, len(system.backbone.blocks)
    # The reference computes the masked half of the causal products too.
    found["backbone"] -= batch * depth * 4 * width * (TOKENS**2 - TOKENS * (TOKENS + 1) / 2)
    if kind == "continuous":
        # The table of time embeddings does not grow with the batch.
        found["token loss"] -= 2 * 1000 * (256 * 16 + 16 * 16)
    for part, value in formula.items():
        assert found[part] == pytest.approx(batch * value, rel=1e-9), part


@pytest.mark.parametrize("loss_weight", ["position", "step"])
def test_flops_of_the_local_head(make_system, make_batch, loss_weight):
    system = make_system(head="local", window=4, density=3, loss_weight=loss_weight)
    found, formula = counted(system, make_batch(system, 4)), system.flops_per_image()
    # The reference lets every query meet all states, of which it sees (N + 1) / 2 on average.
    extra = 2 * 4 * 32 * 3 * 4 * (TOKENS - (TOKENS + 1) / 2)
    assert found["head"] - 4 * extra == pytest.approx(4 * formula["head"])
    supervised = 3 * (1 + 7.5 * 3 / 15)
    assert formula["token loss"] == pytest.approx(2 * supervised * 32 * 11)


# --------------------------------------------------------------------- parameters, start, precision


def test_tables_and_their_shapes(make_system):
    state = make_system().state_dict()
    assert state["backbone.position.weight"].shape == (TOKENS, 32)
    assert state["backbone.time.weight"].shape == (TOKENS, 32)
    assert state["head.position.weight"].shape == (TOKENS + 1, 32)
    assert state["backbone.label.weight"].shape == (3, 32)
    assert state["head.mask_token"].shape == (1, 32)
    top = {name.split(".")[1] for name in state if name.startswith("backbone")}
    assert top == {"token", "label", "position", "time", "blocks", "norm"}
    assert not any(
        name.startswith("token_loss.tables") for name in make_system("continuous").state_dict()
    )


def test_bf16_is_close_to_float32(make_system, make_batch):
    for kind in KINDS:
        system = make_system(kind)
        batch, losses, grads = make_batch(system, 16), [], []
        for dtype in (torch.float32, torch.bfloat16):
            system.set_dtype(dtype)
            loss = system.loss(batch, RNG).mean
            losses.append(float(loss.detach()))
            grads.append(torch.autograd.grad(loss, system.head.blocks[0].qkv.weight)[0].flatten())
        assert losses[1] == pytest.approx(losses[0], rel=0.02)
        assert torch.cosine_similarity(*grads, dim=0) > 0.98
        assert all(p.dtype == torch.float32 for p in system.parameters())
