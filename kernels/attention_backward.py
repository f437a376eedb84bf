"""The backward pass of attention. `heptapod_fast.ops.attention` says what it computes,
docs/kernels/attention.md leads from the formula to this kernel, docs/attention.md says why it is
built this way.

One launch, one program for each sequence and head. For each pair of a block of keys and a block of
queries it computes five products. The tiles have a row for each key and a column for each query,
which is what T (transposed) says:

    S^T  = K Q^T       P^T  = exp2(S^T - lse)          scores in base 2, as in the forward pass
    dP^T = V dO^T      dS^T = P^T (dP^T - delta)       delta = rowsum(dO O), a number for each query
    dV  += P^T dO      dK  += dS^T Q      dQ += dS K   dK and dQ are multiplied with 1 / sqrt(E)

The outer loop goes through the blocks of keys, the last one first. It keeps dK and dV of the block
in registers. The inner loop goes through the blocks of queries. Tensor cores can take the first
factor of a product from registers: P^T and dS^T are there already when dV and dK need them.

Every block of keys adds to dQ. It is added up in its output, which rounds it once for each block of
keys (two at 256 elements). All additions to one dQ are made by one program, always in the same
order, so the results repeat bit for bit. There are no atomics, and no copy of dQ in float32. But
the thread that loads a part of dQ is not the one that stored it: hence a barrier after each block
of keys.

TAIL: with one element more than a multiple of 64 (a class token), tiles for the last element would
be almost empty. Everything about the last key and the last query is computed before the first block
of keys, on CUDA cores. Only what the last query adds to dK and dV of the other keys has to wait
until these are in registers; until then it is two vectors in memory.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from heptapod_fast.kernels import tuning
from heptapod_fast.kernels.attention import (
    BITS_PER_WORD,
    BLOCKS,
    CAUSAL,
    CHUNK,
    ENDS,
    FULL,
    MASK_BLOCK,
    SCHEDULE_ROW,
    constants,
    kind_of,
    load_float_tile,
    load_tile,
    load_vector,
    store_tile,
    variant,
)
from heptapod_fast.ops.masks import BLOCK, Operands

# ------------------------------------------------------------------------- loading and storing


@triton.jit
def _add_to_dq(
    dq_ptr,  # of query 0, column 0
    query,  # [BLOCK_Q]
    column,  # [columns]
    row_stride,  # values from one query to the next
    queries,  # queries from here on do not exist
    value,  # [BLOCK_Q, columns] float32
    is_written,  # boolean: whether there is something to add to; if not, the memory is undefined
    ALWAYS: tl.constexpr,  # whether is_written is true for all blocks of queries
    EVEN: tl.constexpr,  # whether all queries exist
):
    """Adds to dQ, or begins it.

    With masks and without branches: a branch around a load or store of an accumulator crashes the
    compiler of Triton 3.6 on sm_90.
    """
    address = dq_ptr + query[:, None] * row_stride + column[None, :]
    if EVEN and ALWAYS:
        before = tl.load(address)
    elif EVEN:
        before = tl.load(address, mask=is_written, other=0.0)
    else:
        before = tl.load(address, mask=(query < queries)[:, None] & is_written, other=0.0)
    total = before.to(tl.float32) + value
    store_tile(dq_ptr, query, column, row_stride, queries, total, EVEN)


@triton.jit
def _load_per_query(
    ptr,  # of query 0
    query,  # [BLOCK_Q]
    queries,  # queries from here on do not exist
    EVEN: tl.constexpr,  # whether all queries exist
):
    """[BLOCK_Q]: one number for each query, zero for those that do not exist.

    The numbers are loaded as a tile, [BLOCK_Q, 1], and summed over its only column. The sum leaves
    them where the load put them. A vector that is loaded as [BLOCK_Q] would be copied once for each
    thread that needs it (Triton 3.6).
    """
    address = (ptr + query)[:, None]
    if EVEN:
        column = tl.load(address)
    else:
        column = tl.load(address, mask=(query < queries)[:, None], other=0)
    return tl.sum(column, axis=1)


@triton.jit
def _store_keys(
    # Of this sequence and head.
    last_q_ptr,  # the last query: [E]; read where TAIL
    last_grad_ptr,  # dO of the last query: [E]; read where TAIL
    dk_ptr,
    dv_ptr,
    last_p_ptr,  # P of the last query for each key, float32; read where TAIL
    span,  # values from there to the last query's dS for each key
    key,  # [BLOCK_K]
    column,  # [columns]
    row_stride,  # values from one key's gradient to the next
    keys,  # keys from here on do not exist
    dk,  # [BLOCK_K, columns] float32, without the scale
    dv,  # [BLOCK_K, columns] float32
    scale,  # 1 / sqrt(E)
    TAIL: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Stores some columns of dK and dV of a block of keys; with a TAIL, after adding what the last
    query contributes."""
    if TAIL:
        p = tl.load(last_p_ptr + key, mask=(key < keys) | EVEN, other=0.0)  # [BLOCK_K]
        dv += p[:, None] * load_vector(last_grad_ptr, column)[None, :]
        ds = tl.load(last_p_ptr + span + key, mask=(key < keys) | EVEN, other=0.0)  # [BLOCK_K]
        dk += ds[:, None] * load_vector(last_q_ptr, column)[None, :]
    store_tile(dv_ptr, key, column, row_stride, keys, dv, EVEN)
    store_tile(dk_ptr, key, column, row_stride, keys, dk * scale, EVEN)


