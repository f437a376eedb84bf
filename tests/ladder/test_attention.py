"""Attention as a ladder of four small kernels, from the formula to the idea of the real ones.

    step                     the idea that it adds
    (a) one_query_kernel     the formula: a program for each query, two passes over the keys
    (b) query_block_kernel   a block of queries shares its keys, with matrix products; the online
                             softmax needs one pass
    (c) causal_kernel        blocks of keys that no query of the block sees are skipped; the
                             log-sum-exp is stored
    (d) backward_kernel      gradients: the probabilities are computed again from the log-sum-exp, a
                             program for each block of keys

Where the same idea is in the real kernels:

    (a) the formula          kernels/attention.py, _attend_last_query: one query, on CUDA cores
    (b) online softmax       kernels/attention.py, _attend_query_block, phases 2, 4 and 5
    (c) skipped blocks       the same, phase 3; _hide_unseen
    (d) gradients            kernels/attention_backward.py, attention_backward_kernel, phases 2 to 5

And what the real kernels add:

- Heads that are 80 or 96 wide. A Triton tile has a power of two columns, and so have the heads
  here; the real kernels take two tiles, 64 + 16 or 64 + 32 (E0 and E1).
- The tail. With 257 elements a tile for the last one would be almost empty, so it is computed
  separately (_attend_last_query, _compute_tail).
- Block-sparse masks. A schedule says which blocks to visit, and one bit for each pair of a query
  and a key says whether it is seen.
- Short sequences that share a tile, and an end of its own for each query.
- Strides. q, k and v are read where the projection wrote them, and not copied first.
- Base 2, bfloat16 and float16, and loads that run ahead of the computation (num_stages).
- Backward in one launch. It computes delta too, and one program has all blocks of keys of a head,
  so that it can add up dQ in its output. Step (d) adds with atomics, whose order, and so the last
  bits of dQ, change from run to run.

Here everything is float32, so that the results agree closely with the reference. On a GPU
input_precision="ieee" keeps a product from rounding its factors. docs/kernels/attention.md walks
through these steps.
"""

import pytest
import torch

from heptapod_fast.ops import CAUSAL, FULL, attention
from tests.numerics import DEVICE

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

WIDTH = 16
BLOCKS = dict(BLOCK_Q=16, BLOCK_K=32)


# ------------------------------------------------------------------------------- (a) the formula


@triton.jit
def one_query_kernel(
    q_ptr,  # (heads, length, E), and so are the next three
    k_ptr,
    v_ptr,
    out_ptr,
    length,
    scale,  # 1 / sqrt(E)
    E: tl.constexpr,
):
    """A program for each query of each head."""
    query = tl.program_id(0)
    head_start = tl.program_id(1) * length * E
    column = tl.arange(0, E)
    q = tl.load(q_ptr + head_start + query * E + column)  # [E]

    # Pass 1: the largest score. exp(score) is infinite from a score of 89 on; exp(score - largest)
    # is at most 1, and the softmax is the same.
    largest = float("-inf")
    for key in range(length):
        k = tl.load(k_ptr + head_start + key * E + column)  # [E]
        score = tl.sum(q * k) * scale
        largest = tl.maximum(largest, score)

    # Pass 2: the weights, their sum, and the sum of weight * value.
    weight_sum = 0.0
    acc = tl.zeros((E,), tl.float32)
    for key in range(length):
        k = tl.load(k_ptr + head_start + key * E + column)  # [E]
        v = tl.load(v_ptr + head_start + key * E + column)  # [E]
        score = tl.sum(q * k) * scale
        weight = tl.exp(score - largest)
        weight_sum += weight
        acc += weight * v
    tl.store(out_ptr + head_start + query * E + column, acc / weight_sum)


# ----------------------------------------------------- (b) blocks of queries, the online softmax


