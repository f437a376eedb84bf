"""Random numbers made inside kernels: the words of the references bit for bit, normal numbers to
rounding."""

import pytest
import torch

from heptapod_fast.ops import philox
from tests.numerics import DEVICE

pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from heptapod_fast.kernels import randomness  # noqa: E402

KEYS = [(0, 0), (0xFFFFFFFF, 0xFFFFFFFF), (0xDEADBEEF, 17)]


@triton.jit(do_not_specialize=["key0", "key1"])
def _words(index_ptr, slot_ptr, out_ptr, key0, key1, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    row, block = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCKS)[None, :]
    found = randomness.philox_words(
        tl.load(index_ptr + row),
        tl.load(slot_ptr + row),
        block,
        key0.to(tl.uint32),
        key1.to(tl.uint32),
    )
    at = out_ptr + (row * BLOCKS + block) * 4
    tl.store(at, found[0].to(tl.int64))
    tl.store(at + 1, found[1].to(tl.int64))
    tl.store(at + 2, found[2].to(tl.int64))
    tl.store(at + 3, found[3].to(tl.int64))


@triton.jit
def _of_words(word_ptr, uniform_ptr, integer_ptr, normal_ptr, high, BLOCK: tl.constexpr):
    pair = tl.arange(0, BLOCK)
    word0 = tl.load(word_ptr + 2 * pair).to(tl.uint32)
    word1 = tl.load(word_ptr + 2 * pair + 1).to(tl.uint32)
    tl.store(uniform_ptr + 2 * pair, randomness.uniform(word0))
    tl.store(uniform_ptr + 2 * pair + 1, randomness.uniform(word1))
    tl.store(integer_ptr + 2 * pair, randomness.integer_below(word0, high))
    tl.store(integer_ptr + 2 * pair + 1, randomness.integer_below(word1, high))
    first, second = randomness.normal_pair(word0, word1)
    tl.store(normal_ptr + 2 * pair, first)
    tl.store(normal_ptr + 2 * pair + 1, second)


@triton.jit(do_not_specialize=["key0", "key1"])
def _row_normals(
    index_ptr,
    slot_ptr,
    out_ptr,
    rows,
    key0,
    key1,
    REPEAT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    _, index, slot = randomness.row_draws(index_ptr, slot_ptr, row, rows, REPEAT)
    normal = randomness.row_normals(index, slot, key0.to(tl.uint32), key1.to(tl.uint32), BLOCK)
    tl.store(out_ptr + row[:, None] * BLOCK + column[None, :], normal, mask=row[:, None] < rows)


def counters(rows):
    index = torch.randint(-(2**62), 2**62, (rows,), device=DEVICE)
    slot = torch.randint(0, 2**32, (rows,), device=DEVICE)
    index[0], slot[0], index[1], slot[1] = 0, 0, 2**32 + 5, 2**32 - 1
    return index, slot


@pytest.mark.parametrize("key", KEYS)
def test_words_are_the_references(key):
    index, slot = counters(8)
    out = torch.full((8, 16), -1, device=DEVICE)
    _words[(1,)](index, slot, out, *randomness.signed(key), ROWS=8, BLOCKS=4)
    assert torch.equal(out, philox.reference(index, slot, 4, key))


def test_signed_keys_are_int32_of_the_same_bits():
    for word in (0, 1, 2**31 - 1, 2**31, 2**32 - 1):
        (found,) = randomness.signed([word])
        assert -(2**31) <= found < 2**31 and found % 2**32 == word


def special_words():
    """Ends, where float32 rounds, both sides of every eighth of a turn, and many others."""
    eighths = torch.arange(9) * 2**29
    around = torch.cat([eighths + offset for offset in (-512, -256, -1, 0, 1, 256, 512)])
    ends = torch.tensor(
        [
            0,
            255,
            256,
            2**31 - 1,
            2**31 + 255,
            2**31 + 256,
            2**31 + 512,
            2**32 - 1,
            2**32 - 256,
            2**32 - 257,
            2**32 - 512,
            2**32 - 513,
        ]
    )
    chosen = torch.cat((ends, around.clamp(0, 2**32 - 1)))
    fill = torch.randint(0, 2**32, (512 - 2 * len(chosen),))
    return torch.cat((chosen, fill, chosen)).to(DEVICE)


@pytest.mark.parametrize("high", [1000, 7, 2**31 - 1])
def test_uniform_integer_and_normal(high):
    words = special_words()
    uniform, normal = (torch.empty(512, device=DEVICE) for _ in range(2))
    integer = torch.empty(512, dtype=torch.int64, device=DEVICE)
    _of_words[(1,)](words, uniform, integer, normal, high, BLOCK=256)
    assert torch.equal(uniform, philox.to_uniform(words))
    assert torch.equal(integer, philox.to_integer(words, high))
    exact, reference = philox.to_normal(words, torch.float64), philox.to_normal(words)
    error = (normal.double() - exact).abs()
    assert bool((error <= 1e-6 * (1 + exact.abs())).all())
    assert float(error.max()) <= float((reference.double() - exact).abs().max()) + 5e-7


@pytest.mark.parametrize("repeat", [1, 4])
def test_rows_of_normals(repeat):
    tokens, key = 12 // repeat, (0xDEADBEEF, 17)
    index, slot = counters(tokens)
    draws = philox.Draws(index, slot, repeat, (0, 0), key)
    out = torch.full((12, 32), torch.nan, device=DEVICE)
    _row_normals[(1,)](
        index, slot, out, 12, *randomness.signed(key), REPEAT=repeat, ROWS=16, BLOCK=32
    )
    torch.testing.assert_close(out, draws.noise(32), rtol=1e-6, atol=1e-6)
