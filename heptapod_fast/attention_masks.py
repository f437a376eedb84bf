"""Who sees whom in attention: one description for the reference and the kernels.

Suffixes: N queries, M keys. Masks are made on the CPU, once; `AttentionMask.to` moves them.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from heptapod_fast.ops.attention import BLOCK, MAX_LENGTH

EMPTY, PARTIAL, FULL = 0, 1, 2


class AttentionMask:
    """Flags of 64 x 64 blocks, and two ranges of keys per query for the partial ones.

    blocks: (N / 64, M / 64) integers, EMPTY, PARTIAL or FULL; ranges_N22: (N, 2, 2) integers, half
    open, 0 to M, read where the block is PARTIAL. One mask serves every sequence and head.
    `dense_NM` is the same as booleans, for the reference; for the kernels, which touch no empty
    block, there are:

    schedule (4, 16, 17) int32: for every row of blocks (64, then 128 queries high) its count and
        the key blocks to visit; for every chunk of keys (64, then 128 wide) its count and entries
        2 * query block + 1 where no later chunk touches that query block.
    row_bits (M / 32, N), key_bits (N / 32, M) int32, both padded to 128: whether i sees j is bit
        j % 32 of word j // 32 of column i, so that the words of a block lie side by side.

    Raises ValueError if a query sees no key, a length is not in 1..1024, a flag or range is wrong.
    """

    def __init__(self, blocks: Tensor, ranges_N22: Tensor, num_keys: int):
        self.num_queries, self.num_keys = lengths = _lengths(len(ranges_N22), num_keys)
        self.blocks = _integers("blocks", blocks, _blocks(*lengths), FULL).to(torch.uint8)
        self.ranges_N22 = _integers("ranges", ranges_N22, (lengths[0], 2, 2),
                                    num_keys).to(torch.int32)
        self.dense_NM = _dense(self.blocks, self.ranges_N22, num_keys)
        blind = (~self.dense_NM.any(1)).nonzero().flatten().tolist()
        if blind:
            raise ValueError(f"attention mask: {len(blind)} queries see no key, the first is "
                             f"query {blind[0]}")
        self.schedule = _schedule(self.dense_NM)
        self.row_bits, self.key_bits = _bits(self.dense_NM), _bits(self.dense_NM.t())

    def __repr__(self) -> str:
        empty = float((self.blocks == EMPTY).float().mean())
        return (f"AttentionMask({self.num_queries} queries, {self.num_keys} keys, {empty:.0%} of "
                f"its blocks empty, {self.schedule.device})")

    @classmethod
    def from_ranges(cls, ranges_N22: Tensor, num_keys: int) -> AttentionMask:
        """Query i sees the keys in ranges[i, 0] and ranges[i, 1]; an empty range adds nothing."""
        _lengths(len(ranges_N22), num_keys)
        ranges_N22 = _integers("ranges", ranges_N22, (len(ranges_N22), 2, 2), num_keys)
        partial = torch.full(_blocks(len(ranges_N22), num_keys), PARTIAL)
        return cls(_flags(_dense(partial, ranges_N22, num_keys)), ranges_N22, num_keys)

    @classmethod
    def from_dense(cls, visible_NM: Tensor) -> AttentionMask:
        """From booleans, True where a query sees a key.

        Raises ValueError if a query sees more than two runs of keys in its partial blocks.
        """
        if visible_NM.dtype != torch.bool or visible_NM.dim() != 2:
            raise ValueError("AttentionMask.from_dense takes booleans (N, M), True where a query "
                             f"sees a key, got {visible_NM.dtype} {tuple(visible_NM.shape)}")
        _lengths(*visible_NM.shape)
        visible_NM = visible_NM.cpu()
        num_keys, flags = visible_NM.shape[1], _flags(visible_NM)
        ranges = torch.zeros(len(visible_NM), 2, 2, dtype=torch.int32)
        for i, row in enumerate(visible_NM):
            partial = (flags[i // BLOCK] == PARTIAL).repeat_interleave(BLOCK)[:num_keys]
            keys = partial.nonzero().flatten()
            edges = F.pad(row[keys].int(), (1, 1)).diff().nonzero().flatten().view(-1, 2)
            if len(edges) > 2:
                raise ValueError(f"attention mask: query {i} sees {len(edges)} separate runs of "
                                 f"keys in its partial {BLOCK} x {BLOCK} blocks; two can be said")
            for slot, (first, end) in enumerate(edges.tolist()):
                ranges[i, slot] = torch.stack((keys[first], keys[end - 1] + 1))
        return cls(flags, ranges, num_keys)

    def to(self, device: torch.device | str) -> AttentionMask:
        """The same mask with its tensors on a device."""
        device, moved = torch.device(device), copy.copy(self)
        vars(moved).update({name: value.to(device) for name, value in vars(self).items()
                            if torch.is_tensor(value)})
        return moved


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


def two_stream_mask(groups: list[int], prefix: int = 1) -> AttentionMask:
    """SAR's two streams: `prefix` elements (the class), context, generation.

    groups: sizes of G_1..G_T. Context is the true tokens in the order of the groups, generation
    their copy in the same order. The prefix sees itself; context of G_s sees prefix and context of
    G_1..G_s; generation of G_t sees prefix, context of G_1..G_{t-1}, and its own group of the copy.
    """
    sizes = _group_sizes(groups)
    _at_least("prefix", prefix, 0)
    ends = sizes.cumsum(0).repeat_interleave(sizes)
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    tokens = int(sizes.sum())
    ranges = torch.zeros(prefix + 2 * tokens, 2, 2, dtype=torch.int32)
    ranges[:prefix, 0, 1] = prefix
    ranges[prefix:prefix + tokens, 0, 1] = prefix + ends
    ranges[prefix + tokens:, 0, 1] = prefix + starts
    ranges[prefix + tokens:, 1] = prefix + tokens + torch.stack((starts, ends), 1)
    return AttentionMask.from_ranges(ranges, len(ranges))


def _group_sizes(groups: list[int]) -> Tensor:
    if not groups or any(not isinstance(size, int) or size < 1 for size in groups):
        raise ValueError(f"groups are a list of sizes, whole numbers from 1 up, got {groups}")
    return torch.tensor(groups)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} of an attention mask must be {least} or more, got {value}")


def _lengths(queries: int, keys: int) -> tuple[int, int]:
    if not (1 <= queries <= MAX_LENGTH and 1 <= keys <= MAX_LENGTH):
        raise ValueError(f"an attention mask has 1 to {MAX_LENGTH} queries and keys, got {queries} "
                         f"queries and {keys} keys")
    return queries, keys


def _integers(name: str, x: Tensor, shape: tuple[int, ...], most: int) -> Tensor:
    """x on the CPU; ValueError unless it has this shape and integers of 0..most."""
    x = x.cpu()
    if x.is_floating_point() or tuple(x.shape) != shape:
        raise ValueError(f"an attention mask of these lengths takes {name} {shape} of integers, "
                         f"got {x.dtype} {tuple(x.shape)}")
    if x.numel() and not 0 <= int(x.min()) <= int(x.max()) <= most:
        raise ValueError(f"{name} of an attention mask are 0 to {most}, got {int(x.min())} to "
                         f"{int(x.max())}")
    return x


def _one_range(end_N: Tensor, first_N: Tensor | None = None) -> AttentionMask:
    ranges = torch.zeros(len(end_N), 2, 2, dtype=torch.int32)
    ranges[:, 0, 1] = end_N
    if first_N is not None:
        ranges[:, 0, 0] = first_N
    return AttentionMask.from_ranges(ranges, len(end_N))


def _blocks(*lengths: int) -> tuple[int, ...]:
    return tuple(-(-length // BLOCK) for length in lengths)


def _dense(blocks: Tensor, ranges_N22: Tensor, num_keys: int) -> Tensor:
    key = torch.arange(num_keys, device=ranges_N22.device)
    inside_NM = ((key >= ranges_N22[..., :1]) & (key < ranges_N22[..., 1:])).any(1)
    flag_NM = blocks.repeat_interleave(BLOCK, 0)[:len(ranges_N22)]
    flag_NM = flag_NM.repeat_interleave(BLOCK, 1)[:, :num_keys]
    return (flag_NM == FULL) | (flag_NM == PARTIAL) & inside_NM


def _tiles(visible_NM: Tensor, rows: int, keys: int, outside: bool) -> Tensor:
    """(N / rows, M / keys, rows, keys), padded with `outside`."""
    pad = (0, -visible_NM.shape[1] % keys, 0, -visible_NM.shape[0] % rows)
    padded = F.pad(visible_NM, pad, value=outside)
    return padded.unflatten(1, (-1, keys)).unflatten(0, (-1, rows)).transpose(1, 2)


def _flags(visible_NM: Tensor) -> Tensor:
    some = _tiles(visible_NM, BLOCK, BLOCK, False).flatten(2).any(2)
    return some.byte() + _tiles(visible_NM, BLOCK, BLOCK, True).flatten(2).all(2)


def _schedule(visible_NM: Tensor) -> Tensor:
    most = MAX_LENGTH // BLOCK
    schedule = torch.zeros(4, most, most + 1, dtype=torch.int32)
    for plane, height in enumerate((BLOCK, 2 * BLOCK)):
        for row, some in enumerate(_tiles(visible_NM, height, BLOCK, False).flatten(2).any(2)):
            keys = some.nonzero()[:, 0]
            schedule[plane, row, :len(keys) + 1] = F.pad(keys, (1, 0), value=len(keys))
    for plane, width in enumerate((BLOCK, 2 * BLOCK), start=2):
        some = _tiles(visible_NM, BLOCK, width, False).flatten(2).any(2)
        for chunk in range(some.shape[1]):
            rows = some[:, chunk].nonzero().flatten()
            entries = 2 * rows + ~some[rows, chunk + 1:].any(1)
            schedule[plane, chunk, :len(rows) + 1] = F.pad(entries, (1, 0), value=len(rows))
    return schedule


def _bits(visible_NM: Tensor) -> Tensor:
    tiles = _tiles(visible_NM, 2 * BLOCK, 2 * BLOCK, False).transpose(1, 2)
    words = tiles.flatten(2).flatten(0, 1).unflatten(1, (-1, 32)).long()
    words = (words << torch.arange(32)).sum(-1).t().contiguous()
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