@triton.jit
def query_block_kernel(
    q_ptr,  # (heads, length, E), and so are the next three
    k_ptr,
    v_ptr,
    out_ptr,
    length,
    scale,  # 1 / sqrt(E)
    E: tl.constexpr,
    BLOCK_Q: tl.constexpr,  # queries of a program
    BLOCK_K: tl.constexpr,  # keys of a step
):
    """A program for each block of queries: a key is loaded once for all of them, and the scores are
    a matrix product.

    One pass is enough. When a block of keys has a larger score than all before, what was summed so
    far is too large by exp(new largest - old largest), the same factor for every term: so the sums
    are corrected, not computed again.
    """
    head_start = tl.program_id(1) * length * E
    column = tl.arange(0, E)
    query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    query_exists = (query < length)[:, None]
    query_offset = head_start + query[:, None] * E + column[None, :]  # [BLOCK_Q, E]
    q = tl.load(q_ptr + query_offset, mask=query_exists, other=0.0)  # [BLOCK_Q, E]

    # For each query, over the keys so far: the largest score, the sum of weights, and the sum of
    # weight * value.
    running_max = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, E), tl.float32)
    for first_key in range(0, length, BLOCK_K):
        key = first_key + tl.arange(0, BLOCK_K)
        key_exists = (key < length)[:, None]
        key_offset = head_start + key[:, None] * E + column[None, :]  # [BLOCK_K, E]
        k = tl.load(k_ptr + key_offset, mask=key_exists, other=0.0)  # [BLOCK_K, E]
        v = tl.load(v_ptr + key_offset, mask=key_exists, other=0.0)  # [BLOCK_K, E]
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [BLOCK_Q, BLOCK_K]
        scores = tl.where((key < length)[None, :], scores, float("-inf"))

        new_max = tl.maximum(running_max, tl.max(scores, 1))  # [BLOCK_Q]
        rescale = tl.exp(running_max - new_max)  # [BLOCK_Q]
        weights = tl.exp(scores - new_max[:, None])  # [BLOCK_Q, BLOCK_K]
        running_sum = running_sum * rescale + tl.sum(weights, 1)
        acc = acc * rescale[:, None] + tl.dot(weights, v, input_precision="ieee")
        running_max = new_max
    out = acc / running_sum[:, None]
    tl.store(out_ptr + query_offset, out, mask=query_exists)


# ---------------------------------------------------------------- (c) causal: blocks are skipped


