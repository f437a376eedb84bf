"""attention: the definition in float64, the kernels by FlashAttention's rule, masks, refusals."""

import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from heptapod_fast.ops import (
    CAUSAL,
    FULL,
    AttentionMask,
    Ends,
    attention,
    attention_limits,
    causal_mask,
    cross_attention,
    dispatch,
    masks,
)
from heptapod_fast.ops.masks import FULL_BLOCK, HEAD_WIDTHS
from tests.numerics import DEVICE, check_compiles, check_operator, compare, needs_triton

PLAIN = ["reference", "sdpa"]
LENGTHS = (1, 63, 64, 65, 255, 256, 257, 320, 512, 514)
SAR = [min(i + 1, 31 - i, 16) for i in range(31)]


def randn(*shape, dtype=torch.float32, seed=0):
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made.to(device=DEVICE, dtype=dtype)


def leaf(*shape, dtype=torch.bfloat16, seed=0):
    return randn(*shape, dtype=dtype, seed=seed).requires_grad_()


def exact(q, k, v, visible=None):
    """Attention from its definition, one query at a time, in float64."""
    q, k, v = (x.double().cpu() for x in (q, k, v))
    out = torch.zeros_like(q)
    for b, i, h in [
        (b, i, h) for b in range(q.shape[0]) for i in range(q.shape[1]) for h in range(q.shape[2])
    ]:
        scores = k[b, :, h] @ q[b, i, h] / q.shape[-1] ** 0.5
        weight = scores.exp() if visible is None else scores.exp() * visible[b, i]
        out[b, i, h] = (weight / weight.sum()) @ v[b, :, h]
    return out


def close(found, expected):
    torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-4, atol=1e-5)


def ranges_mask(queries, keys, seed):
    """One or two random ranges of keys per query, the first never empty."""
    generator = torch.Generator().manual_seed(seed)
    ranges = torch.randint(0, keys + 1, (queries, 4), generator=generator).sort(1).values
    ranges[:, 0] = torch.minimum(ranges[:, 0], torch.tensor(keys - 1))
    ranges[:, 1] = torch.maximum(ranges[:, 1], ranges[:, 0] + 1)
    return AttentionMask.from_ranges(ranges.view(queries, 2, 2), keys).to(DEVICE)


def visible_of(kind, length):
    """full, causal, or mask: of the lengths of two streams those, otherwise random ranges."""
    if kind == "full":
        return FULL
    if kind == "causal":
        return CAUSAL
    if length in (512, 514):
        return masks.two_stream_mask(SAR, length - 512).to(DEVICE)
    return ranges_mask(length, length, 7)


# -------------------------------------------------------------------------------- the definition


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("visible", [FULL, CAUSAL])
@pytest.mark.parametrize("n", [1, 5])
def test_self_attention_is_the_definition(n, visible, implementation):
    qkv = randn(2, n, 3, 3, 8)
    dense = torch.ones(2, n, n).tril() if visible == CAUSAL else None
    close(attention(qkv, visible, implementation), exact(*qkv.unbind(2), dense))


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("n, m", [(1, 1), (1, 7), (3, 7), (4, 4)])
def test_causal_queries_are_the_last_of_the_keys(n, m, implementation):
    q, kv = randn(2, n, 3, 8), randn(2, m, 2, 3, 8, seed=1)
    dense = torch.ones(2, n, m).tril(m - n)
    close(cross_attention(q, kv, CAUSAL, implementation), exact(q, *kv.unbind(2), dense))


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("n, m", [(2, 6), (6, 2)])
def test_cross_attention_sees_all_or_up_to_its_ends(n, m, implementation):
    q, kv = randn(2, n, 3, 8), randn(2, m, 2, 3, 8, seed=1)
    close(cross_attention(q, kv, implementation=implementation), exact(q, *kv.unbind(2)))
    ends = torch.randint(1, m + 1, (2, n), generator=torch.Generator().manual_seed(0))
    dense = (torch.arange(m) < ends[..., None]).double()
    close(
        cross_attention(q, kv, Ends(ends.to(DEVICE)), implementation),
        exact(q, *kv.unbind(2), dense),
    )


