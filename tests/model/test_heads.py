"""The 2D heads: where states are put, and what each query is allowed to see."""

import pytest
import torch

from heptapod_fast import grid
from heptapod_fast.model.heads import GlobalHead, LocalHead
from heptapod_fast.model.transformer import Block
from heptapod_fast.ops.dispatch import Operators
from heptapod_fast.rng import Rng
from tests.running import dense, fill

WIDTH, SIDE, TOKENS = 16, 4, 16
few = Block.few
REFERENCE = Operators({"attention": "reference"})
ORDER = grid.random_orders(torch.arange(2), TOKENS, Rng(0))


def global_head(depth=2):
    return fill(
        GlobalHead(depth=depth, width=WIDTH, heads=2, num_tokens=TOKENS, operators=REFERENCE)
    )


def local_head(window=4):
    return fill(
        LocalHead(depth=2, width=WIDTH, heads=2, grid=SIDE, window=window, operators=REFERENCE)
    )


def states(count=TOKENS):
    return torch.randn(2, count, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("count", [1, 5, TOKENS])
def test_states_are_put_where_their_token_lies(count):
    h, placed = states(count), global_head().place(states(count), ORDER)
    expected = torch.zeros(2, TOKENS + 1, WIDTH)
    for b in range(2):
        expected[b, 0] = h[b, 0]
        for i in range(1, count):
            expected[b, 1 + ORDER[b, i - 1]] = h[b, i]
    assert torch.equal(placed, expected)


def test_input_of_the_global_head_by_hand():
    head, h = global_head(), states()
    steps = torch.tensor([[0, 5], [15, 1]])
    x = head.assemble(h, ORDER, steps)
    for s in range(4):
        b, step = s // 2, int(steps.flatten()[s])
        expected = head.position.weight.clone()
        expected[0] += h[b, 0]
        for time, position in enumerate(ORDER[b].tolist()):
            expected[1 + position] += h[b, time + 1] if time < step else head.mask_token[0]
        torch.testing.assert_close(x[s], expected)


def test_position_table_has_a_row_for_the_start():
    assert global_head().position.weight.shape == (TOKENS + 1, WIDTH)
    assert global_head().mask_token.shape == (1, WIDTH)


def test_global_rows_are_elements_of_the_dense_output():
    head, h, steps = global_head(), states(), torch.tensor([[3, 9], [12, 6]])
    rows = grid.packed_rows(ORDER, steps, "position")
    pair = rows.pair_R(2)
    out = head(h, ORDER, steps, pair, rows.position_R)
    x = head.assemble(h, ORDER, steps)
    for block in head.blocks:
        x = dense(block, x)
    torch.testing.assert_close(out, head.norm(x)[pair, rows.position_R + 1], rtol=1e-4, atol=1e-5)


def test_global_head_sees_exactly_the_states_up_to_its_step():
    head, h = global_head(), states().requires_grad_()
    steps = torch.arange(TOKENS).expand(2, -1)
    pair = torch.arange(2 * TOKENS)
    out = head(h, ORDER, steps, pair, torch.zeros_like(pair)).view(2, TOKENS, WIDTH)
    for t in range(TOKENS):
        grad = torch.autograd.grad(out[1, t].square().sum(), h, retain_graph=True)[0]
        assert (grad[0] == 0).all() and (grad[1, t + 1 :] == 0).all()
        assert (grad[1, : t + 1].abs().sum(1) > 0).all()


@pytest.mark.parametrize("window", [1, 4])
def test_local_head_sees_exactly_the_states_up_to_its_step(window):
    head, h = local_head(window), states().requires_grad_()
    steps = torch.arange(TOKENS).expand(2, -1)
    positions = head.window_positions(ORDER.flatten())
    out = head(h, steps, positions).view(2, TOKENS, window, WIDTH)
    for t in range(TOKENS):
        for w in range(window):
            grad = torch.autograd.grad(out[1, t, w].square().sum(), h, retain_graph=True)[0]
            assert (grad[0] == 0).all() and (grad[1, t + 1 :] == 0).all()
            assert (grad[1, : t + 1].abs().sum(1) > 0).all()


def test_local_queries_attend_inside_their_window_only():
    head = local_head()
    steps, positions = torch.tensor([[3, 9], [12, 6]]), torch.arange(16).view(4, 4)
    out = head(states(), steps, positions).view(4, 4, WIDTH)
    changed = positions.clone()
    changed[1] = 0
    again = head(states(), steps, changed).view(4, 4, WIDTH)
    assert torch.equal(out[[0, 2, 3]], again[[0, 2, 3]])
    # Another position of one query reaches its neighbours through self-attention.
    changed = positions.clone()
    changed[1, 0] = 0
    again = head(states(), steps, changed).view(4, 4, WIDTH)
    assert ((out[1] - again[1]).abs().amax(1) > 1e-6).all()


def test_one_step_at_a_time_equals_all_at_once():
    head, h, steps = local_head(), states(), torch.tensor([[3, 9], [12, 6]])
    positions = head.window_positions(ORDER.gather(1, steps).flatten())
    together = head(h, steps, positions).view(2, 2, 4, WIDTH)
    for j in range(2):
        alone = head(h, steps[:, j : j + 1], positions.view(2, 2, 4)[:, j]).view(2, 4, WIDTH)
        torch.testing.assert_close(alone, together[:, j], rtol=1e-4, atol=1e-5)


def test_window_holds_the_next_token():
    head = local_head()
    chosen = head.window_positions(torch.arange(TOKENS))
    assert (chosen == torch.arange(TOKENS)[:, None]).any(1).all()
    assert chosen[0].tolist() == [0, 1, 4, 5] and chosen[14].tolist() == [10, 11, 14, 15]


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("counts", [[1] * 5, [2, 3], [4, 11]], ids=str)
def test_a_global_head_that_draws_is_the_head(depth, counts):
    """Step by step on states that come one after the other, in float64: a few rows, or many."""
    head, h = global_head(depth).double(), states().double()
    drawing = head.drawing(2, torch.float64)
    drawing.see(h[:, :1], torch.zeros(2, 1, dtype=torch.int64))
    seen = 0
    for count in counts:
        position = ORDER[:, seen : seen + count].flip(1)
        steps = torch.full((2, 1), seen)
        pair = torch.arange(2).repeat_interleave(count)
        expected = head(h[:, : seen + 1], ORDER, steps, pair, position.flatten())
        found = drawing.vectors(position)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
        new = slice(seen + 1, seen + count + 1)
        drawing.see(h[:, new], ORDER[:, seen : seen + count] + 1)
        seen += count


def test_a_global_head_reads_all_elements_for_few_rows_alone(monkeypatch):
    """2 k heads of WIDTH values: up to 4 rows of this head's two heads."""
    head, asked = global_head(), []
    monkeypatch.setattr(type(head.blocks[0]), "few", lambda *args: asked.append(True) or few(*args))
    for count in (4, 5):
        drawing = head.drawing(2, torch.float32)
        drawing.see(states(1), torch.zeros(2, 1, dtype=torch.int64))
        drawing.vectors(ORDER[:, :count])
        assert len(asked) == 1


def test_a_local_head_that_draws_projects_every_state_once():
    head, h = local_head().double(), states().double()
    inputs = []
    for block in head.blocks:
        block.kv.register_forward_pre_hook(lambda module, args: inputs.append(args[0].shape[1]))
    drawing = head.drawing(2, torch.float64)
    drawing.see(h[:, :3], torch.zeros(2, 3, dtype=torch.int64))  # [S] and two tokens
    seen, new = 2, 3
    for count in (1, 2, 4):
        position = ORDER[:, seen : seen + count]
        found = drawing.vectors(position)
        assert inputs == [new] * len(head.blocks)
        windows = head.window_positions(position.flatten())
        steps = torch.full((2, count), seen)
        whole = head(h[:, : seen + 1], steps, windows).view(*windows.shape, WIDTH)
        expected = whole[windows == position.reshape(-1, 1)]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
        drawing.place(seen + 1)
        drawing.see(h[:, seen + 1 : seen + count + 1], position + 1)
        inputs.clear()
        new = count
        seen += count
