"""Who sees whom in attention: one value for operations, kernels, blocks and backbones.

    FULL                 every query sees every key
    CAUSAL               query i of N sees key j of M where j <= i + M - N (the queries are the last
                         N of the M elements: M = N in training, N = 1 when decoding with a cache)
    Ends(ends_BN)        query i of sequence b sees the first ends[b, i] keys
    AttentionMask(...)   block-sparse, the same for every sequence and head

`ops.attention` and `ops.cross_attention` take one of them as `visible`. Suffixes: B sequences,
N queries, M keys. Masks are made on the CPU, once; `AttentionMask.to` moves them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

HEAD_WIDTHS = (32, 64, 80, 96, 128)  # that there are kernels for
MAX_LENGTH = 1024  # keys that the kernels take
BLOCK = 64  # what masks are described in, and the smallest tile of queries

EMPTY_BLOCK = 0
PARTIAL_BLOCK = 1
FULL_BLOCK = 2


@dataclass(frozen=True)
class Full:
    """Every query sees every key."""


@dataclass(frozen=True)
class Causal:
    """Query i of N sees key j of M where j <= i + M - N."""


FULL = Full()
CAUSAL = Causal()


@dataclass(frozen=True, eq=False)
class Ends:
    """Query i of sequence b sees the first ends[b, i] keys.

    ends_BN: int32 or int64, 1 to M. Values are not checked, for that would mean waiting for the
    device; outside of 1 to M the result is undefined.
    """

    ends_BN: Tensor


class AttentionMask:
    """A block-sparse mask: flags of 64 x 64 blocks, and two ranges of keys per query.

    Args:
        blocks: (N / 64, M / 64) integers, rounded up: EMPTY_BLOCK, PARTIAL_BLOCK or FULL_BLOCK.
        ranges_N22: (N, 2, 2) integers 0 to M: two half-open ranges (first, end) of keys per query,
            read where its block is partial.
        num_keys: M.

    Attributes:
        dense_NM: (N, M) booleans, the same mask for the reference.
        schedule: (4, 16, 17) int32, which blocks the kernels visit; see `_schedule`.
        row_bits, key_bits: (M / 32, N) and (N / 32, M) int32, rounded up to 128 elements: one bit
            per pair, from the side of the queries and of the keys; see `_bits`.

    Raises:
        ValueError: a query sees no key, a length is not in 1..1024, a flag or range is wrong.
    """

    def __init__(self, blocks: Tensor, ranges_N22: Tensor, num_keys: int):
        num_queries = len(ranges_N22)
        _check_lengths(num_queries, num_keys)
        blocks = _check_integers(
            "blocks", blocks, _grid_of_blocks(num_queries, num_keys), FULL_BLOCK
        )
        ranges_N22 = _check_integers("ranges", ranges_N22, (num_queries, 2, 2), num_keys)
        self.num_queries = num_queries
        self.num_keys = num_keys
        self.blocks = blocks.to(torch.uint8)
        self.ranges_N22 = ranges_N22.to(torch.int32)
        self.dense_NM = _dense(self.blocks, self.ranges_N22, num_keys)
        blind = (~self.dense_NM.any(1)).nonzero().flatten().tolist()
        if blind:
            raise ValueError(
                f"attention mask: {len(blind)} queries see no key, the first is query {blind[0]}"
            )
        self.schedule = _schedule(self.dense_NM)
        self.row_bits = _bits(self.dense_NM)
        self.key_bits = _bits(self.dense_NM.t())

    def __repr__(self) -> str:
        empty = float((self.blocks == EMPTY_BLOCK).float().mean())
        return (
            f"AttentionMask({self.num_queries} queries, {self.num_keys} keys, {empty:.0%} of "
            f"its blocks empty, {self.schedule.device})"
        )

    @classmethod
    def from_ranges(cls, ranges_N22: Tensor, num_keys: int) -> AttentionMask:
        """Query i sees the keys in ranges[i, 0] and ranges[i, 1]; an empty range adds nothing."""
        num_queries = len(ranges_N22)
        _check_lengths(num_queries, num_keys)
        ranges_N22 = _check_integers("ranges", ranges_N22, (num_queries, 2, 2), num_keys)
        all_partial = torch.full(_grid_of_blocks(num_queries, num_keys), PARTIAL_BLOCK)
        flags = _flags(_dense(all_partial, ranges_N22, num_keys))
        return cls(flags, ranges_N22, num_keys)

    @classmethod
    def from_dense(cls, visible_NM: Tensor) -> AttentionMask:
        """From booleans, True where a query sees a key.

        Raises:
            ValueError: no booleans, or more than two runs of keys in a query's partial blocks.
        """
        if visible_NM.dtype != torch.bool or visible_NM.dim() != 2:
            raise ValueError(
                "AttentionMask.from_dense takes booleans (N, M), True where a query "
                f"sees a key, got {visible_NM.dtype} {tuple(visible_NM.shape)}"
            )
        num_queries, num_keys = visible_NM.shape
        _check_lengths(num_queries, num_keys)
        visible_NM = visible_NM.cpu()
        flags = _flags(visible_NM)
        ranges = torch.zeros(num_queries, 2, 2, dtype=torch.int32)
        for query, sees_M in enumerate(visible_NM):
            is_partial = flags[query // BLOCK] == PARTIAL_BLOCK
            keys = is_partial.repeat_interleave(BLOCK)[:num_keys].nonzero().flatten()
            # A run of keys begins and ends where "sees" changes; outside nothing is seen.
            edges = F.pad(sees_M[keys].int(), (1, 1)).diff().nonzero().flatten().view(-1, 2)
            if len(edges) > 2:
                raise ValueError(
                    f"attention mask: query {query} sees {len(edges)} separate runs "
                    f"of keys in its partial {BLOCK} x {BLOCK} blocks; two can be "
                    "said"
                )
            for slot, (first, end) in enumerate(edges.tolist()):
                ranges[query, slot] = torch.stack((keys[first], keys[end - 1] + 1))
        return cls(flags, ranges, num_keys)

    def to(self, device: torch.device | str) -> AttentionMask:
        """The same mask with its tensors on a device."""
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if torch.is_tensor(value):
                setattr(moved, name, value.to(torch.device(device)))
        return moved


Visible = Full | Causal | Ends | AttentionMask


class Operands(NamedTuple):
    """A `Visible` as the registered operators and the kernels take it; everything by default.

    chunk: element i sees the elements j with j // chunk == i // chunk (short sequences that share
    a tile). ends: (B, N) int32. schedule, row_bits, key_bits: of an AttentionMask.
    """

    causal: bool = False
    chunk: int = 0
    ends: Tensor | None = None
    schedule: Tensor | None = None
    row_bits: Tensor | None = None
    key_bits: Tensor | None = None


# ---------------------------------------------------------------------------------- common masks


def prefix_mask(length: int, prefix: int) -> AttentionMask:
    """Everyone sees the first `prefix` elements, and besides them is causal."""
    _at_least("prefix", prefix, 0)
    return _one_range(torch.arange(1, length + 1).clamp(min=min(prefix, length)))


def chunk_mask(length: int, size: int) -> AttentionMask:
    """Elements see their own chunk of `size` elements, both ways, and nothing else."""
    _at_least("size", size, 1)
    first = torch.arange(length) // size * size
    return _one_range((first + size).clamp(max=length), first)


def group_mask(groups: list[int]) -> AttentionMask:
    """Group-causal: elements see their own group and all earlier ones. groups: their sizes."""
    sizes = _group_sizes(groups)
    return _one_range(sizes.cumsum(0).repeat_interleave(sizes))


def two_stream_mask(
    groups: list[int], prefix: int = 1, has_last_context: bool = True
) -> AttentionMask:
    """SAR's two streams: `prefix` elements (the class), context, generation.

    groups: sizes of G_1..G_T. Context is the true tokens in the order of the groups, generation
    their copy in the same order. The prefix sees itself; context of G_s sees prefix and context of
    G_1..G_s; generation of G_t sees prefix, context of G_1..G_{t-1}, and its own group of the copy.
    has_last_context: whether the context has G_T, which nothing but itself sees.
    """
    sizes = _group_sizes(groups)
    _at_least("prefix", prefix, 0)
    ends = sizes.cumsum(0).repeat_interleave(sizes)
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    tokens = int(sizes.sum())
    context = tokens if has_last_context else tokens - groups[-1]
    ranges = torch.zeros(prefix + context + tokens, 2, 2, dtype=torch.int32)
    ranges[:prefix, 0, 1] = prefix
    ranges[prefix : prefix + context, 0, 1] = prefix + ends[:context]
    ranges[prefix + context :, 0, 1] = prefix + starts
    ranges[prefix + context :, 1] = prefix + context + torch.stack((starts, ends), 1)
    return AttentionMask.from_ranges(ranges, len(ranges))


def _group_sizes(groups: list[int]) -> Tensor:
    if not groups or any(not isinstance(size, int) or size < 1 for size in groups):
        raise ValueError(f"groups are a list of sizes, whole numbers from 1 up, got {groups}")
    return torch.tensor(groups)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} of an attention mask must be {least} or more, got {value}")


# -------------------------------------------------------------------------- what masks are made of


def _check_lengths(queries: int, keys: int) -> None:
    if not (1 <= queries <= MAX_LENGTH and 1 <= keys <= MAX_LENGTH):
        raise ValueError(
            f"an attention mask has 1 to {MAX_LENGTH} queries and keys, got {queries} "
            f"queries and {keys} keys"
        )


def _check_integers(name: str, x: Tensor, shape: tuple[int, ...], most: int) -> Tensor:
    """x on the CPU; ValueError unless it has this shape and integers of 0..most."""
    x = x.cpu()
    if x.is_floating_point() or tuple(x.shape) != shape:
        raise ValueError(
            f"an attention mask of these lengths takes {name} {shape} of integers, "
            f"got {x.dtype} {tuple(x.shape)}"
        )
    if x.numel() and not 0 <= int(x.min()) <= int(x.max()) <= most:
        raise ValueError(
            f"{name} of an attention mask are 0 to {most}, got {int(x.min())} to {int(x.max())}"
        )
    return x


def _one_range(end_N: Tensor, first_N: Tensor | None = None) -> AttentionMask:
    """Element i sees the elements first[i] (default 0) to end[i] - 1."""
    ranges = torch.zeros(len(end_N), 2, 2, dtype=torch.int32)
    ranges[:, 0, 1] = end_N
    if first_N is not None:
        ranges[:, 0, 0] = first_N
    return AttentionMask.from_ranges(ranges, len(end_N))


def _grid_of_blocks(queries: int, keys: int) -> tuple[int, int]:
    return -(-queries // BLOCK), -(-keys // BLOCK)


def _dense(blocks: Tensor, ranges_N22: Tensor, num_keys: int) -> Tensor:
    """(N, M) booleans."""
    key = torch.arange(num_keys, device=ranges_N22.device)
    first_N2 = ranges_N22[..., :1]
    end_N2 = ranges_N22[..., 1:]
    inside_NM = ((key >= first_N2) & (key < end_N2)).any(1)
    flag_NM = blocks.repeat_interleave(BLOCK, 0)[: len(ranges_N22)]
    flag_NM = flag_NM.repeat_interleave(BLOCK, 1)[:, :num_keys]
    return (flag_NM == FULL_BLOCK) | (flag_NM == PARTIAL_BLOCK) & inside_NM


def _tiles(visible_NM: Tensor, height: int, width: int, outside: bool) -> Tensor:
    """(N / height, M / width, height, width), rounded up, what is added being `outside`."""
    rows_added = -visible_NM.shape[0] % height
    columns_added = -visible_NM.shape[1] % width
    padded = F.pad(visible_NM, (0, columns_added, 0, rows_added), value=outside)
    return padded.unflatten(1, (-1, width)).unflatten(0, (-1, height)).transpose(1, 2)


def _any_seen(visible_NM: Tensor, height: int, width: int) -> Tensor:
    """(N / height, M / width) booleans: whether anything is seen in a tile."""
    return _tiles(visible_NM, height, width, outside=False).flatten(2).any(2)


def _flags(visible_NM: Tensor) -> Tensor:
    """EMPTY_BLOCK, PARTIAL_BLOCK or FULL_BLOCK of every 64 x 64 block."""
    some = _any_seen(visible_NM, BLOCK, BLOCK)
    every = _tiles(visible_NM, BLOCK, BLOCK, outside=True).flatten(2).all(2)
    return some.byte() + every


def _schedule(visible_NM: Tensor) -> Tensor:
    """(4, 16, 17) int32: the blocks that a kernel visits, four tables of 16 rows. A row is a count
    and as many entries.

    Tables 0 and 1, forward: a row per 64, or 128, queries; entries are blocks of 64 keys.
    Tables 2 and 3, backward: a row per chunk of 64, or 128, keys; entries are
        2 * (block of 64 queries) + (1 if no later chunk touches that block, else 0). The backward
        kernel goes through the chunks from the last to the first, so that 1 says: this is the first
        time that dQ of the block is written.
    """
    most = MAX_LENGTH // BLOCK
    schedule = torch.zeros(4, most, most + 1, dtype=torch.int32)

    def fill(table: int, row: int, entries: Tensor) -> None:
        schedule[table, row, 0] = len(entries)
        schedule[table, row, 1 : len(entries) + 1] = entries

    for table, height in enumerate((BLOCK, 2 * BLOCK)):
        seen = _any_seen(visible_NM, height, BLOCK)
        for row, key_blocks in enumerate(seen):
            fill(table, row, key_blocks.nonzero().flatten())
    for table, width in enumerate((BLOCK, 2 * BLOCK), start=2):
        seen = _any_seen(visible_NM, BLOCK, width)
        for chunk in range(seen.shape[1]):
            query_blocks = seen[:, chunk].nonzero().flatten()
            is_first_write = ~seen[query_blocks, chunk + 1 :].any(1)
            fill(table, chunk, 2 * query_blocks + is_first_write)
    return schedule


def _bits(visible_NM: Tensor) -> Tensor:
    """(M / 32, N) int32, N and M rounded up to 128: whether i sees j is bit j % 32 of word j // 32
    in column i. The words that a block of queries needs for 32 keys lie side by side."""
    padded_NM = F.pad(
        visible_NM, (0, -visible_NM.shape[1] % (2 * BLOCK), 0, -visible_NM.shape[0] % (2 * BLOCK))
    )
    bit = torch.arange(32)
    words = (padded_NM.unflatten(1, (-1, 32)).long() << bit).sum(-1).t().contiguous()
    # The word as a signed number of 32 bits.
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
