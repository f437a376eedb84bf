"""Orders, supervised steps, rows, windows and groups against brute force."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heptapod_fast import grid
from heptapod_fast.rng import Rng

RNG = Rng(3)
MODES = ("antithetic", "uniform", "mar")


def chi_square(counts):
    expected = counts.double().mean()
    return float(((counts - expected) ** 2 / expected).sum())


def steps_of(batch, num_tokens, density, mode="antithetic", first=0):
    return grid.draw_steps(torch.arange(first, first + batch), num_tokens, density, mode, RNG)


def orders_of(batch, num_tokens):
    return grid.random_orders(torch.arange(batch), num_tokens, RNG)


# ------------------------------------------------------------------------------------------ orders


@settings(max_examples=25, deadline=None)
@given(num_tokens=st.integers(1, 40), first=st.integers(0, 2**40), batch=st.integers(1, 5))
def test_orders_are_permutations_and_functions_of_the_index(num_tokens, first, batch):
    index = torch.arange(first, first + batch)
    order = grid.random_orders(index, num_tokens, RNG)
    assert torch.equal(order.sort(1).values, torch.arange(num_tokens).expand(batch, -1))
    assert torch.equal(grid.random_orders(index[-1:], num_tokens, RNG), order[-1:])


def test_orders_differ_between_sequences_and_seeds():
    index = torch.arange(200)
    order = grid.random_orders(index, 16, RNG)
    assert len(order.unique(dim=0)) == 200
    assert not torch.equal(order, grid.random_orders(index, 16, Rng(4)))


def test_raster_orders_and_ranks():
    assert grid.raster_orders(torch.arange(3), 4).tolist() == [[0, 1, 2, 3]] * 3
    order = orders_of(6, 9)
    rank = grid.ranks(order)
    for b in range(6):
        for time, position in enumerate(order[b].tolist()):
            assert rank[b, position] == time


# ------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("parity", [0, 1])
@pytest.mark.parametrize("mode, density", [("antithetic", 1), ("antithetic", 3), ("uniform", 2)])
def test_every_step_is_uniform(mode, density, parity):
    steps = steps_of(8000, 8, density, mode)[parity::2]
    for slot in steps.unbind(1):
        assert chi_square(slot.bincount(minlength=8)) < 30  # 7 degrees of freedom, p = 1e-4


@settings(max_examples=30, deadline=None)
@given(num_tokens=st.integers(1, 30), pairs=st.integers(1, 4), data=st.data())
def test_antithetic_pairs_supervise_a_fixed_number(num_tokens, pairs, data):
    density = data.draw(st.integers(1, num_tokens))
    steps = steps_of(2 * pairs, num_tokens, density, first=2 * data.draw(st.integers(0, 1000)))
    assert int(steps.min()) >= 0 and int(steps.max()) < num_tokens
    assert all(len(set(row)) == density for row in steps.tolist())
    unseen = (num_tokens - steps).sum(1).view(pairs, 2).sum(1)
    assert unseen.tolist() == [density * (num_tokens + 1)] * pairs
    assert torch.equal(steps[0::2] + steps[1::2], torch.full_like(steps[0::2], num_tokens - 1))


def test_uniform_steps_are_distinct_and_independent():
    steps = steps_of(4000, 8, 5, "uniform")
    assert all(len(set(row)) == 5 for row in steps.tolist())
    first = steps[:, 0].double()
    assert abs(torch.corrcoef(torch.stack((first[0::2], first[1::2])))[0, 1]) < 0.07


@pytest.mark.parametrize("mode", MODES)
def test_steps_do_not_depend_on_the_rest_of_the_batch(mode):
    together = steps_of(8, 16, 2, mode)
    assert torch.equal(steps_of(2, 16, 2, mode, first=0), together[:2])
    if mode != "mar":
        assert torch.equal(steps_of(4, 16, 2, mode, first=4), together[4:])


class EveryOrder:
    """In place of an Rng: sequence 0 has the first of all orders, sequence 2 the second, and so on,
    as of antithetic pairs the first alone draws."""

    def permutation(self, name, index_B, count):
        orders = torch.tensor(list(itertools.permutations(range(count))))
        return orders[index_B // 2]


@pytest.mark.parametrize("density", [1, 2, 3, 4])
def test_mirrored_steps_are_distributed_as_independent_ones(density):
    """Over all 24 draws of a pair both sequences have every tuple of distinct steps equally often,
    so that a loss of any step counts in the mean as much as of independent draws."""
    steps = grid.draw_steps(torch.arange(48), 4, density, "antithetic", EveryOrder())
    first, second = steps[0::2], steps[1::2]
    every = Counter(itertools.permutations(range(4), density))
    of_each = 24 // len(every)
    for found in (first, second):
        assert Counter(map(tuple, found.tolist())) == {steps: of_each for steps in every}
    assert torch.equal(first + second, torch.full_like(first, 3))


def test_odd_antithetic_batch_is_refused():
    with pytest.raises(ValueError, match="--micro-batch"):
        steps_of(3, 16, 1)


def test_mar_ratio_has_the_moments_of_the_truncated_normal():
    ratio = grid.mar_ratio(RNG.uniform("r", torch.arange(20_000), 1)[:, 0])
    assert ratio.min() >= 0.7 and ratio.max() <= 1.0
    assert abs(ratio.mean() - 0.8670) < 0.002 and abs(ratio.median() - 0.874) < 0.004


def test_mar_masks_as_many_as_upstream():
    steps = grid.draw_steps(torch.arange(4), 256, 20_000, "mar", RNG)
    assert torch.equal(steps[0], steps[3])
    masked = 256 - steps[0]
    assert masked.min() >= 180 and masked.max() == 256
    assert abs(masked.double().mean() - 222.46) < 0.5
    assert abs((masked == 256).double().mean() - 0.016) < 0.004


@pytest.mark.parametrize("num_tokens", [4, 16, 256])
@pytest.mark.parametrize("mode", MODES)
def test_expected_rows_are_the_mean(mode, num_tokens):
    if mode == "mar":
        steps = grid.draw_steps(torch.arange(1), num_tokens, 20_000, mode, RNG)
    else:
        steps = steps_of(20_000, num_tokens, 1, mode)
    mean = (num_tokens - steps).double().mean()
    assert float(mean) == pytest.approx(grid.expected_rows(1, num_tokens, 1, mode), rel=0.01)
    assert grid.expected_rows(6, num_tokens, 3, mode) == pytest.approx(
        18 * grid.expected_rows(1, num_tokens, 1, mode)
    )


# -------------------------------------------------------------------------------------------- rows


def enumerated(order, steps):
    """(pair, position) of every unseen position, in the order they would come up."""
    density = steps.shape[1]
    return [
        (b * density + j, int(p))
        for b in range(len(order))
        for j in range(density)
        for p in order[b, int(steps[b, j]) :]
    ]


@settings(max_examples=30, deadline=None)
@given(num_tokens=st.integers(1, 12), pairs=st.integers(1, 3), data=st.data())
def test_packed_rows_are_the_enumeration(num_tokens, pairs, data):
    density = data.draw(st.integers(1, num_tokens))
    order, steps = orders_of(2 * pairs, num_tokens), steps_of(2 * pairs, num_tokens, density)
    rows = grid.packed_rows(order, steps, "position")
    pair = rows.pair_R(density)
    assert list(zip(pair.tolist(), rows.position_R.tolist())) == enumerated(order, steps)
    assert rows.weight_R is None
    assert len(pair) == pairs * density * (num_tokens + 1)


@settings(max_examples=30, deadline=None)
@given(num_tokens=st.integers(1, 9), pairs=st.integers(1, 3), data=st.data())
def test_rows_say_in_every_way_which_they_are(num_tokens, pairs, data):
    """Sequence, step, pair and slot agree, and no two rows of a sequence share a slot."""
    density = data.draw(st.integers(1, num_tokens))
    order, steps = orders_of(2 * pairs, num_tokens), steps_of(2 * pairs, num_tokens, density)
    packed = grid.packed_rows(order, steps, "position")
    padded = grid.padded_rows(grid.ranks(order), steps, "position")
    for rows in (packed, padded):
        pair = rows.pair_R(density)
        for r in range(len(pair)):
            b, j, p = int(rows.sequence_R[r]), int(rows.step_R[r]), int(rows.position_R[r])
            assert 0 <= j < density
            assert int(pair[r]) == b * density + j
            assert int(rows.slot_R[r]) == j * num_tokens + p
        keys = torch.stack((rows.sequence_R, rows.slot_R), dim=1)
        assert len(keys.unique(dim=0)) == len(keys)
    assert packed.total_weight() == len(packed.slot_R)
    assert float(padded.total_weight()) == float(padded.weight_R.sum())


def test_rows_of_all_steps_are_the_order_itself():
    order = orders_of(3, 5)
    rows = grid.rows_of_all_steps(order)
    found = list(zip(rows.sequence_R.tolist(), rows.step_R.tolist(), rows.position_R.tolist()))
    assert found == [(b, i, int(order[b, i])) for b in range(3) for i in range(5)]
    assert torch.equal(rows.slot_R, rows.position_R)
    assert rows.weight_R is None
    assert rows.total_weight() == 15


def test_padded_rows_weigh_the_unseen_and_nothing_else():
    order, steps = orders_of(3, 9), steps_of(3, 9, 2, "uniform")
    rows = grid.padded_rows(grid.ranks(order), steps, "position")
    pair = rows.pair_R(2)
    assert len(pair) == 3 * 2 * 9
    every = list(zip(pair.tolist(), rows.position_R.tolist()))
    assert len(set(every)) == len(every)
    supervised = [row for row, weight in zip(every, rows.weight_R.tolist()) if weight == 1.0]
    assert sorted(supervised) == sorted(enumerated(order, steps))
    assert rows.weight_R.sum() == len(supervised)


@pytest.mark.parametrize("kind", ["packed", "padded", "window"])
def test_step_weights_sum_to_one_for_every_step(kind):
    order, steps = orders_of(4, 16), steps_of(4, 16, 3)
    rank = grid.ranks(order)
    if kind == "packed":
        rows = grid.packed_rows(order, steps, "step")
    elif kind == "padded":
        rows = grid.padded_rows(rank, steps, "step")
    else:
        rows = window_rows_of(order, steps, "step")[1]
    sums = torch.zeros(12).index_add_(0, rows.pair_R(3), rows.weight_R)
    torch.testing.assert_close(sums, torch.ones(12))
    unseen = rank[rows.sequence_R, rows.position_R] >= steps[rows.sequence_R, rows.step_R]
    assert torch.equal(rows.weight_R > 0, unseen)


# ----------------------------------------------------------------------------------------- windows


def window_rows_of(order, steps, loss_weight="position", side=4, window=4):
    owner, positions = grid.window_of(side, window), grid.window_positions(side, window)
    chosen = positions[owner[order.gather(1, steps).flatten()]]
    return chosen, grid.window_rows(chosen, grid.ranks(order), steps, loss_weight)


@pytest.mark.parametrize("side, window", [(4, 4), (4, 1), (6, 4), (6, 9), (8, 16), (16, 64)])
def test_windows_partition_the_grid_into_squares(side, window):
    positions, owner = grid.window_positions(side, window), grid.window_of(side, window)
    w = math.isqrt(window)
    assert positions.shape == (side**2 // window, window)
    assert positions.flatten().sort().values.tolist() == list(range(side**2))
    for k, chunk in enumerate(positions.tolist()):
        top, left = k // (side // w) * w, k % (side // w) * w
        assert chunk == [(top + i) * side + left + j for i in range(w) for j in range(w)]
        assert all(owner[p] == k for p in chunk)


def test_window_rows_against_brute_force():
    order, steps = orders_of(4, 16), steps_of(4, 16, 5, "uniform")
    chosen, rows = window_rows_of(order, steps)
    pair, position, weight = rows.pair_R(5), rows.position_R, rows.weight_R
    every = zip(pair.tolist(), position.tolist(), weight.tolist())
    supervised = [(s, p) for s, p, w in every if w]
    expected = []
    for s in range(20):
        sequence, step = order[s // 5].tolist(), int(steps.flatten()[s])
        following = sequence[step]
        same = [
            p for p in range(16) if (p // 8, p % 4 // 2) == (following // 8, following % 4 // 2)
        ]
        assert chosen[s].tolist() == same
        expected += [(s, p) for p in same if sequence.index(p) >= step]
    assert supervised == expected


# ------------------------------------------------------------------------------------------ groups


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("num_tokens", [1, 2, 9, 16, 36, 256])
def test_groups_cover_the_grid_for_every_k(num_tokens, schedule):
    for k in range(1, num_tokens + 1):
        sizes = grid.group_sizes(num_tokens, k, schedule)
        assert sum(sizes) == num_tokens and min(sizes) >= 1
        assert len(sizes) == math.ceil(num_tokens / k)
        if schedule == "constant":
            assert set(sizes[:-1]) <= {k} and sizes[-1] <= k


def test_cosine_groups_are_mars():
    for count in (2, 4, 8, 16, 64):
        left, expected = 256, []
        for s in range(count - 1):
            keep = max(1, min(left - 1, math.floor(256 * math.cos(math.pi / 2 * (s + 1) / count))))
            expected.append(left - keep)
            left = keep
        assert grid.group_sizes(256, 256 // count, "cosine") == [*expected, left]
    sizes = grid.group_sizes(256, 16, "cosine")
    assert sizes[0] < 4 and sizes[-1] > 20


def test_bad_groups_are_refused():
    for k in (0, 17):
        with pytest.raises(ValueError, match="--positions-per-step"):
            grid.group_sizes(16, k)
    with pytest.raises(ValueError, match="--position-schedule"):
        grid.group_sizes(16, 4, "linear")


def test_orders_are_uniform():
    counts = Counter(map(tuple, orders_of(12_000, 3).tolist()))
    assert len(counts) == 6 and chi_square(torch.tensor(list(counts.values()))) < 25


# ------------------------------------------------------------------------------------------- groups

GRIDS = [(1, 1), (1, 5), (4, 4), (5, 5), (4, 5), (5, 7), (6, 6)]


def by_definition(name, height, width):
    """{group: positions in raster order}."""
    found = {}
    for y in range(height):
        for x in range(width):
            from_centre = max(abs(2 * y - (height - 1)), abs(2 * x - (width - 1)))
            group = {
                "next-token": y * width + x,
                "next-row": y,
                "next-layer": from_centre // 2,
                "next-neighbor": y + x,
            }[name]
            found.setdefault(group, []).append(y * width + x)
    return [found[group] for group in sorted(found)]


@pytest.mark.parametrize("height, width", GRIDS)
@pytest.mark.parametrize("name", grid.GROUPINGS)
def test_groups_are_their_definitions(name, height, width):
    groups = grid.GROUPINGS[name](height, width)
    expected = by_definition(name, height, width)
    assert groups.sizes == tuple(map(len, expected))
    assert groups.order_N.tolist() == [p for group in expected for p in group]
    assert all(groups.group_N[p] == t for t, group in enumerate(expected) for p in group)
    starts = [sum(groups.sizes[:t]) for t in range(len(expected))]
    assert [part.start for part in groups.parts] == starts
    assert [part.stop - part.start for part in groups.parts] == list(groups.sizes)
    steps = {
        "next-token": height * width,
        "next-row": height,
        "next-layer": -(-max(height, width) // 2),
        "next-neighbor": height + width - 1,
    }
    assert len(groups.sizes) == steps[name]


def test_another_grouping_is_one_function():
    groups = grid.grouped(torch.tensor([[1, 0], [2, 0]]))
    assert groups.sizes == (2, 1, 1) and groups.order_N.tolist() == [1, 3, 0, 2]
    with pytest.raises(ValueError, match="group 1 of 3 has no position"):
        grid.grouped(torch.tensor([[0, 0], [2, 0]]))
    with pytest.raises(ValueError, match="numbered from 0, got -1"):
        grid.grouped(torch.tensor([[0, -1]]))
    with pytest.raises(ValueError, match="int64 numbers .* got torch.float32"):
        grid.grouped(torch.tensor([[0.0, 1.0]]))


def test_average_needs_earlier_neighbours():
    corners_first = grid.grouped(torch.tensor([[0, 1, 2, 3]]).T)
    assert grid.average_shares(corners_first)[1:].any(1).all()
    far = grid.grouped(torch.tensor([[0, 2, 1]]))
    with pytest.raises(ValueError, match="row 0, column 2 has none .* take nearest"):
        grid.average_shares(far)
    assert grid.nearest_sources(far).tolist() == [0, 2, 0]


def shares_of(share_NN, position):
    """{source: share} of a position, shares of 0 left out."""
    return {q: float(share) for q, share in enumerate(share_NN[position]) if share}


@pytest.mark.parametrize("height, width", GRIDS)
@pytest.mark.parametrize("name", grid.GROUPINGS)
def test_sources_are_their_definitions(name, height, width):
    groups = grid.GROUPINGS[name](height, width)
    group = groups.group_N.tolist()
    nearest, average = grid.nearest_sources(groups), grid.average_shares(groups)
    for p in range(height * width):

        def distance(q):
            return (p // width - q // width) ** 2 + (p % width - q % width) ** 2  # noqa: B023

        earlier = [q for q in range(height * width) if group[q] < group[p]]
        beside = [q for q in earlier if distance(q) <= 2]
        if group[p] == 0:
            assert nearest[p] == 0 and shares_of(average, p) == {}
            continue
        closest = min(earlier, key=lambda q: (distance(q), -group[q], q))
        assert nearest[p] == closest
        assert beside  # every position behind the first group has an earlier neighbour
        assert shares_of(average, p) == pytest.approx(dict.fromkeys(beside, 1 / len(beside)))


# ------------------------------------------------------------------------------------ sampled rows


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("loss_weight", ["position", "step"])
def test_sampled_rows_stand_for_all_over_all_orders(count, loss_weight):
    """Exhaustively on 2 x 2 tokens: whatever was seen, the mean over the orders of the rest is the
    sum over the unseen positions, of any values that depend on what was seen."""
    orders = torch.tensor(list(itertools.permutations(range(4))))
    for step in range(4):
        steps = torch.full((24, 1), step)
        sampled = grid.sampled_rows(orders, steps, count, loss_weight)
        whole = grid.padded_rows(grid.ranks(orders), steps, loss_weight)
        sums = []
        for rows in (sampled, whole):
            # A value of the seen prefix and the position, as a loss is.
            prefix = orders[rows.sequence_R, :step].double().add(1).log().sum(1)
            value = torch.sin(3 * prefix + rows.position_R) * rows.weight_R
            total = torch.zeros(24, dtype=torch.float64).index_add_(0, rows.sequence_R, value)
            by_prefix = {}
            for order, each in zip(orders.tolist(), total.tolist(), strict=True):
                by_prefix.setdefault(tuple(order[:step]), []).append(each)
            sums.append({seen: sum(found) / len(found) for seen, found in by_prefix.items()})
        assert sums[0] == pytest.approx(sums[1])


def test_sampled_rows_have_one_shape_and_no_position_twice():
    index = torch.arange(40)
    orders = grid.random_orders(index, 9, Rng(1))
    steps = grid.draw_steps(index, 9, 2, "antithetic", Rng(1))
    rows = grid.sampled_rows(orders, steps, 4, "position")
    assert len(rows.sequence_R) == 40 * 2 * 4
    for pair in range(80):
        mine = rows.pair_R(2) == pair
        positions = rows.position_R[mine].tolist()
        assert len(set(positions)) == 4
        sequence, slot = divmod(pair, 2)
        step = int(steps[sequence, slot])
        seen = set(orders[sequence, :step].tolist())
        weights = rows.weight_R[mine].tolist()
        unseen = 9 - step
        expected = [unseen / min(4, unseen) if p not in seen else 0.0 for p in positions]
        assert weights == pytest.approx(expected)
    # Pairs supervise as much as ever, by weight.
    assert float(rows.total_weight()) == pytest.approx(20 * 2 * 10)


@pytest.mark.parametrize("mode", ["uniform", "mar"])
def test_expected_rows_of_a_sample(mode):
    index = torch.arange(60_000)
    if mode == "mar":
        steps = torch.cat([grid.draw_steps(index[:1], 9, 1, mode, Rng(s)) for s in range(4000)])
    else:
        steps = grid.draw_steps(index, 9, 1, mode, Rng(2))
    for count in (1, 4, 9):
        taken = (9 - steps).clamp(max=count).double().mean()
        assert grid.expected_sample(9, count, mode) == pytest.approx(float(taken), rel=0.02)