@pytest.mark.parametrize("implementation", PLAIN)
def test_mask_is_the_definition(implementation):
    mask = masks.two_stream_mask([2, 3, 1]).to(DEVICE)
    qkv = randn(2, 13, 3, 2, 8)
    close(
        attention(qkv, mask, implementation),
        exact(*qkv.unbind(2), mask.dense_NM.cpu().double().expand(2, -1, -1)),
    )


@pytest.mark.parametrize("visible", [FULL, CAUSAL])
def test_gradients_by_finite_differences(visible):
    q, kv = leaf(1, 3, 2, 3, dtype=torch.float64), leaf(1, 4, 2, 2, 3, dtype=torch.float64, seed=1)
    assert torch.autograd.gradcheck(lambda q, kv: cross_attention(q, kv, visible), (q, kv))
    qkv = leaf(1, 3, 3, 2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda qkv: attention(qkv, visible), (qkv,))


@pytest.mark.parametrize("visible", [FULL, CAUSAL])
def test_sdpa_by_the_rule(visible):
    compare(
        lambda x: attention(x, visible, "sdpa"),
        lambda x: attention(x, visible, "reference"),
        (leaf(2, 32, 3, 3, 16),),
        (randn(2, 32, 3, 16, seed=1),),
    )


def test_causal_mask():
    device = torch.device("cpu")
    assert causal_mask(2, 4, device).tolist() == [[True, True, True, False], [True] * 4]
    assert causal_mask(1, 4, device) is None


# ------------------------------------------------------------------------------------- the kernels


def by_the_rule(batch, length, heads, width, visible=FULL, dtype=torch.bfloat16):
    """Self-attention, forward and backward."""
    compare(
        lambda x: attention(x, visible, "triton"),
        lambda x: attention(x, visible, "reference"),
        (leaf(batch, length, 3, heads, width, dtype=dtype),),
        (randn(batch, length, heads, width, seed=1),),
        floor=1e-5,
    )


def cross_by_the_rule(batch, queries, keys, heads, width, visible=FULL, dtype=torch.bfloat16):
    compare(
        lambda q, kv: cross_attention(q, kv, visible, "triton"),
        lambda q, kv: cross_attention(q, kv, visible, "reference"),
        (
            leaf(batch, queries, heads, width, dtype=dtype),
            leaf(batch, keys, 2, heads, width, dtype=dtype, seed=2),
        ),
        (randn(batch, queries, heads, width, seed=1),),
        floor=1e-5,
    )


SHORT = [
    (256, 64, "causal"),
    (257, 64, "full"),
    (257, 80, "full"),
    (65, 64, "full"),
    (512, 64, "mask"),
    (63, 80, "causal"),
    # Of NPP's patches of 2 x 2, 4 x 4 and 8 x 8 on a grid of 16 x 16.
    (64, 64, "causal"),
    (16, 64, "causal"),
    (4, 64, "causal"),
    (321, 64, "full"),
]


def matrix():
    """Every length and width in some kind; what is not quick costs minutes in the interpreter."""
    kinds = ("full", "causal", "mask")
    for at_width, width in enumerate(HEAD_WIDTHS):
        for at_length, length in enumerate(LENGTHS):
            for at_kind, kind in enumerate(kinds):
                quick = width == 64 or (length, kind) in (
                    (65, "full"),
                    (256, "causal"),
                    (65, "mask"),
                )
                # Of the slow ones every pair of values meets, not every three.
                is_in_turn = (at_width + at_length + at_kind) % len(kinds) == 0
                if (length, width, kind) not in SHORT and (quick or is_in_turn):
                    yield pytest.param(length, width, kind, marks=() if quick else pytest.mark.slow)


@needs_triton
@pytest.mark.parametrize("length, width, kind", SHORT)
def test_kernels_by_the_rule(length, width, kind):
    by_the_rule(
        1 if length > 65 else 2, length, 1 if length > 257 else 2, width, visible_of(kind, length)
    )


@needs_triton
@pytest.mark.parametrize("length, width, kind", list(matrix()))
def test_every_length_and_width_by_the_rule(length, width, kind):
    """Of one sequence and one head, for time; several are above."""
    by_the_rule(1, length, 1, width, visible_of(kind, length))