@triton.jit
def causal_kernel(
    q_ptr,  # (heads, length, E), and so are the next three
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,  # (heads, length)
    length,
    scale,  # 1 / sqrt(E)
    E: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """As (b), for queries that see no key after them. What is new is marked."""
    head = tl.program_id(1)
    head_start = head * length * E
    column = tl.arange(0, E)
    query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    query_exists = (query < length)[:, None]
    query_offset = head_start + query[:, None] * E + column[None, :]
    q = tl.load(q_ptr + query_offset, mask=query_exists, other=0.0)

    running_max = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, E), tl.float32)
    # New: the last query of the block sees the most. No key after it is loaded.
    end = tl.minimum(length, (tl.program_id(0) + 1) * BLOCK_Q)
    for first_key in range(0, end, BLOCK_K):
        key = first_key + tl.arange(0, BLOCK_K)
        key_exists = (key < end)[:, None]
        key_offset = head_start + key[:, None] * E + column[None, :]
        k = tl.load(k_ptr + key_offset, mask=key_exists, other=0.0)
        v = tl.load(v_ptr + key_offset, mask=key_exists, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        # New: within a block each query sees its own part of the keys.
        scores = tl.where(key[None, :] <= query[:, None], scores, float("-inf"))

        new_max = tl.maximum(running_max, tl.max(scores, 1))
        rescale = tl.exp(running_max - new_max)
        weights = tl.exp(scores - new_max[:, None])
        running_sum = running_sum * rescale + tl.sum(weights, 1)
        acc = acc * rescale[:, None] + tl.dot(weights, v, input_precision="ieee")
        running_max = new_max
    out = acc / running_sum[:, None]
    tl.store(out_ptr + query_offset, out, mask=query_exists)
    # New: log(sum of exp(score)). With it exp(score - lse) is a probability, without a sum.
    lse = running_max + tl.log(running_sum)
    tl.store(lse_ptr + head * length + query, lse, mask=query < length)


# ---------------------------------------------------------------------------------- (d) backward


@triton.jit
def backward_kernel(
    q_ptr,  # (heads, length, E), and so are the next three
    k_ptr,
    v_ptr,
    grad_ptr,  # dO, the gradient of the output
    lse_ptr,  # (heads, length)
    delta_ptr,  # (heads, length): rowsum(dO O)
    dq_ptr,  # (heads, length, E), zeros at the start
    dk_ptr,  # (heads, length, E)
    dv_ptr,  # (heads, length, E)
    length,
    scale,  # 1 / sqrt(E)
    E: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program for each block of keys, causal.

    dK and dV are sums over queries and stay here, in registers. dQ is a sum over keys, and so over
    programs: each adds its part to memory.
    """
    head = tl.program_id(1)
    head_start = head * length * E
    column = tl.arange(0, E)
    first_key = tl.program_id(0) * BLOCK_K
    key = first_key + tl.arange(0, BLOCK_K)
    key_exists = (key < length)[:, None]
    key_offset = head_start + key[:, None] * E + column[None, :]  # [BLOCK_K, E]
    k = tl.load(k_ptr + key_offset, mask=key_exists, other=0.0)  # [BLOCK_K, E]
    v = tl.load(v_ptr + key_offset, mask=key_exists, other=0.0)  # [BLOCK_K, E]
    dk = tl.zeros((BLOCK_K, E), tl.float32)
    dv = tl.zeros((BLOCK_K, E), tl.float32)

    # No query before the first key sees any of these keys.
    begin = first_key // BLOCK_Q * BLOCK_Q
    for first_query in range(begin, length, BLOCK_Q):
        query = first_query + tl.arange(0, BLOCK_Q)
        query_exists = (query < length)[:, None]
        query_offset = head_start + query[:, None] * E + column[None, :]  # [BLOCK_Q, E]
        q = tl.load(q_ptr + query_offset, mask=query_exists, other=0.0)  # [BLOCK_Q, E]
        grad = tl.load(grad_ptr + query_offset, mask=query_exists, other=0.0)  # [BLOCK_Q, E]
        lse = tl.load(lse_ptr + head * length + query, mask=query < length, other=0.0)
        delta = tl.load(delta_ptr + head * length + query, mask=query < length, other=0.0)

        # P, as the forward pass had it.
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [BLOCK_Q, BLOCK_K]
        is_seen = key[None, :] <= query[:, None]
        p = tl.exp(tl.where(is_seen, scores - lse[:, None], float("-inf")))  # [BLOCK_Q, BLOCK_K]
        # O = P V, so dV = P^T dO and dP = dO V^T.
        dv += tl.dot(tl.trans(p), grad, input_precision="ieee")
        dp = tl.dot(grad, tl.trans(v), input_precision="ieee")  # [BLOCK_Q, BLOCK_K]
        # Through the softmax.
        ds = p * (dp - delta[:, None])  # [BLOCK_Q, BLOCK_K]
        # S = scale * Q K^T, so dK = scale * dS^T Q and dQ = scale * dS K.
        dk += tl.dot(tl.trans(ds), q, input_precision="ieee") * scale
        dq = tl.dot(ds, k, input_precision="ieee") * scale  # [BLOCK_Q, E]
        tl.atomic_add(dq_ptr + query_offset, dq, mask=query_exists)
    tl.store(dk_ptr + key_offset, dk, mask=key_exists)
    tl.store(dv_ptr + key_offset, dv, mask=key_exists)


# ------------------------------------------------------------------------------------- launchers


def heads_first(x):
    """(B, N, H, E) -> (B * H, N, E) contiguous, as the kernels take it."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()


def heads_back(x, batch):
    """(B * H, N, E) -> (B, N, H, E)."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def unwritten(*shape):
    """NaN, so that what a kernel forgets to write is found."""
    return torch.full(shape, float("nan"), device=DEVICE)


def launch_one_query(qkv):
    """Step (a) on qkv (B, N, 3, H, E) -> (B, N, H, E)."""
    q, k, v = (heads_first(x) for x in qkv.unbind(2))
    heads, length, width = q.shape
    out = unwritten(heads, length, width)
    one_query_kernel[(length, heads)](q, k, v, out, length, width**-0.5, E=width)
    return heads_back(out, len(qkv))


def launch_query_block(qkv):
    """Step (b) on qkv (B, N, 3, H, E) -> (B, N, H, E)."""
    q, k, v = (heads_first(x) for x in qkv.unbind(2))
    heads, length, width = q.shape
    out = unwritten(heads, length, width)
    grid = (triton.cdiv(length, BLOCKS["BLOCK_Q"]), heads)
    query_block_kernel[grid](q, k, v, out, length, width**-0.5, E=width, **BLOCKS)
    return heads_back(out, len(qkv))


def launch_causal(qkv):
    """Step (c) on qkv (B, N, 3, H, E) -> out (B, N, H, E), lse (B * H, N)."""
    q, k, v = (heads_first(x) for x in qkv.unbind(2))
    heads, length, width = q.shape
    out, lse = unwritten(heads, length, width), unwritten(heads, length)
    grid = (triton.cdiv(length, BLOCKS["BLOCK_Q"]), heads)
    causal_kernel[grid](q, k, v, out, lse, length, width**-0.5, E=width, **BLOCKS)
    return heads_back(out, len(qkv)), lse


def launch_backward(qkv, grad):
    """Steps (c) and (d): the gradient of qkv, given that of the output (B, N, H, E)."""
    q, k, v = (heads_first(x) for x in qkv.unbind(2))
    heads, length, width = q.shape
    out, lse = launch_causal(qkv)
    # Through the softmax dS = P (dP - rowsum(P dP)). And rowsum(P dP) = rowsum(dO O): a number for
    # each query that needs no P.
    delta = heads_first((grad * out).sum(-1, keepdim=True))
    dq, dk, dv = torch.zeros_like(q), torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)
    grid = (triton.cdiv(length, BLOCKS["BLOCK_K"]), heads)
    backward_kernel[grid](
        q,
        k,
        v,
        heads_first(grad),
        lse,
        delta,
        dq,
        dk,
        dv,
        length,
        width**-0.5,
        E=width,
        **BLOCKS,
    )
    return torch.stack([heads_back(x, len(qkv)) for x in (dq, dk, dv)], dim=2)


# ----------------------------------------------------------------------------------------- tests

STEPS = [
    pytest.param(launch_one_query, FULL, id="one query"),
    pytest.param(launch_query_block, FULL, id="query block"),
    pytest.param(lambda qkv: launch_causal(qkv)[0], CAUSAL, id="causal"),
]


def random_qkv(length):
    """(1, N, 3, 2, WIDTH): one sequence, two heads."""
    return torch.randn(1, length, 3, 2, WIDTH, device=DEVICE)


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("launch, visible", STEPS)
@pytest.mark.parametrize("length", [1, 16, 40])
def test_step_is_attention(launch, visible, length):
    """One element, blocks that are filled, and blocks that are not."""
    qkv = random_qkv(length)
    assert_close(launch(qkv), attention(qkv, visible, "reference"))


@pytest.mark.parametrize("launch, visible", STEPS)
def test_large_scores_stay_finite(launch, visible):
    """Scores of hundreds, whose exp is infinite in float32."""
    qkv = random_qkv(20)
    qkv[:, :, :2] *= 10
    found = launch(qkv)
    expected = attention(qkv, visible, "reference")
    # A product of E terms is off by a rounding of each at most; an error of a score is a relative
    # one of its probability, and both sides have it.
    q, k, v = qkv.unbind(2)
    largest_score = torch.einsum("bnhe,bmhe->bhnm", q.abs(), k.abs()).max() / qkv.shape[-1] ** 0.5
    score_error = qkv.shape[-1] * torch.finfo(torch.float32).eps * float(largest_score)
    bound = 2 * 2 * score_error * float(v.abs().max())
    assert bound < 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


def test_causal_skips_the_blocks_that_nobody_sees():
    """NaN in later blocks would reach the first ones if anything were computed with it."""
    qkv = random_qkv(64)
    seen = BLOCKS["BLOCK_Q"]
    qkv[:, seen:] = float("nan")
    out, _ = launch_causal(qkv)
    expected = attention(qkv[:, :seen].contiguous(), CAUSAL, "reference")
    assert_close(out[:, :seen], expected)


@pytest.mark.parametrize("length", [1, 16, 40])
def test_backward_is_the_gradient(length):
    qkv = random_qkv(length).requires_grad_()
    out = attention(qkv, CAUSAL, "reference")
    grad = torch.randn_like(out)
    (expected,) = torch.autograd.grad(out, qkv, grad)
    assert_close(launch_backward(qkv.detach(), grad), expected)