# ------------------------------------------------------- what happens before the blocks of keys


@triton.jit
def _compute_delta(
    # Of this sequence and head.
    grad_ptr,  # dO
    out_ptr,  # O, with the stride of dO
    delta_ptr,  # (queries,) float32
    row_stride,  # values from one query to the next
    queries,
    E0: tl.constexpr,
    E1: tl.constexpr,
    ROWS: tl.constexpr,  # queries of one step: many, to wait for memory once
):
    """Stores delta = rowsum(dO O) of all queries."""
    column0 = tl.arange(0, E0)
    column1 = E0 + tl.arange(0, max(E1, 1))  # unused where E1 is 0; an empty range is not allowed
    for first_query in tl.range(0, queries, ROWS):
        query = first_query + tl.arange(0, ROWS)
        grad0 = load_tile(grad_ptr, query, column0, row_stride, queries, EVEN=False)  # [ROWS, E0]
        out0 = load_tile(out_ptr, query, column0, row_stride, queries, EVEN=False)  # [ROWS, E0]
        delta = tl.sum(grad0.to(tl.float32) * out0.to(tl.float32), axis=1)  # [ROWS]
        if E1 > 0:
            grad1 = load_tile(grad_ptr, query, column1, row_stride, queries, EVEN=False)
            out1 = load_tile(out_ptr, query, column1, row_stride, queries, EVEN=False)
            delta += tl.sum(grad1.to(tl.float32) * out1.to(tl.float32), axis=1)
        tl.store(delta_ptr + query, delta, mask=query < queries)