@needs_triton
@pytest.mark.parametrize(
    "length, width, kind", [(257, 80, "full"), (65, 64, "causal"), (130, 64, "mask")]
)
def test_half_precision_by_the_rule(length, width, kind):
    by_the_rule(1, length, 2, width, visible_of(kind, length), torch.float16)


@needs_triton
@pytest.mark.parametrize(
    "mask",
    [
        masks.prefix_mask(130, 70),
        masks.chunk_mask(200, 48),
        masks.chunk_mask(256, 64),
        masks.group_mask([1, 100, 7, 60]),
        masks.two_stream_mask([60, 9, 30]),
        # SAR's on 16 x 16, with the class: 512 elements of next-neighbor, 453 of next-layer, 497
        # and 256 of next-row.
        masks.two_stream_mask(SAR, 1, has_last_context=False),
        masks.two_stream_mask([8 * ring + 4 for ring in range(8)], 1, has_last_context=False),
        masks.two_stream_mask([16] * 16, 1, has_last_context=False),
        masks.group_mask([16] * 16),
        AttentionMask(torch.eye(4).int().flip(0) * 2, torch.zeros(256, 2, 2).int(), 256),
    ],
    ids=[
        "prefix",
        "chunk 48",
        "chunk 64",
        "groups",
        "two streams",
        "next-neighbor",
        "next-layer",
        "next-row",
        "next-row, one stream",
        "antidiagonal",
    ],
)
def test_masks_by_the_rule(mask):
    by_the_rule(1, mask.num_queries, 2, 32, mask.to(DEVICE))


