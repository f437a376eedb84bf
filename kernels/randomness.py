"""Inline functions for kernels that make random numbers again instead of reading them.

`keep` is the mask of `heptapod_fast.ops.dropout_mask`, `philox_words` the generator of
`heptapod_fast.ops.philox`: integers, equal bit for bit to the references. So are uniform numbers
and integers made of words; normal numbers are equal to float32 rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from heptapod_fast.ops.dropout_mask import DropoutMask

# Dropout: one hash of 32 bits per element.


@triton.jit
def _mix(x):
    """uint32 -> uint32, every bit of which depends on every bit of x ("lowbias32")."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def row_keys(
    key_ptr,  # (P, 2) int64, words below 2**32
    counter_ptr,  # (N,) int64
    row,  # flat row of R, a scalar or a tile
    rows_per_key,  # R / P
    counters,  # N
):
    """(key0, key1, counter) of a flat row: two uint32 and an int64."""
    at = key_ptr + 2 * (row // rows_per_key)
    key0 = tl.load(at).to(tl.uint32)
    key1 = tl.load(at + 1).to(tl.uint32)
    return key0, key1, tl.load(counter_ptr + row % counters)


@triton.jit
def keep(
    key0,  # uint32
    key1,  # uint32
    counter,  # int64, of the row
    column,  # broadcastable with the counter to the tile
    width,  # columns of a row
    THRESHOLD: tl.constexpr,  # round(p * 2**32)
):
    """Where dropout keeps an element."""
    element = (counter * width + column).to(tl.uint32)
    hashed = _mix(_mix(element ^ key0) ^ key1)
    # As int64, because a threshold above 2**31 is no int32.
    return hashed.to(tl.int64) >= THRESHOLD


def mask_arguments(mask: DropoutMask | None, rows: int) -> dict:
    """What kernels with dropout are launched with; without a mask THRESHOLD is 0."""
    if mask is None:
        return dict(
            key_ptr=None,
            counter_ptr=None,
            rows_per_key=1,
            counters=1,
            scale=1.0,
            THRESHOLD=0,
        )
    return dict(
        key_ptr=mask.key_P2,
        counter_ptr=mask.counter_N,
        rows_per_key=rows // len(mask.key_P2),
        counters=len(mask.counter_N),
        scale=1.0 / (1.0 - mask.p),
        THRESHOLD=mask.threshold(),
    )


# Philox: words of 32 bits from a counter and a key, and what draws make of them.


@triton.jit
def philox_words(
    index,  # int64
    slot,  # int64, of which the low 32 bits count
    block,  # int32 or int64
    key0,  # uint32 scalar
    key1,  # uint32 scalar
):
    """Four uint32 tensors: Philox4x32-10 of counter (block, slot, index low, index high).

    index, slot and block are broadcast to one shape by the caller.
    """
    c0 = block.to(tl.uint32)
    c1 = slot.to(tl.uint32)
    c2 = index.to(tl.uint32)
    c3 = (index >> 32).to(tl.uint32)
    k0 = key0
    k1 = key1
    for _ in tl.static_range(10):
        # Two products of 64 bits, in two halves each.
        high0 = tl.umulhi(c0, 0xD2511F53)
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        low0 = c0 * 0xD2511F53
        low1 = c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = low1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def uniform(word):
    """float32 on the open interval (0, 1) from a uint32 word: (word >> 8 + 1/2) 2**-24."""
    high_bits = (word >> 8).to(tl.int32).to(tl.float32)
    # The largest value, 1 - 2**-25, would round to 1, whose logarithm is 0.
    return tl.minimum((high_bits + 0.5) * 5.9604644775390625e-08, 0.999999940395355224609375)


@triton.jit
def integer_below(
    word,  # uint32
    high,  # int32 scalar
):
    """int64 on 0..high-1 from a uint32 word: the upper half of word * high."""
    return tl.umulhi(word, tl.zeros_like(word) + high.to(tl.uint32)).to(tl.int64)


@triton.jit
def _sine_cosine(u):
    """sin and cos of 2 pi u for u in (0, 1), without the slow path of tl.sin for large angles.

    The reduction to an eighth of a turn on either side of a quarter is exact; then Taylor series,
    whose first terms left out are below 2e-9 and 2e-10.
    """
    quarter = (4.0 * u + 0.5).to(tl.int32)
    angle = 6.283185307179586 * (u - 0.25 * quarter.to(tl.float32))
    z = angle * angle
    sine = angle + angle * z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * (1 / 362880))))
    cosine = 1.0 + z * (
        -1 / 2 + z * (1 / 24 + z * (-1 / 720 + z * (1 / 40320 - z * (1 / 3628800))))
    )
    # A quarter of a turn further, sine becomes cosine and cosine becomes -sine.
    odd = (quarter & 1) == 1
    by_sine = tl.where(odd, cosine, sine)
    by_cosine = tl.where(odd, sine, cosine)
    sine = tl.where((quarter & 2) == 2, -by_sine, by_sine)
    cosine = tl.where(((quarter + 1) & 2) == 2, -by_cosine, by_cosine)
    return sine, cosine