@triton.jit
def _compute_tail(
    # Of this sequence and head; the kernel describes them.
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    delta_ptr,  # three vectors of `span` values: delta; P and dS of the last query
    span,
    grad_row_stride,
    q_row_stride,
    kv_row_stride,
    dq_row_stride,
    dkv_row_stride,
    last,  # index of the last element; a multiple of 64
    scale,
    scale_log2,
    E0: tl.constexpr,
    E1: tl.constexpr,
    ROWS: tl.constexpr,  # elements of one step; divides 64
):
    """Everything about the last query and the last key, and delta of the other queries.

    Stores dQ, dK and dV of the last element, delta of the others, and begins dQ of the others with
    what the last key adds. What the last query adds to dK and dV of the others follows from its P
    and dS. They are stored behind delta, because keeping them in registers through the main loop
    spilled 8 to 950 bytes per thread when it was tried.
    """
    # Phase 1: the last query and the last key with each other.
    column0 = tl.arange(0, E0)
    column1 = E0 + tl.arange(0, max(E1, 1))  # unused where E1 is 0; an empty range is not allowed
    DTYPE: tl.constexpr = dq_ptr.dtype.element_ty
    last_q0 = load_vector(q_ptr + last * q_row_stride, column0)  # [E0], and so are the next three
    last_k0 = load_vector(k_ptr + last * kv_row_stride, column0)
    last_v0 = load_vector(v_ptr + last * kv_row_stride, column0)
    last_grad0 = load_vector(grad_ptr + last * grad_row_stride, column0)
    last_score = tl.sum(last_q0 * last_k0, axis=0)
    last_dp = tl.sum(last_grad0 * last_v0, axis=0)
    last_out0 = load_vector(out_ptr + last * grad_row_stride, column0)
    last_delta = tl.sum(last_grad0 * last_out0, axis=0)
    if E1 > 0:
        last_q1 = load_vector(q_ptr + last * q_row_stride, column1)  # [E1], likewise
        last_k1 = load_vector(k_ptr + last * kv_row_stride, column1)
        last_v1 = load_vector(v_ptr + last * kv_row_stride, column1)
        last_grad1 = load_vector(grad_ptr + last * grad_row_stride, column1)
        last_score += tl.sum(last_q1 * last_k1, axis=0)
        last_dp += tl.sum(last_grad1 * last_v1, axis=0)
        last_out1 = load_vector(out_ptr + last * grad_row_stride, column1)
        last_delta += tl.sum(last_grad1 * last_out1, axis=0)
    last_lse = tl.load(lse_ptr + last)
    last_p = tl.exp2(last_score * scale_log2 - last_lse)
    last_ds = last_p * (last_dp - last_delta)

    # Phase 2: begin the last element's own gradients. They are kept as ROWS partial sums and added
    # up after the loop, because threads would wait for each other for a sum in the loop.
    dq0 = tl.zeros((ROWS, E0), tl.float32)
    dk0 = tl.zeros((ROWS, E0), tl.float32)
    dv0 = tl.zeros((ROWS, E0), tl.float32)
    dq1 = tl.zeros((ROWS, max(E1, 1)), tl.float32)
    dk1 = tl.zeros((ROWS, max(E1, 1)), tl.float32)
    dv1 = tl.zeros((ROWS, max(E1, 1)), tl.float32)
    for first_row in tl.range(0, last, ROWS, num_stages=3):
        row = first_row + tl.arange(0, ROWS)

        # Phase 3: these elements as queries, with the last one as the key.
        q0 = load_float_tile(q_ptr, row, column0, q_row_stride)
        grad0 = load_float_tile(grad_ptr, row, column0, grad_row_stride)
        out0 = load_float_tile(out_ptr, row, column0, grad_row_stride)
        scores = tl.sum(q0 * last_k0[None, :], axis=1)  # [ROWS]
        dp = tl.sum(grad0 * last_v0[None, :], axis=1)  # [ROWS]
        delta = tl.sum(grad0 * out0, axis=1)  # [ROWS]
        if E1 > 0:
            q1 = load_float_tile(q_ptr, row, column1, q_row_stride)
            grad1 = load_float_tile(grad_ptr, row, column1, grad_row_stride)
            out1 = load_float_tile(out_ptr, row, column1, grad_row_stride)
            scores += tl.sum(q1 * last_k1[None, :], axis=1)
            dp += tl.sum(grad1 * last_v1[None, :], axis=1)
            delta += tl.sum(grad1 * out1, axis=1)
        tl.store(delta_ptr + row, delta)
        p = tl.exp2(scores * scale_log2 - tl.load(lse_ptr + row))  # [ROWS]
        ds = p * (dp - delta)  # [ROWS]
        scaled_ds = (ds * scale)[:, None]
        first_dq0 = scaled_ds * last_k0[None, :]  # [ROWS, E0]
        store_tile(dq_ptr, row, column0, dq_row_stride, last, first_dq0, EVEN=True)
        dk0 += ds[:, None] * q0
        dv0 += p[:, None] * grad0
        if E1 > 0:
            first_dq1 = scaled_ds * last_k1[None, :]  # [ROWS, E1]
            store_tile(dq_ptr, row, column1, dq_row_stride, last, first_dq1, EVEN=True)
            dk1 += ds[:, None] * q1
            dv1 += p[:, None] * grad1

        # Phase 4: these elements as keys, with the last one as the query.
        k0 = load_float_tile(k_ptr, row, column0, kv_row_stride)
        v0 = load_float_tile(v_ptr, row, column0, kv_row_stride)
        scores = tl.sum(k0 * last_q0[None, :], axis=1)  # [ROWS]
        dp = tl.sum(v0 * last_grad0[None, :], axis=1)  # [ROWS]
        if E1 > 0:
            k1 = load_float_tile(k_ptr, row, column1, kv_row_stride)
            v1 = load_float_tile(v_ptr, row, column1, kv_row_stride)
            scores += tl.sum(k1 * last_q1[None, :], axis=1)
            dp += tl.sum(v1 * last_grad1[None, :], axis=1)
        p = tl.exp2(scores * scale_log2 - last_lse)  # [ROWS]
        ds = p * (dp - last_delta)  # [ROWS]
        tl.store(delta_ptr + span + row, p)
        tl.store(delta_ptr + 2 * span + row, ds)
        dq0 += ds[:, None] * k0
        if E1 > 0:
            dq1 += ds[:, None] * k1

    # Phase 5: add up the last element's own gradients, including phase 1, and store them.
    dq = (tl.sum(dq0, axis=0) + last_ds * last_k0) * scale  # [E0]
    dk = (tl.sum(dk0, axis=0) + last_ds * last_q0) * scale  # [E0]
    tl.store(dq_ptr + last * dq_row_stride + column0, dq.to(DTYPE))
    tl.store(dk_ptr + last * dkv_row_stride + column0, dk.to(DTYPE))
    last_dv_ptr = dv_ptr + last * dkv_row_stride + column0
    dv = tl.sum(dv0, axis=0) + last_p * last_grad0  # [E0]
    tl.store(last_dv_ptr, dv.to(DTYPE))
    if E1 > 0:
        dq = (tl.sum(dq1, axis=0) + last_ds * last_k1) * scale  # [E1]
        dk = (tl.sum(dk1, axis=0) + last_ds * last_q1) * scale  # [E1]
        tl.store(dq_ptr + last * dq_row_stride + column1, dq.to(DTYPE))
        tl.store(dk_ptr + last * dkv_row_stride + column1, dk.to(DTYPE))
        last_dv_ptr = dv_ptr + last * dkv_row_stride + column1
        dv = tl.sum(dv1, axis=0) + last_p * last_grad1  # [E1]
        tl.store(last_dv_ptr, dv.to(DTYPE))