@needs_triton
@settings(max_examples=12)
@given(
    n=st.integers(1, 200),
    m=st.integers(1, 200),
    seed=st.integers(0, 2**32),
    width=st.sampled_from(HEAD_WIDTHS),
)
def test_random_block_masks_by_the_rule(n, m, seed, width):
    """Random flags of 64 x 64 blocks over random ranges; rectangular."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 3, (-(-n // 64), -(-m // 64)), generator=generator)
    column = torch.randint(0, blocks.shape[1], (blocks.shape[0],), generator=generator)
    blocks[torch.arange(len(blocks)), column] = FULL_BLOCK
    mask = AttentionMask(blocks, ranges_mask(n, m, seed).ranges_N22.cpu(), m).to(DEVICE)
    cross_by_the_rule(1, n, m, 1, width, mask)


TILES = [
    ("forward", dict(BLOCK_Q=128, BLOCK_K=64, STAGES=2, num_warps=8)),
    ("backward", dict(BLOCK_K=64, BLOCK_Q=64, STAGES=2, num_warps=4)),
    ("backward", dict(BLOCK_K=64, BLOCK_Q=32, STAGES=2, num_warps=4)),
    ("backward", dict(BLOCK_K=128, BLOCK_Q=64, STAGES=2, num_warps=8, SWAP=True)),
    ("backward", dict(BLOCK_K=128, BLOCK_Q=32, STAGES=2, num_warps=8, SWAP=False)),
]


@needs_triton
@pytest.mark.parametrize("direction, config", TILES)
@pytest.mark.parametrize("length, kind", [(200, "mask"), (130, "causal"), (129, "full")])
def test_every_tile_that_tuning_may_choose_by_the_rule(
    monkeypatch, direction, config, length, kind
):
    from heptapod_fast.kernels import tuning

    lookup = tuning.lookup
    monkeypatch.setattr(
        tuning,
        "lookup",
        lambda operation, kernel, *rest: (
            config if kernel.startswith(direction) else lookup(operation, kernel, *rest)
        ),
    )
    chunks = masks.chunk_mask(length, 40).to(DEVICE)
    by_the_rule(1, length, 1, 32, chunks if kind == "mask" else visible_of(kind, length))


@needs_triton
@pytest.mark.parametrize(
    "queries, keys, width",
    [(1, 1, 64), (1, 257, 80), (16, 100, 64), (70, 257, 64), (256, 256, 32), (130, 40, 96)],
)
def test_cross_by_the_rule(queries, keys, width):
    cross_by_the_rule(2, queries, keys, 2, width)
    ends = torch.randint(1, keys + 1, (2, queries), generator=torch.Generator().manual_seed(0))
    cross_by_the_rule(2, queries, keys, 2, width, Ends(ends.to(DEVICE)))


@needs_triton
@pytest.mark.parametrize("queries, keys", [(1, 5), (1, 257), (3, 64), (5, 66), (100, 333)])
def test_causal_decoding_by_the_rule(queries, keys):
    cross_by_the_rule(2, queries, keys, 2, 64, CAUSAL)


@needs_triton
@pytest.mark.parametrize("batch, length", [(6, 4), (64, 1), (7, 9), (3, 32), (4, 17), (5, 33)])
def test_short_sequences_share_tiles_by_the_rule(batch, length):
    by_the_rule(batch, length, 2, 32)


@needs_triton
def test_a_cache_is_read_in_place():
    """q out of a packed projection, keys and values out of a longer buffer full of NaN."""
    qkv, buffer = randn(2, 3, 3, 2, 64, dtype=torch.bfloat16), randn(2, 90, 2, 2, 64, seed=1)
    buffer = buffer.to(torch.bfloat16)
    buffer[:, 70:] = float("nan")
    arguments = qkv[:, :, 0], buffer[:, :70]
    found = cross_attention(*arguments, CAUSAL, "triton")
    expected = cross_attention(*arguments, CAUSAL, "reference")
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@needs_triton
@pytest.mark.parametrize("length", [60, 65, 256])
def test_extreme_scores_stay_finite(length):
    """One key outweighs all others by hundreds; another run of queries sees equal scores."""
    qkv = randn(1, length, 3, 1, 64)
    qkv[:, :, :2] *= 20
    qkv[:, : length // 2, 0] = 0
    qkv = qkv.to(torch.bfloat16).requires_grad_()
    compare(
        lambda x: attention(x, implementation="triton"),
        lambda x: attention(x, implementation="reference"),
        (qkv,),
        (randn(1, length, 1, 64, seed=1),),
    )


@needs_triton
@pytest.mark.parametrize("kind", ["full", "mask", "cross"])
def test_gradients_do_not_leak_between_queries_and_keys_that_do_not_meet(kind):
    """Against the definition of visibility itself: a key's gradient is zero where nobody looks."""
    length = 130
    visible = FULL if kind == "full" else masks.chunk_mask(length, 50).to(DEVICE)
    qkv = leaf(1, length, 3, 1, 64)
    if kind == "cross":
        out = cross_attention(qkv[:, :, 0], qkv[:, :, 1:], visible, "triton")
    else:
        out = attention(qkv, visible, "triton")
    (grad,) = torch.autograd.grad(out[:, 60].float().sum(), qkv)
    touched = grad[0, :, 1:].abs().amax((1, 2, 3)) > 0
    seen = torch.ones(length, dtype=torch.bool)
    if kind != "full":
        seen = visible.dense_NM[60].cpu()
    assert torch.equal(touched.cpu(), seen)
    assert (grad[0, :, 0].abs().amax((1, 2)) > 0).nonzero().flatten().tolist() == [60]


# ------------------------------------------------------------------------------------ the operator


def operator_arguments(kind):
    mask = ranges_mask(70, 70, 0) if kind == "mask" else None
    return (
        kind == "causal",
        0,
        *((None,) * 3 if mask is None else (mask.schedule, mask.row_bits, mask.key_bits)),
    )


@needs_triton
@pytest.mark.parametrize("kind", ["full", "causal", "mask"])
def test_operators_are_registered_right(kind):
    ops, rest = torch.ops.heptapod_fast, operator_arguments(kind)
    qkv = leaf(2, 70, 3, 2, 32)
    check_operator(ops.attention.default, qkv, *rest)
    out, lse = (x.detach() for x in ops.attention(qkv, *rest))
    check_operator(
        ops.attention_backward.default,
        randn(*out.shape, dtype=out.dtype),
        qkv.detach(),
        out,
        lse,
        *rest,
    )
    q, kv, rest = leaf(2, 70, 2, 32), leaf(2, 70, 2, 2, 32, seed=1), (rest[0], None, *rest[2:])
    check_operator(ops.cross_attention.default, q, kv, *rest)
    check_operator(
        ops.cross_attention_backward.default,
        randn(*out.shape, dtype=out.dtype),
        q.detach(),
        kv.detach(),
        out,
        lse,
        *rest,
    )


