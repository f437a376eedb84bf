"""Attention masks against brute force: booleans, block flags, schedules and bits agree."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heptapod_fast.ops import masks
from heptapod_fast.ops.masks import EMPTY_BLOCK, FULL_BLOCK, PARTIAL_BLOCK

ONE = torch.ones(1, 1, dtype=torch.uint8)


def brute_two_streams(groups, prefix):
    """(stream, group) of every element, and who sees whom by the sentence of the method."""
    kinds = [("context", 0)] * prefix
    for stream in ("context", "generation"):
        kinds += [(stream, t) for t, size in enumerate(groups, start=1) for _ in range(size)]

    def sees(query, key):
        (stream, t), (other, s) = query, key
        if other == "generation":
            return stream == "generation" and s == t
        return s <= t if stream == "context" else s < t

    return torch.tensor([[sees(query, key) for key in kinds] for query in kinds])


def unpack(bits, rows, columns):
    """Booleans from 32 to a word."""
    j = torch.arange(columns)
    return (bits.t()[:rows, j // 32] >> (j % 32) & 1).bool()


def check_mask(mask):
    """Blocks, schedule and bits say what dense_NM says."""
    dense, (n, m) = mask.dense_NM, mask.dense_NM.shape
    assert torch.equal(unpack(mask.row_bits, n, m), dense)
    assert torch.equal(unpack(mask.key_bits, m, n), dense.t())
    some = torch.zeros(-(-n // 128) * 2, -(-m // 128) * 2, dtype=torch.bool)
    for i, j in dense.nonzero().unique(dim=0).tolist():
        some[i // 64, j // 64] = True
    assert torch.equal(mask.blocks != EMPTY_BLOCK, some[: -(-n // 64), : -(-m // 64)])
    for plane, height in ((0, 1), (1, 2)):
        for row in range(-(-n // (64 * height))):
            count, *keys = mask.schedule[plane, row].tolist()
            visited = some[row * height : (row + 1) * height].any(0)
            assert keys[:count] == visited.nonzero().flatten().tolist()
    for plane, width in ((2, 1), (3, 2)):
        seen = set()
        for chunk in reversed(range(-(-m // (64 * width)))):
            count, *entries = mask.schedule[plane, chunk].tolist()
            rows = some[:, chunk * width : (chunk + 1) * width].any(1).nonzero().flatten().tolist()
            assert entries[:count] == [2 * row + (row not in seen) for row in rows]
            seen |= set(rows)
        assert seen == set(range(-(-n // 64)))


@pytest.mark.parametrize(
    "groups, prefix",
    [([1, 2, 3], 1), ([4], 0), ([5, 1, 60, 30], 2), ([min(i + 1, 15 - i) for i in range(15)], 1)],
)
def test_two_streams(groups, prefix):
    mask = masks.two_stream_mask(groups, prefix)
    assert torch.equal(mask.dense_NM, brute_two_streams(groups, prefix))
    check_mask(mask)


@pytest.mark.parametrize("groups, prefix", [([1, 2, 3, 2, 1], 1), ([70, 9, 60], 0), ([4], 1)])
def test_two_streams_without_the_last_context(groups, prefix):
    mask = masks.two_stream_mask(groups, prefix, has_last_context=False)
    whole = brute_two_streams(groups, prefix)
    end = prefix + sum(groups)
    keep = torch.ones(len(whole), dtype=torch.bool)
    keep[end - groups[-1] : end] = False
    # Nothing but itself sees it.
    assert not whole[keep][:, ~keep].any()
    assert torch.equal(mask.dense_NM, whole[keep][:, keep])
    check_mask(mask)


def test_the_usual_masks():
    ones, i = torch.ones(130, 130, dtype=torch.bool), torch.arange(130)
    assert torch.equal(masks.prefix_mask(130, 1).dense_NM, ones.tril())
    assert torch.equal(masks.prefix_mask(130, 70).dense_NM, ones.tril() | (i < 70))
    assert masks.prefix_mask(130, 999).dense_NM.all()
    assert torch.equal(masks.chunk_mask(130, 48).dense_NM, i[:, None] // 48 == i // 48)
    owner = torch.tensor([0] * 30 + [1] * 99 + [2])
    assert torch.equal(masks.group_mask([30, 99, 1]).dense_NM, owner[:, None] >= owner)
    for mask in (
        masks.prefix_mask(130, 70),
        masks.chunk_mask(130, 48),
        masks.group_mask([30, 100]),
    ):
        check_mask(mask)
        assert torch.equal(masks.AttentionMask.from_dense(mask.dense_NM).dense_NM, mask.dense_NM)
    assert masks.prefix_mask(130, 64).blocks.tolist() == [[2, 0, 0], [2, 1, 0], [2, 2, 1]]


@st.composite
def block_masks(draw):
    """Random block flags; random ranges, never empty, where a block is partial."""
    n, m = draw(st.integers(1, 300)), draw(st.integers(1, 300))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    blocks = torch.randint(0, 3, (-(-n // 64), -(-m // 64)), generator=generator)
    blocks[:, draw(st.integers(0, blocks.shape[1] - 1))] = FULL_BLOCK
    ranges = torch.randint(0, m + 1, (n, 4), generator=generator).sort(1).values
    return masks.AttentionMask(blocks, ranges.view(n, 2, 2), m)


@settings(max_examples=40)
@given(block_masks())
def test_flags_and_ranges_together_say_who_sees_whom(mask):
    n, m = mask.dense_NM.shape
    for i, j in torch.randint(0, 2**20, (50, 2)).remainder(torch.tensor([n, m])).tolist():
        flag = mask.blocks[i // 64, j // 64]
        inside = any(first <= j < end for first, end in mask.ranges_N22[i].tolist())
        assert mask.dense_NM[i, j] == (flag == FULL_BLOCK or flag == PARTIAL_BLOCK and inside)
    if not (mask.dense_NM.any(1)).all():
        return
    again = masks.AttentionMask.from_dense(mask.dense_NM)
    assert torch.equal(again.dense_NM, mask.dense_NM)


def test_masks_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="3 queries see no key, the first is query 5"):
        visible = torch.ones(9, 9, dtype=torch.bool)
        visible[5:8] = False
        masks.AttentionMask.from_dense(visible)
    with pytest.raises(ValueError, match=r"takes booleans \(N, M\), .* got torch.float32 \(5, 5\)"):
        masks.AttentionMask.from_dense(torch.zeros(5, 5))
    with pytest.raises(ValueError, match="query 1 sees 3 separate runs of keys .* two can be said"):
        masks.AttentionMask.from_dense(torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 1]]).bool())
    for n, m in ((1025, 5), (5, 1025), (0, 5)):
        with pytest.raises(ValueError, match=f"1 to 1024 .* got {n} queries and {m} keys"):
            masks.AttentionMask(ONE, torch.zeros(n, 2, 2).int(), m)
    for blocks, ranges, message in [
        (ONE, torch.zeros(65, 2, 2).int(), r"blocks \(2, 1\) of integers, got .*\(1, 1\)"),
        (ONE.float(), torch.zeros(5, 2, 2).int(), "of integers, got torch.float32"),
        (3 * ONE, torch.zeros(5, 2, 2).int(), "blocks .* are 0 to 2, got 3 to 3"),
        (ONE, torch.full((5, 2, 2), 6), "ranges .* are 0 to 5, got 6 to 6"),
        (ONE, torch.full((5, 2, 2), -1), "ranges .* got -1 to -1"),
        (ONE, torch.zeros(5, 2).int(), r"ranges \(5, 2, 2\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            masks.AttentionMask(blocks, ranges, 5)
    for make, message in [
        (lambda: masks.group_mask([]), r"whole numbers from 1 up, got \[\]"),
        (lambda: masks.group_mask([2.5]), r"got \[2.5\]"),
        (lambda: masks.two_stream_mask([1, 0]), r"got \[1, 0\]"),
        (lambda: masks.two_stream_mask([1], -1), "prefix .* 0 or more, got -1"),
        (lambda: masks.prefix_mask(5, -2), "prefix .* 0 or more, got -2"),
        (lambda: masks.chunk_mask(0, 4), "got 0 queries and 0 keys"),
        (lambda: masks.prefix_mask(1025, 4), "got 1025 queries and 1025 keys"),
        (
            lambda: masks.AttentionMask.from_ranges(torch.zeros(5, 4).int(), 5),
            r"ranges \(5, 2, 2\)",
        ),
        (
            lambda: masks.AttentionMask.from_dense(torch.ones(0, 5).bool()),
            "got 0 queries and 5 keys",
        ),
        (lambda: masks.chunk_mask(5, 0), "size .* 1 or more, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


def test_a_mask_shows_what_it_is_and_moves():
    mask = masks.chunk_mask(256, 64)
    assert repr(mask) == "AttentionMask(256 queries, 256 keys, 75% of its blocks empty, cpu)"
    moved = mask.to("meta")
    assert {x.device.type for x in vars(moved).values() if torch.is_tensor(x)} == {"meta"}
    assert mask.schedule.device.type == "cpu" and moved.num_keys == 256