# ------------------------------------------------------------------- part of the blocks of keys


@triton.jit
def _hide_unseen(
    exponents,  # [BLOCK_K, BLOCK_Q]
    ends_ptr,  # (queries,) int32, of this sequence; read for ENDS
    bits_ptr,  # one bit per pair, of the mask; read for BLOCKS
    key,  # [BLOCK_K]
    first_query,  # of the block
    queries,
    keys,
    bits_stride,  # words from the bits for queries 0..31 to those for 32..63; read for BLOCKS
    chunk,  # elements of a chunk; read for CHUNK
    KIND: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    EVEN: tl.constexpr,
):
    """[BLOCK_K, BLOCK_Q]: the exponents, -inf where the query does not see the key.

    It does not matter what queries past the end see: their q, dO, lse and delta are zero, and so is
    what they add to dK and dV.
    """
    query_in_block = tl.arange(0, BLOCK_Q)
    query = first_query + query_in_block
    if KIND == FULL:
        if EVEN:
            return exponents
        # The second condition is always true. It gives the first one the shape of the tile.
        is_seen = (key < keys)[:, None] & (query_in_block >= 0)[None, :]
    elif KIND == CAUSAL:
        is_seen = key[:, None] <= (query + (keys - queries))[None, :]
    elif KIND == CHUNK:
        # For keys past the end the chunk begins behind all queries, so that no query sees them.
        behind_all_queries = queries + BLOCK_Q
        first = tl.where(key < keys, key // chunk * chunk, behind_all_queries)[:, None]
        is_seen = (query[None, :] >= first) & (query[None, :] < first + chunk)
    elif KIND == ENDS:
        visible_end = _load_per_query(ends_ptr, query, queries, EVEN)  # [BLOCK_Q]
        is_seen = key[:, None] < tl.minimum(visible_end, keys)[None, :]
    else:
        # A key's bits for 32 queries are one word, so a block of 64 queries takes two. There are
        # bits for keys up to a multiple of 128: no check.
        word_ptr = bits_ptr + first_query // BITS_PER_WORD * bits_stride + key  # [BLOCK_K]
        word = tl.load(word_ptr)[:, None]
        if BLOCK_Q == 64:
            is_in_first_word = (query_in_block < BITS_PER_WORD)[None, :]
            word = tl.where(is_in_first_word, word, tl.load(word_ptr + bits_stride)[:, None])
        bit = (query_in_block % BITS_PER_WORD)[None, :]
        is_seen = ((word >> bit) & 1) != 0
    return tl.where(is_seen, exponents, float("-inf"))


# ---------------------------------------------------------------------------------- the kernel


@triton.jit(do_not_specialize=["queries", "keys", "heads", "bits_stride", "chunk", "span"])
def attention_backward_kernel(
    # Inputs, bfloat16 or float16; N queries, M keys, H heads, E = E0 + E1.
    grad_ptr,  # dO (B, N, H, E) contiguous
    q_ptr,  # (B, N, H, E) with strides
    k_ptr,  # (B, M, H, E) with strides
    v_ptr,  # (B, M, H, E) with the strides of k
    out_ptr,  # O (B, N, H, E) contiguous
    lse_ptr,  # (B, H, N) float32, of the forward pass
    # Outputs.
    dq_ptr,  # (B, N, H, E) with strides
    dk_ptr,  # (B, M, H, E) with strides
    dv_ptr,  # (B, M, H, E) with the strides of dk
    delta_ptr,  # (B, H, 1 or 3, span) float32, scratch: delta; with a TAIL the last query's P, dS
    # Masks.
    ends_or_schedule_ptr,  # int32: ENDS: (B, N); BLOCKS: (16, SCHEDULE_ROW); otherwise None
    bits_ptr,  # (N / 32, bits_stride) int32, one bit per pair; None unless KIND is BLOCKS
    # Sizes.
    queries,  # N
    keys,  # M
    heads,  # H
    bits_stride,  # M rounded up to 128; 0 unless KIND is BLOCKS
    chunk,  # elements of a chunk; 0 unless KIND is CHUNK
    span,  # N rounded up to 128
    # Strides, in values. Heads lie side by side, E values each.
    q_batch_stride,
    q_row_stride,  # from a query to the next one
    kv_batch_stride,
    kv_row_stride,  # from a key to the next one
    dq_batch_stride,
    dq_row_stride,
    dkv_batch_stride,
    dkv_row_stride,
    scale,  # 1 / sqrt(E)
    scale_log2,  # log2(e) / sqrt(E)
    # Constants of the compiled kernel.
    KIND: tl.constexpr,  # one of attention.KINDS
    TAIL: tl.constexpr,  # whether the last element is computed separately
    EVEN: tl.constexpr,  # whether queries and keys (without the TAIL) fill their blocks
    E0: tl.constexpr,  # columns of the first tile, a power of two
    E1: tl.constexpr,  # columns of the second tile, a power of two, or 0
    BLOCK_K: tl.constexpr,  # keys of a step of the outer loop
    BLOCK_Q: tl.constexpr,  # queries of a step of the inner loop
    STAGES: tl.constexpr,  # blocks of queries under way at once
    ROWS: tl.constexpr,  # elements of a step of what happens before the blocks of keys
    SWAP: tl.constexpr,  # compute dQ^T = K^T dS^T, not dQ = dS K
):
    """One program for each head of each sequence."""
    # A mask is scheduled for 64 or 128 keys, in entries of 64 queries.
    tl.static_assert(KIND != BLOCKS or BLOCK_K == 64 or BLOCK_K == 128)
    tl.static_assert(KIND != BLOCKS or BLOCK_Q == 32 or BLOCK_Q == 64)
    # Blocks of queries in an entry. A literal 64, not MASK_BLOCK: with that the interpreter would
    # have to compute int % tl.constexpr, and it cannot.
    BLOCKS_PER_ENTRY: tl.constexpr = 64 // BLOCK_Q
    SCRATCH_VECTORS: tl.constexpr = 3 if TAIL else 1
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty

    # Phase 1: move the pointers to this sequence and head.
    head = tl.program_id(0) % heads
    # 64 bits, because 3641 sequences of 256 x 3 x 768 values are more than 2^31.
    sequence = (tl.program_id(0) // heads).to(tl.int64)
    grad_row_stride = heads * (E0 + E1)
    head_column = head * (E0 + E1)
    grad_ptr += sequence * queries * grad_row_stride + head_column
    out_ptr += sequence * queries * grad_row_stride + head_column
    q_ptr += sequence * q_batch_stride + head_column
    k_ptr += sequence * kv_batch_stride + head_column
    v_ptr += sequence * kv_batch_stride + head_column
    dq_ptr += sequence * dq_batch_stride + head_column
    dk_ptr += sequence * dkv_batch_stride + head_column
    dv_ptr += sequence * dkv_batch_stride + head_column
    lse_ptr += (sequence * heads + head) * queries
    delta_ptr += (sequence * heads + head) * span * SCRATCH_VECTORS
    if KIND == ENDS:
        ends_or_schedule_ptr += sequence * queries

    # Phase 2: delta of all queries. With a TAIL also everything about the last element, which
    # `queries` and `keys` do not count from here on.
    if TAIL:
        queries -= 1
        keys -= 1
        _compute_tail(
            grad_ptr,
            q_ptr,
            k_ptr,
            v_ptr,
            out_ptr,
            lse_ptr,
            dq_ptr,
            dk_ptr,
            dv_ptr,
            delta_ptr,
            span,
            grad_row_stride,
            q_row_stride,
            kv_row_stride,
            dq_row_stride,
            dkv_row_stride,
            queries,
            scale,
            scale_log2,
            E0,
            E1,
            ROWS,
        )
    else:
        _compute_delta(grad_ptr, out_ptr, delta_ptr, grad_row_stride, queries, E0, E1, ROWS)
    # What one thread stored (delta, dQ) another thread loads: all threads wait for each other.
    tl.debug_barrier()

    # Phase 3: the blocks of keys, the last one first.
    column0 = tl.arange(0, E0)
    column1 = E0 + tl.arange(0, max(E1, 1))  # unused where E1 is 0; an empty range is not allowed
    for step in tl.range(0, tl.cdiv(keys, BLOCK_K)):
        # Phase 3a: load the keys and values, begin their gradients.
        key_block = tl.cdiv(keys, BLOCK_K) - 1 - step
        key = key_block * BLOCK_K + tl.arange(0, BLOCK_K)
        k0 = load_tile(k_ptr, key, column0, kv_row_stride, keys, EVEN)  # [BLOCK_K, E0]
        v0 = load_tile(v_ptr, key, column0, kv_row_stride, keys, EVEN)  # [BLOCK_K, E0]
        dk0 = tl.zeros((BLOCK_K, E0), tl.float32)
        dv0 = tl.zeros((BLOCK_K, E0), tl.float32)
        if E1 > 0:
            k1 = load_tile(k_ptr, key, column1, kv_row_stride, keys, EVEN)  # [BLOCK_K, E1]
            v1 = load_tile(v_ptr, key, column1, kv_row_stride, keys, EVEN)  # [BLOCK_K, E1]
            dk1 = tl.zeros((BLOCK_K, E1), tl.float32)
            dv1 = tl.zeros((BLOCK_K, E1), tl.float32)

        # Phase 3b: which blocks of queries see these keys.
        begin = 0
        schedule_row_ptr = ends_or_schedule_ptr
        if KIND == CAUSAL:
            # The first query that sees one of these keys is at the position of the first key. The
            # block that contains it is the first to visit.
            query_at_first_key = tl.maximum(key_block * BLOCK_K - (keys - queries), 0)
            begin = query_at_first_key // BLOCK_Q * BLOCK_Q
        if KIND == BLOCKS:
            schedule_row_ptr += key_block * SCHEDULE_ROW
            query_blocks = tl.load(schedule_row_ptr) * BLOCKS_PER_ENTRY
        else:
            query_blocks = tl.cdiv(queries - begin, BLOCK_Q)

        # Phase 4: the blocks of queries. While one is computed, the next ones are being loaded.
        # With a schedule a block takes two loads in turn, the entry and the queries: hence more
        # stages.
        QUERY_STAGES: tl.constexpr = 2 * STAGES - 1 if KIND == BLOCKS else STAGES
        for block in tl.range(0, query_blocks, num_stages=QUERY_STAGES):
            # Phase 4a: which queries, and whether there is already something in their dQ.
            if KIND == BLOCKS:
                # An entry is 2 * (block of 64 queries) + (1 if nothing is in its dQ yet).
                entry = tl.load(schedule_row_ptr + 1 + block // BLOCKS_PER_ENTRY)
                first_query_of_entry = entry // 2 * MASK_BLOCK
                first_query = first_query_of_entry + block % BLOCKS_PER_ENTRY * BLOCK_Q
                is_written = entry % 2 == 0
            else:
                first_query = begin + block * BLOCK_Q
                is_written = (step > 0) | TAIL
                if KIND == CAUSAL:
                    # The step before this one had the next block of keys. It has written this dQ
                    # if the last of these queries sees the first key of that block.
                    query_at_next_block = (key_block + 1) * BLOCK_K - (keys - queries)
                    is_written &= first_query + BLOCK_Q > query_at_next_block
            query = first_query + tl.arange(0, BLOCK_Q)

            # Phase 4b: load them, in tiles [BLOCK_Q, E0] and [BLOCK_Q, E1].
            q0 = load_tile(q_ptr, query, column0, q_row_stride, queries, EVEN)
            grad0 = load_tile(grad_ptr, query, column0, grad_row_stride, queries, EVEN)
            if E1 > 0:
                q1 = load_tile(q_ptr, query, column1, q_row_stride, queries, EVEN)
                grad1 = load_tile(grad_ptr, query, column1, grad_row_stride, queries, EVEN)
            lse = _load_per_query(lse_ptr, query, queries, EVEN)  # [BLOCK_Q]
            delta = _load_per_query(delta_ptr, query, queries, EVEN)  # [BLOCK_Q]

            # Phase 4c: S^T and dP^T, then P^T and dS^T; all [BLOCK_K, BLOCK_Q].
            sT = tl.dot(k0, tl.trans(q0))
            dpT = tl.dot(v0, tl.trans(grad0))
            if E1 > 0:
                sT = tl.dot(k1, tl.trans(q1), acc=sT)
                dpT = tl.dot(v1, tl.trans(grad1), acc=dpT)
            exponentsT = sT * scale_log2 - lse[None, :]
            exponentsT = _hide_unseen(
                exponentsT,
                ends_or_schedule_ptr,
                bits_ptr,
                key,
                first_query,
                queries,
                keys,
                bits_stride,
                chunk,
                KIND,
                BLOCK_Q,
                EVEN,
            )
            pT = tl.exp2(exponentsT)
            dsT = (pT * (dpT - delta[None, :])).to(DTYPE)
            pT = pT.to(DTYPE)

            # Phase 4d: what these queries add to dV and dK.
            dv0 = tl.dot(pT, grad0, acc=dv0)  # [BLOCK_K, E0]
            dk0 = tl.dot(dsT, q0, acc=dk0)  # [BLOCK_K, E0]
            if E1 > 0:
                dv1 = tl.dot(pT, grad1, acc=dv1)  # [BLOCK_K, E1]
                dk1 = tl.dot(dsT, q1, acc=dk1)  # [BLOCK_K, E1]

            # Phase 4e: what these keys add to dQ. wgmma, the matrix instruction of sm_90, needs 64
            # rows. With a BLOCK_Q of 32 dQ has too few. dQ^T has E0 rows, enough from 64 on (SWAP).
            if not SWAP:
                dq0 = tl.dot(tl.trans(dsT), k0)  # [BLOCK_Q, E0]
            else:
                dq0 = tl.trans(tl.dot(tl.trans(k0), dsT))  # [BLOCK_Q, E0]
            _add_to_dq(
                dq_ptr,
                query,
                column0,
                dq_row_stride,
                queries,
                dq0 * scale,
                is_written,
                TAIL,
                EVEN,
            )
            if E1 > 0:
                if not SWAP:
                    dq1 = tl.dot(tl.trans(dsT), k1)  # [BLOCK_Q, E1]
                else:
                    dq1 = tl.trans(tl.dot(tl.trans(k1), dsT))  # [BLOCK_Q, E1]
                _add_to_dq(
                    dq_ptr,
                    query,
                    column1,
                    dq_row_stride,
                    queries,
                    dq1 * scale,
                    is_written,
                    TAIL,
                    EVEN,
                )

        # Phase 5: store dK and dV of these keys. With a TAIL `queries` is the index of the last
        # query.
        _store_keys(
            q_ptr + queries * q_row_stride,
            grad_ptr + queries * grad_row_stride,
            dk_ptr,
            dv_ptr,
            delta_ptr + span,
            span,
            key,
            column0,
            dkv_row_stride,
            keys,
            dk0,
            dv0,
            scale,
            TAIL,
            EVEN,
        )
        if E1 > 0:
            _store_keys(
                q_ptr + queries * q_row_stride,
                grad_ptr + queries * grad_row_stride,
                dk_ptr,
                dv_ptr,
                delta_ptr + span,
                span,
                key,
                column1,
                dkv_row_stride,
                keys,
                dk1,
                dv1,
                scale,
                TAIL,
                EVEN,
            )
        # The next step loads dQ where another thread stored it in this one.
        tl.debug_barrier()


# -------------------------------------------------------------------------------- the launcher


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    visible: Operands,
) -> None:
    """Fills dq, dk and dv.

    Args:
        grad: gradient of out, (B, N, H, E) contiguous.
        q, k, v: as `attention.forward` takes them.
        out, lse: as `attention.forward` gave them.
        dq: (B, N, H, E), heads side by side, rows and sequences with any stride.
        dk, dv: (B, M, H, E), likewise, with the same strides.
        visible: who sees whom.
    """
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    kind = kind_of(visible)
    programs = batch * heads
    if not programs:
        return

    config = tuning.lookup("attention", variant("backward", kind, queries, keys), width, q.device)
    settings = backward_constants(kind, queries, keys, width, config)
    span = triton.cdiv(queries, 128) * 128
    vectors = 3 if settings["TAIL"] else 1  # delta; P and dS of the last query
    delta = torch.empty(programs * vectors * span, dtype=torch.float32, device=q.device)

    ends_or_schedule = visible.ends
    if kind == "blocks":
        # Table 2 has a row for each 64 keys, table 3 for each 128.
        ends_or_schedule = visible.schedule[2 + settings["BLOCK_K"] // (2 * BLOCK)]
    bits = visible.key_bits
    bits_stride = 0 if bits is None else bits.shape[1]

    attention_backward_kernel[(programs,)](
        grad_ptr=grad,
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        out_ptr=out,
        lse_ptr=lse,
        dq_ptr=dq,
        dk_ptr=dk,
        dv_ptr=dv,
        delta_ptr=delta,
        ends_or_schedule_ptr=ends_or_schedule,
        bits_ptr=bits,
        queries=queries,
        keys=keys,
        heads=heads,
        bits_stride=bits_stride,
        chunk=visible.chunk,
        span=span,
        q_batch_stride=q.stride(0),
        q_row_stride=q.stride(1),
        kv_batch_stride=k.stride(0),
        kv_row_stride=k.stride(1),
        dq_batch_stride=dq.stride(0),
        dq_row_stride=dq.stride(1),
        dkv_batch_stride=dk.stride(0),
        dkv_row_stride=dk.stride(1),
        scale=width**-0.5,
        scale_log2=width**-0.5 * math.log2(math.e),
        **settings,
    )


def backward_constants(kind: str, queries: int, keys: int, width: int, config: dict) -> dict:
    """The kernel's constants and options: `attention.constants`, SWAP and ROWS."""
    config = dict(config)
    # A configuration may choose SWAP itself.
    config.setdefault("SWAP", config["BLOCK_Q"] < 64)
    if keys <= BLOCK:
        config["BLOCK_K"] = BLOCK
    settings = constants(kind, queries, keys, width, config)
    # `_compute_tail` keeps six tiles of ROWS rows in registers, so it takes few; `_compute_delta`
    # takes a row for each thread.
    settings["ROWS"] = 32 if settings["TAIL"] else 32 * config["num_warps"]
    return settings