@needs_triton
@pytest.mark.parametrize("implementation", ["triton", "reference", "sdpa"])
def test_compiles_in_one_graph(implementation):
    mask = ranges_mask(40, 40, 0)
    ends = Ends(torch.full((2, 40), 7, device=DEVICE))

    def function(qkv):
        x = attention(qkv, CAUSAL, implementation)
        y = attention(qkv, mask, implementation)
        z = cross_attention(x.contiguous(), qkv[:, :, 1:], ends, implementation)
        return x + y + z

    check_compiles(function, (leaf(2, 40, 3, 2, 32),), (randn(2, 40, 2, 32),))


@needs_triton
def test_a_second_derivative_is_refused():
    qkv = leaf(1, 5, 3, 1, 32)
    out = attention(qkv, implementation="triton")
    (grad,) = torch.autograd.grad(out.float().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.float().sum().backward()


@needs_triton
def test_nothing_to_do_and_no_gradient_wanted():
    empty = randn(0, 5, 3, 2, 32, dtype=torch.bfloat16)
    assert attention(empty, implementation="triton").shape == (0, 5, 2, 32)
    qkv = leaf(1, 9, 3, 2, 32)
    with torch.no_grad():
        assert not attention(qkv, implementation="triton").requires_grad


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(qkv=randn(2, 5, 2, 3, 8)), r"takes qkv \(B, N, 3, H, E\), contiguous .*\(2, 5, 2, 3"),
        (dict(qkv=randn(2, 3, 5, 3, 8).transpose(1, 2)), r"got \(2, 5, 3, 3, 8\) with strides"),
        (dict(qkv=randn(2, 5, 3, 3, 8).long()), "floating-point tensors, got torch.int64"),
        (dict(qkv=randn(2, 0, 3, 3, 8)), "at least one query and one key"),
        (
            dict(qkv=randn(2, 5, 3, 3, 8), visible=Ends(torch.ones(2, 5).long())),
            "Ends are for cross_attention",
        ),
        (
            dict(qkv=randn(2, 6, 3, 3, 8), visible=masks.prefix_mask(5, 1).to(DEVICE)),
            "mask is for 5 queries and 5 keys, the tensors have 6 and 6",
        ),
        (
            dict(qkv=randn(2, 5, 3, 3, 8), visible=masks.prefix_mask(5, 1).to("meta")),
            r"mask is on meta, .* use mask.to\(device\)",
        ),
        (
            dict(qkv=randn(2, 5, 3, 3, 8), visible=torch.ones(5, 5).bool()),
            r"an AttentionMask .*, got Tensor: AttentionMask.from_dense\(booleans\) makes one",
        ),
        (dict(qkv=randn(2, 5, 3, 3, 8), visible=None), "FULL, CAUSAL, Ends or an .* got NoneType"),
        (
            dict(qkv=randn(2, 5, 3, 3, 8), implementation="cuda"),
            "no implementation 'cuda'; there are: auto, triton, flash, sdpa, reference",
        ),
    ],
)
def test_bad_input_says_what_is_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        attention(**arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(kv=randn(2, 7, 3, 3, 8)), r"takes q \(B, N, H, E\) and kv \(B, M, 2, H, E\)"),
        (dict(kv=randn(3, 7, 2, 3, 8)), r"kv \(B, M, 2, H, E\)"),
        (dict(kv=randn(2, 7, 2, 8, 3).transpose(3, 4)), "heads and their widths contiguous"),
        (dict(kv=randn(2, 7, 2, 3, 8, dtype=torch.float64)), "of one dtype on one device"),
        (dict(kv=randn(2, 4, 2, 3, 8), visible=CAUSAL), "as many queries as keys, got 5 queries"),
        (dict(visible=Ends(torch.ones(2, 4).long())), r"ends \(2, 5\) of int32 or int64"),
        (dict(visible=Ends(torch.ones(2, 5))), r"int64 on \w+, got torch.float32"),
        (dict(visible=Ends(torch.ones(2, 5).bool())), r"int64 on \w+, got torch.bool"),
    ],
)
def test_bad_cross_input_says_what_is_expected(change, message):
    arguments = dict(q=randn(2, 5, 3, 8), kv=randn(2, 7, 2, 3, 8)) | change
    with pytest.raises(ValueError, match=message):
        cross_attention(**arguments)


