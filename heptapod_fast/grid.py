"""Index arithmetic of the token grid: orders, supervised steps, packed rows, windows.

Everything here is pure arithmetic on tensors with shapes that depend on settings alone; what a step
of training takes is free of host synchronisation (groups are made on the CPU, once). Suffixes as in
docs/legend.md: B sequences, N tokens of the grid, n supervised steps per sequence, S = B * n
supervised (sequence, step) pairs, R packed rows, W tokens of a window.

Step t means: t tokens are visible (order[0..t-1]), the tokens order[t..N-1] are to be predicted.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from heptapod_fast.rng import Rng


def random_orders(index_B: Tensor, num_tokens: int, rng: Rng) -> Tensor:
    """(B, N) int64: a uniformly random permutation of the positions for every sequence."""
    return rng.permutation("order", index_B, num_tokens)


def raster_orders(index_B: Tensor, num_tokens: int) -> Tensor:
    """(B, N) int64: row by row, the same for every sequence."""
    return torch.arange(num_tokens, device=index_B.device).expand(len(index_B), -1)


def given_first(order_BN: Tensor, known_N: Tensor) -> Tensor:
    """The same orders with the known positions, (N,) bool, before the others."""
    is_late_BN = ~known_N[order_BN]
    place_BN = is_late_BN.to(torch.uint8).argsort(dim=1, stable=True)
    return order_BN.gather(1, place_BN)


def ranks(order_BN: Tensor) -> Tensor:
    """Inverse permutation: rank_BN[b, p] = the time at which position p comes up."""
    times = torch.arange(order_BN.shape[1], device=order_BN.device).expand_as(order_BN)
    return torch.empty_like(order_BN).scatter_(1, order_BN, times)


# -------------------------------------------------------------------------------- supervised steps


def draw_steps(index_B: Tensor, num_tokens: int, density: int, mode: str, rng: Rng) -> Tensor:
    """(B, n) int64 in 0..N-1: the steps of every sequence that get a head pass and a loss.

    antithetic: sequence 2k draws n distinct steps uniformly, sequence 2k+1 takes their mirrors
        N-1-t. Every step stays uniform, and the pair supervises n * (N + 1) positions whatever was
        drawn. B must be even.
    uniform: n distinct steps, drawn for every sequence by itself.
    mar: MAR's masking ratio, a truncated normal on [0.7, 1] around 1 with deviation 0.25, one per
        micro-batch and slot (mar:models/mar.py:66,165); ceil(N * ratio) positions are masked. The n
        steps of a sequence may coincide, and the draw depends on the cut into micro-batches.

    Raises ValueError on an odd antithetic batch.
    """
    if mode == "antithetic":
        if len(index_B) % 2:
            raise ValueError(
                f"antithetic steps need an even micro-batch, got {len(index_B)} "
                "sequences (--micro-batch, or --steps uniform)"
            )
        first = rng.permutation("steps", index_B[0::2], num_tokens)[:, :density]
        return torch.stack((first, num_tokens - 1 - first), dim=1).flatten(0, 1)
    if mode == "uniform":
        return rng.permutation("steps", index_B, num_tokens)[:, :density]
    uniform = rng.uniform("steps", index_B[:1], density)
    masked = torch.ceil(num_tokens * mar_ratio(uniform)).long().clamp_(1, num_tokens)
    return (num_tokens - masked).expand(len(index_B), -1)


_MAR_MEAN, _MAR_DEVIATION, _MAR_LEAST = 1.0, 0.25, 0.7


def _mar_bounds() -> tuple[float, float]:
    """The share of the normal distribution below the least ratio, and that between it and 1; as
    float32 has them. Numbers, not tensors: those of the host would be copied in every step."""
    bounds = torch.tensor([_MAR_LEAST, 1.0], device="cpu")
    below = 0.5 * (1 + torch.erf((bounds - _MAR_MEAN) / _MAR_DEVIATION / math.sqrt(2)))
    low, high = below.unbind()
    return float(low), float(high - low)


_MAR_LOW, _MAR_SPAN = _mar_bounds()


def mar_ratio(uniform: Tensor) -> Tensor:
    """Masking ratio by inverse transform: truncnorm(loc=1, scale=0.25) on [0.7, 1]."""
    share = _MAR_LOW + uniform * _MAR_SPAN
    standard = torch.erfinv(2 * share - 1) * math.sqrt(2)
    return (_MAR_MEAN + _MAR_DEVIATION * standard).clamp_(_MAR_LEAST, 1.0)


def take_tokens(tokens_BN: Tensor, position_BM: Tensor) -> Tensor:
    """Tokens at the given positions: (B, M) codes, or (B, M, C) vectors."""
    if tokens_BN.dim() == 3:
        position_BM = position_BM[..., None].expand(-1, -1, tokens_BN.shape[-1])
    return tokens_BN.gather(1, position_BM)


class Rows(NamedTuple):
    """The supervised positions of a micro-batch, one row each, made once per step.

    Every (sequence, step, position) occurs at most once.

    sequence_R: which sequence of the micro-batch.
    step_R: which of its n supervised steps, 0 to n - 1 (not how many tokens are visible then).
    position_R: which grid position is predicted.
    slot_R: step * N + position. A sequence's draws (noise, timesteps) are keyed by its global
        sample index; the slot tells the rows of one sequence apart there.
    weight_R: weight of the row in the loss, float32; None where every row counts 1.
    """

    sequence_R: Tensor
    step_R: Tensor
    position_R: Tensor
    slot_R: Tensor
    weight_R: Tensor | None

    def pair_R(self, density: int) -> Tensor:
        """Which of the S = B * n (sequence, step) pairs a row belongs to."""
        return self.sequence_R * density + self.step_R

    def total_weight(self) -> Tensor | float:
        """Sum of the weights."""
        if self.weight_R is None:
            return float(len(self.sequence_R))
        return self.weight_R.sum()


def _rows(
    pair_R: Tensor, position_R: Tensor, num_tokens: int, density: int, weight_R: Tensor | None
) -> Rows:
    """Rows of (sequence, step) pairs, counted as b * n + j, and grid positions."""
    sequence_R = pair_R // density
    step_R = pair_R % density
    slot_R = step_R * num_tokens + position_R
    return Rows(sequence_R, step_R, position_R, slot_R, weight_R)


def packed_rows(order_BN: Tensor, steps_Bn: Tensor, loss_weight: str) -> Rows:
    """Rows of antithetic steps: exactly B/2 * n * (N + 1), all of them supervised.

    order: (B, N); steps: (B, n) of mirrored pairs (`draw_steps`). The rows of one (sequence, step)
    are its unseen positions in the order they would come up.
    """
    batch, num_tokens = order_BN.shape
    density = steps_Bn.shape[1]
    unseen_S = (num_tokens - steps_Bn).flatten()
    ends_S = unseen_S.cumsum(0)
    starts_S = ends_S - unseen_S
    # The number of rows follows from the settings alone: no look at the device is needed.
    row_R = torch.arange(batch // 2 * density * (num_tokens + 1), device=order_BN.device)
    pair_R = torch.searchsorted(ends_S, row_R, right=True)
    time_R = steps_Bn.flatten()[pair_R] + row_R - starts_S[pair_R]
    position_R = order_BN.flatten()[pair_R // density * num_tokens + time_R]
    weight_R = None
    if loss_weight == "step":
        weight_R = 1.0 / unseen_S[pair_R]
    return _rows(pair_R, position_R, num_tokens, density, weight_R)


def padded_rows(rank_BN: Tensor, steps_Bn: Tensor, loss_weight: str) -> Rows:
    """Rows of any steps, at capacity: all S * N positions, those already seen with weight 0."""
    batch, num_tokens = rank_BN.shape
    density = steps_Bn.shape[1]
    unseen_SN = (rank_BN[:, None] >= steps_Bn[..., None]).flatten(0, 1)
    row_R = torch.arange(batch * density * num_tokens, device=rank_BN.device)
    weight_SN = unseen_SN.float()
    if loss_weight == "step":
        weight_SN = weight_SN / weight_SN.sum(1, keepdim=True)
    return _rows(row_R // num_tokens, row_R % num_tokens, num_tokens, density, weight_SN.flatten())


def sampled_rows(order_BN: Tensor, steps_Bn: Tensor, count: int, loss_weight: str) -> Rows:
    """Of every (sequence, step) `count` rows: unseen positions that stand for all of them.

    They are the next ones of the order. What of a random order is still unseen is a random order
    itself, whatever was seen, so that any `count` of it are a sample without replacement; each is
    weighted by how many it stands for, and the expected sum over rows is the sum over all unseen
    positions. Where fewer are unseen the rest of the rows are seen positions of weight 0: shapes do
    not depend on what was drawn.
    """
    num_tokens = order_BN.shape[1]
    density = steps_Bn.shape[1]
    steps_S = steps_Bn.flatten()
    unseen_S = num_tokens - steps_S
    taken_S = unseen_S.clamp(max=count)
    weight_S = 1.0 / taken_S
    if loss_weight == "position":
        weight_S = unseen_S / taken_S
    row_R = torch.arange(len(steps_S) * count, device=order_BN.device)
    pair_R = row_R // count
    number_R = row_R % count
    # Behind the end of an order comes its beginning: no position occurs twice.
    time_R = (steps_S[pair_R] + number_R) % num_tokens
    position_R = order_BN.flatten()[pair_R // density * num_tokens + time_R]
    weight_R = torch.where(number_R < taken_S[pair_R], weight_S[pair_R], 0.0)
    return _rows(pair_R, position_R, num_tokens, density, weight_R.float())


def rows_of_all_steps(order_BN: Tensor) -> Rows:
    """Rows of models that predict one next token at each of the N steps: row b * N + i is
    position order[b, i]. The position alone tells the rows of a sequence apart."""
    batch, num_tokens = order_BN.shape
    device = order_BN.device
    sequence_R = torch.arange(batch, device=device).repeat_interleave(num_tokens)
    step_R = torch.arange(num_tokens, device=device).repeat(batch)
    position_R = order_BN.flatten()
    return Rows(sequence_R, step_R, position_R, position_R, None)


def expected_rows(batch: int, num_tokens: int, density: int, mode: str) -> float:
    """Expected unseen positions over all steps of a batch (exact for antithetic steps)."""
    if mode != "mar":
        return batch * density * (num_tokens + 1) / 2
    return batch * density * expected_sample(num_tokens, num_tokens, mode)


def expected_sample(num_tokens: int, count: int, mode: str) -> float:
    """Expected number of rows of one step where at most `count` are taken."""
    # E[min(count, unseen)] = sum over k = 1..count of P(unseen >= k)
    total = 0.0
    for k in range(1, count + 1):
        if mode == "mar":
            total += _share_with_unseen(num_tokens, k)
        else:
            total += (num_tokens - k + 1) / num_tokens
    return total


def _share_with_unseen(num_tokens: int, least: int) -> float:
    """P(unseen >= least) of MAR's ratio, where ceil(N * ratio) positions are unseen."""
    low = _normal_cdf(-1.2)
    high = _normal_cdf(0.0)
    bound = max((least - 1) / num_tokens - 1.0, -0.3) / 0.25
    return (high - _normal_cdf(bound)) / (high - low)


