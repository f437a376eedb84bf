"""Philox: Random123's known answers, and the same bits from every implementation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heptapod_fast.ops.philox import philox, philox4x32, reference
from heptapod_fast.rng import Rng

# Random123, tests/kat_vectors: philox4x32 10 rounds; counter, key, answer.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, answer", KNOWN)
def test_known_answers(counter, key, answer):
    words = philox4x32(tuple(torch.tensor(word) for word in counter), key)
    assert tuple(int(word) for word in words) == answer


@pytest.mark.parametrize("counter, key, answer", [KNOWN[0]])
def test_known_answer_of_the_compiled_operator(counter, key, answer, device):
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    out = philox(zero, zero, 1, key, implementation=device)
    assert tuple(out[0].tolist()) == answer


@pytest.mark.parametrize(
    "shape, blocks",
    [
        ((), 1),
        ((1,), 1),
        ((3,), 5),
        ((7, 13), 3),
        ((1000,), 17),
        ((4097,), 4),
        ((0,), 2),
        ((5,), 0),
    ],
)
def test_compiled_bits_equal_the_reference(shape, blocks, device):
    index = torch.randint(-(2**62), 2**62, shape, device=device)
    slot = torch.randint(0, 2**32, shape, device=device)
    key = (0xDEADBEEF, 0xFFFFFFFF)
    out = philox(index, slot, blocks, key, implementation=device)
    assert out.shape == (*shape, 4 * blocks) and out.dtype == torch.int64
    assert torch.equal(out, reference(index, slot, blocks, key))


@settings(max_examples=50, deadline=None)
@given(
    index=st.integers(0, 2**63 - 1),
    slot=st.integers(0, 2**32 - 1),
    key0=st.integers(0, 2**32 - 1),
    key1=st.integers(0, 2**32 - 1),
    blocks=st.integers(1, 9),
)
def test_any_counter_and_key(index, slot, key0, key1, blocks):
    index, slot = torch.tensor([index]), torch.tensor([slot])
    out = philox(index, slot, blocks, (key0, key1))
    assert torch.equal(out, reference(index, slot, blocks, (key0, key1)))
    assert 0 <= int(out.min()) and int(out.max()) < 2**32


def test_non_contiguous_and_thread_count_do_not_matter(device):
    index = torch.arange(40_000, device=device).view(200, 200).t()
    slot = torch.ones_like(index)
    expected = philox(index.contiguous(), slot.contiguous(), 3, (1, 2), implementation=device)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(philox(index, slot, 3, (1, 2), implementation=device), expected)
    finally:
        torch.set_num_threads(threads)


def test_rng_bits_are_these_bits_and_follow_the_sample():
    rng, index = Rng(7), torch.tensor([5, 2**40 + 3, 0])
    bits = rng.bits("noise", index, 10, slot=3)
    slots = torch.full_like(index, 3)
    assert torch.equal(bits, reference(index, slots, 3, rng.key("noise"))[:, :10])
    assert torch.equal(rng.bits("noise", index.flip(0), 10, slot=3), bits.flip(0))
    both = rng.bits("noise", index[:, None], 4, slot=torch.arange(6))
    assert both.shape == (3, 6, 4)
    assert torch.equal(both[:, 3], rng.bits("noise", index, 4, slot=3))


def test_rng_draws_look_as_they_should():
    index = torch.arange(20_000)
    uniform, normal = Rng(1).uniform("u", index, 4), Rng(1).normal("n", index, 5)
    assert 0 < uniform.min() and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.005
    assert abs(normal.mean()) < 0.01 and abs(normal.std() - 1) < 0.01
    assert Rng(1).integers("i", index, 3, 10).unique().tolist() == list(range(10))
    order = Rng(1).permutation("p", index[:50], 37)
    assert torch.equal(order.sort(dim=-1).values, torch.arange(37).expand(50, 37))
    assert not torch.equal(Rng(1).bits("a", index, 4), Rng(1).bits("b", index, 4))
    assert not torch.equal(Rng(1).bits("a", index, 4), Rng(1).at(1).bits("a", index, 4))


def test_wrong_arguments_are_refused():
    index = torch.arange(3)
    with pytest.raises(ValueError, match="int64"):
        philox(index.int(), index, 1, (0, 0))
    with pytest.raises(ValueError, match="one shape"):
        philox(index, index[:2], 1, (0, 0))
    with pytest.raises(ValueError, match="32 bits"):
        philox(index, index, -1, (0, 0))
    with pytest.raises(ValueError, match="auto, cuda, cpu, reference"):
        philox(index, index, 1, (0, 0), implementation="fast")


def test_the_operator_refuses_what_it_would_misread(device):
    index = torch.arange(6, device=device)
    operator = torch.ops.heptapod_fast.philox.default
    for bad in ((index.int(), index), (index, index.int())):
        with pytest.raises(RuntimeError, match="int64 tensors only"):
            operator(*bad, 1, 1, 2)
    for bad in ((index[::2], index[:3]), (index[:3], index[::2])):
        with pytest.raises(RuntimeError, match="contiguous tensors only"):
            operator(*bad, 1, 1, 2)


def test_opcheck_and_compile(device):
    index = torch.arange(6, device=device).view(2, 3)
    torch.library.opcheck(torch.ops.heptapod_fast.philox.default, (index, index, 3, 1, 2))
    compiled = torch.compile(
        lambda i: philox(i, i, 3, (1, 2)) >> 8, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(index), reference(index, index, 3, (1, 2)) >> 8)