@pytest.mark.parametrize(
    "shape, dtype, why",
    [
        ((1, 5, 3, 2, 48), torch.bfloat16, "heads are 48 wide, there are kernels for 32, 64, 80"),
        ((1, 1025, 3, 1, 32), torch.bfloat16, "1025 keys, at most 1024 fit"),
        ((1, 5, 3, 1, 32), torch.float32, "bfloat16 and torch.float16, these are torch.float32"),
    ],
)
@needs_triton
def test_what_the_kernels_cannot_take_is_refused_or_left_to_others(shape, dtype, why):
    qkv = randn(*shape, dtype=dtype)
    with pytest.raises(dispatch.Unavailable, match=why):
        attention(qkv, implementation="triton")
    torch.testing.assert_close(
        attention(qkv), attention(qkv, implementation="reference"), rtol=0.02, atol=0.02
    )


def test_the_next_implementation_takes_over_and_says_so(monkeypatch):
    """As on a GPU, where the kernels come first."""
    first = {"triton": (lambda *_: None, lambda *_: None)}
    monkeypatch.setitem(
        dispatch._registry,
        "attention",
        first
        | {
            name: entry
            for name, entry in dispatch._registry["attention"].items()
            if name != "triton"
        },
    )
    monkeypatch.setattr(dispatch, "_told", set())
    with pytest.warns(
        UserWarning,
        match="'triton' cannot take these tensors: heads are 48 wide, .*reference runs instead",
    ):
        attention(torch.zeros(1, 5, 3, 2, 48))
    limits = attention_limits(48, 5, Ends)
    choice = dispatch.choose("attention", "cpu", torch.float32, unsupported=limits)
    assert choice.implementation == "reference" and "heads are 48 wide" in choice.reason
    with pytest.raises(dispatch.Unavailable, match="'triton' was asked for .* heads are 48 wide"):
        dispatch.choose("attention", "cpu", torch.float32, "triton", limits)


@pytest.mark.parametrize("visible", [FULL, CAUSAL])
def test_flash_is_called_causal_and_deterministic(monkeypatch, visible):
    calls = []

    def stand_in(*tensors, **options):
        calls.append(options)
        return tensors[0][:, :, 0] if len(tensors) == 1 else tensors[0]

    package = types.ModuleType("flash_attn")
    package.flash_attn_qkvpacked_func = package.flash_attn_kvpacked_func = stand_in
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(
        dispatch._registry["attention"], "flash", (lambda *_: None, lambda *_: None)
    )
    qkv = randn(1, 5, 3, 2, 32, dtype=torch.bfloat16)
    attention(qkv, visible, "flash")
    cross_attention(qkv[:, :, 0], qkv[:, :, 1:], visible, "flash")
    assert calls == [dict(causal=visible == CAUSAL, deterministic=True)] * 2
    ends = Ends(torch.ones(1, 5, device=DEVICE).long())
    for refused in (
        lambda: attention(qkv, masks.prefix_mask(5, 1).to(DEVICE), "flash"),
        lambda: cross_attention(qkv[:, :, 0], qkv[:, :, 1:], ends, "flash"),
    ):
        with pytest.raises(dispatch.Unavailable, match="it has no such mask; use triton, sdpa"):
            refused()


@needs_triton
def test_forward_mode_is_refused_or_left_to_the_reference():
    qkv = randn(1, 5, 3, 2, 32, dtype=torch.bfloat16)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(qkv, torch.ones_like(qkv))
        with pytest.raises(dispatch.Unavailable, match="no forward-mode derivatives"):
            attention(dual, implementation="triton")
        assert forward_ad.unpack_dual(attention(dual)).tangent.norm() > 0


def test_flash_says_what_to_install():
    with pytest.raises(dispatch.Unavailable, match="pip install flash-attn"):
        attention(randn(1, 5, 3, 2, 32, dtype=torch.bfloat16), implementation="flash")