def _normal_cdf(x: float) -> float:
    return 0.5 * (1.0 + math.erf(x / math.sqrt(2.0)))


# ------------------------------------------------------------------------------------------ windows


def window_positions(grid: int, window: int) -> Tensor:
    """(N / W, W) int64: the positions of each window, both in raster order."""
    side = round(window**0.5)
    positions = torch.arange(grid * grid).view(grid // side, side, grid // side, side)
    return positions.transpose(1, 2).reshape(-1, window)


def window_of(grid: int, window: int) -> Tensor:
    """(N,) int64: the window that holds each position."""
    positions = window_positions(grid, window)
    owner = torch.arange(len(positions))[:, None].expand_as(positions)
    return torch.empty(grid * grid, dtype=torch.int64).scatter_(
        0, positions.flatten(), owner.flatten()
    )


def window_rows(position_SW: Tensor, rank_BN: Tensor, steps_Bn: Tensor, loss_weight: str) -> Rows:
    """Rows of the local head at capacity: W per (sequence, step), seen ones with weight 0.

    position_SW: the grid positions of the window of each (sequence, step). Row s * W + w is query w
    of pair s.
    """
    num_tokens = rank_BN.shape[1]
    density = steps_Bn.shape[1]
    window = position_SW.shape[1]
    rank_SN = rank_BN.repeat_interleave(density, dim=0)
    weight_SW = (rank_SN.gather(1, position_SW) >= steps_Bn.reshape(-1, 1)).float()
    if loss_weight == "step":
        weight_SW = weight_SW / weight_SW.sum(1, keepdim=True)
    pair_R = torch.arange(len(position_SW), device=rank_BN.device).repeat_interleave(window)
    return _rows(pair_R, position_SW.flatten(), num_tokens, density, weight_SW.flatten())


# ----------------------------------------------------------------------------------------- sampling


def group_sizes(num_tokens: int, positions_per_step: int, schedule: str = "constant") -> list[int]:
    """How many positions each sampling step fills in; the sizes sum to N.

    constant: k each (the last takes the rest). cosine: as many steps as the constant schedule, few
    positions at first and many at the end (mar:models/mar.py:293), at least one each.
    Raises ValueError if k is not in 1..N.
    """
    if not 1 <= positions_per_step <= num_tokens:
        raise ValueError(f"--positions-per-step {positions_per_step}: expected 1 to {num_tokens}")
    count = -(-num_tokens // positions_per_step)
    if schedule == "constant":
        return [min(positions_per_step, num_tokens - s * positions_per_step) for s in range(count)]
    if schedule != "cosine":
        raise ValueError(f"--position-schedule {schedule}: expected constant or cosine")
    left = num_tokens
    sizes = []
    for step in range(1, count):
        by_cosine = int(num_tokens * math.cos(math.pi / 2 * step / count))
        # One position at least in this step, and one for each of the steps that follow.
        keep = min(max(by_cosine, count - step), left - 1)
        sizes.append(left - keep)
        left = keep
    return [*sizes, left]


# ------------------------------------------------------------------------------------------- groups


class Groups(NamedTuple):
    """An ordered partition of the positions of a grid: G_1 to G_T, predicted one after the other.

    Made on the CPU, once. Another grouping is another function that returns one (`grouped`).

    height, width: of the grid, N = height * width positions in raster order.
    sizes: how many positions each group has.
    order_N: the positions, group by group, in raster order within a group.
    group_N: which group (0 to T - 1) each position belongs to, by position.
    """

    height: int
    width: int
    sizes: tuple[int, ...]
    order_N: Tensor
    group_N: Tensor

    @property
    def parts(self) -> tuple[slice, ...]:
        """Where in the order each group is."""
        ends = list(accumulate(self.sizes))
        return tuple(slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True))


def grouped(group_HW: Tensor) -> Groups:
    """The groups of a grid whose positions say which one they belong to.

    group_HW: (height, width) int64.

    Raises:
        ValueError: numbers that are not int64, one below 0, or one between 0 and the last that has
            no positions.
    """
    if group_HW.dtype != torch.int64:
        raise ValueError(f"groups are int64 numbers (height, width), got {group_HW.dtype}")
    height, width = group_HW.shape
    group_N = group_HW.flatten()
    if int(group_N.min()) < 0:
        raise ValueError(f"groups are numbered from 0, got {int(group_N.min())}")
    sizes = group_N.bincount().tolist()
    if 0 in sizes:
        raise ValueError(
            f"groups have to cover the grid in turn: group {sizes.index(0)} of {len(sizes)} has no "
            "position"
        )
    order_N = group_N.argsort(stable=True)
    return Groups(height, width, tuple(sizes), order_N, group_N)


def next_token_groups(height: int, width: int) -> Groups:
    """One position after the other, in raster order: T = height * width."""
    return grouped(torch.arange(height * width).view(height, width))


def next_row_groups(height: int, width: int) -> Groups:
    """Row by row: T = height."""
    return grouped(torch.arange(height)[:, None].repeat(1, width))


def next_layer_groups(height: int, width: int) -> Groups:
    """Rings around the centre, from there outwards: T = max(height, width) / 2, rounded up."""
    row_H1 = _from_centre(height)[:, None]
    column_1W = _from_centre(width)[None]
    ring_HW = torch.maximum(row_H1.expand(height, width), column_1W.expand(height, width))
    return grouped(ring_HW)


def _from_centre(length: int) -> Tensor:
    """(length,) int64: steps from the middle, which is one element of an odd length and two of an
    even one."""
    # Twice the distance is a whole number: 1, 3, 5, ... or 0, 2, 4, ...
    return (2 * torch.arange(length) - (length - 1)).abs() // 2


def next_neighbor_groups(height: int, width: int) -> Groups:
    """Anti-diagonals, from the top left corner: T = height + width - 1."""
    return grouped(torch.arange(height)[:, None] + torch.arange(width))


GROUPINGS = {
    "next-token": next_token_groups,
    "next-row": next_row_groups,
    "next-layer": next_layer_groups,
    "next-neighbor": next_neighbor_groups,
}


def nearest_sources(groups: Groups) -> Tensor:
    """`nearest`: (N,) the closest position of an earlier group; of several that of the latest
    group, then the first in raster order; 0 in the first group."""
    is_earlier_NN, distance_NN = _earlier(groups)
    count = len(groups.sizes)
    later_N = count - 1 - groups.group_N
    place_N = torch.arange(len(groups.group_N))
    cost_NN = (distance_NN * count + later_N) * len(place_N) + place_N
    cost_NN = cost_NN.masked_fill(~is_earlier_NN, torch.iinfo(torch.int64).max)
    return torch.where(groups.group_N > 0, cost_NN.argmin(1), 0)


def average_shares(groups: Groups) -> Tensor:
    """`average`: (N, N) float32, what share each position has in the input of another: those of the
    8 neighbours that are of an earlier group have equal ones. Rows of the first group are zero.

    Raises:
        ValueError: a position of another group has no earlier neighbour.
    """
    is_earlier_NN, distance_NN = _earlier(groups)
    share_NN = (is_earlier_NN & (distance_NN <= 2)).float()  # squared: 1 beside, 2 across
    is_alone_N = (groups.group_N > 0) & ~share_NN.any(1)
    if is_alone_N.any():
        row, column = divmod(int(is_alone_N.nonzero()[0]), groups.width)
        raise ValueError(
            f"average takes every token from earlier ones beside it, but row {row}, column "
            f"{column} has none in this grouping: take nearest"
        )
    return share_NN / share_NN.sum(1, keepdim=True).clamp(min=1.0)


def _earlier(groups: Groups) -> tuple[Tensor, Tensor]:
    """(N, N) each: whether the second position is of an earlier group than the first; squared
    distance between them, int64."""
    group_N = groups.group_N
    place_N = torch.arange(len(group_N))
    row_N = place_N // groups.width
    column_N = place_N % groups.width
    distance_NN = (row_N[:, None] - row_N).square() + (column_N[:, None] - column_N).square()
    return group_N[None] < group_N[:, None], distance_NN