@triton.jit
def normal_pair(word0, word1):
    """Two float32 standard normal tensors from two words, by Box-Muller."""
    radius = tl.sqrt(-2.0 * tl.log(uniform(word0)))
    sine, cosine = _sine_cosine(uniform(word1))
    return radius * cosine, radius * sine


@triton.jit
def row_normals(
    index_R,  # [R] int64
    slot_R,  # [R] int64
    key0,  # uint32 scalar
    key1,  # uint32 scalar
    BLOCK: tl.constexpr,  # columns, a multiple of 4
):
    """[R, BLOCK] float32 standard normal: columns 4b..4b+3 are made of the four words of block b,
    every word once."""
    block = tl.arange(0, BLOCK // 4)[None, :] + tl.zeros_like(slot_R)[:, None]  # [R, BLOCK // 4]
    w0, w1, w2, w3 = philox_words(index_R[:, None], slot_R[:, None], block, key0, key1)
    n0, n1 = normal_pair(w0, w1)
    n2, n3 = normal_pair(w2, w3)
    # interleave(a, b) is a0 b0 a1 b1...: of (n0, n2) and (n1, n3) it makes n0 n1 n2 n3.
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


def noise_block(channels: int) -> int:
    """The BLOCK of `row_normals` for so many channels."""
    return max(4, triton.next_power_of_2(channels))


def signed(key: Sequence[int]) -> list[int]:
    """Words below 2**32 as int32 of the same bits, so that every key has one type at the launch."""
    return [(word + 2**31) % 2**32 - 2**31 for word in key]


# Rows of the diffusion losses: row m * REPEAT + k is repeat k of token m.


@triton.jit
def row_draws(
    index_ptr,  # (M,) int64
    slot_ptr,  # (M,) int64
    row,  # [ROWS] int64, flat rows
    rows,  # M * REPEAT
    REPEAT: tl.constexpr,  # rows per token
):
    """(token, index, slot) of flat rows; rows past the last are read as the last."""
    row = tl.minimum(row, rows - 1)
    token = row // REPEAT
    index = tl.load(index_ptr + token)
    slot = tl.load(slot_ptr + token) * REPEAT + row % REPEAT
    return token, index, slot


@triton.jit
def repeat_rows(
    first,  # the first repeat of this tile
    tokens,  # M
    REPEAT: tl.constexpr,  # rows per token
    REPEATS: tl.constexpr,  # rows per token in a tile, a power of 2
    ROWS: tl.constexpr,  # rows of a tile: ROWS // REPEATS tokens
):
    """[ROWS] flat rows of this program's tokens, repeats `first` onwards, and whether they exist.

    Rows that do not exist point at one that does.
    """
    place = tl.arange(0, ROWS)  # [ROWS]
    token = tl.program_id(0).to(tl.int64) * (ROWS // REPEATS) + place // REPEATS
    repeat = first + place % REPEATS
    valid = (token < tokens) & (repeat < REPEAT)
    row = tl.minimum(token, tokens - 1) * REPEAT + tl.minimum(repeat, REPEAT - 1)
    return row, valid


@triton.jit
def sum_repeats(
    x,  # [TOKENS * REPEATS, BLOCK]
    inside,  # where x counts
    TOKENS: tl.constexpr,  # tokens of a tile
    REPEATS: tl.constexpr,  # rows per token in a tile
):
    """[TOKENS]: the sum over channels and repeats of each token."""
    sums = tl.sum(tl.where(inside, x, 0.0), axis=1)
    return tl.sum(tl.reshape(sums, (TOKENS, REPEATS)), axis=1)
