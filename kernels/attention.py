"""The forward pass of attention. `heptapod_fast.ops.attention` says what it computes,
docs/kernels/attention.md leads from the formula to this kernel, docs/attention.md says why it is
built this way. The backward pass is in attention_backward.py.

One launch. A program takes a block of BLOCK_Q queries of one head and goes through the keys, in
blocks of BLOCK_K, with the online softmax. It computes in base 2, because exp2 is one instruction
on a GPU and exp is two; the factor log2(e) that this takes is part of the scale.

At 256 elements attention is bound by memory on Hopper cards, so what counts is how much is read and
written:

- q, k and v are read where the projection wrote them, or where the KV cache is.
- A head that is 80 or 96 wide is two tiles of columns (64 + 16, 64 + 32), never padded to 128:
  E = E0 + E1. A name that ends in 0 belongs to the first tile, one that ends in 1 to the second. E1
  is 0 where one tile is enough.
- 257 elements are a class token and a grid of 256. A tile for the last one would be almost empty,
  so the last element (the TAIL) is computed separately, on CUDA cores.

Who sees whom is a constant of the compiled kernel (KIND). Lengths are not constants, because a KV
cache grows by one element with each step.

Words: a block is a run of queries or keys. A tile is a two-dimensional piece of a matrix; its shape
stands in brackets, as in docs/legend.md. Strides count values, not bytes.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from heptapod_fast.kernels import tuning
from heptapod_fast.ops.masks import BLOCK, MAX_LENGTH, Operands

# Who sees whom, as the kernels are compiled for it:
#   full    every query sees every key
#   causal  the queries are the last elements of the keys, and see no key that is after them
#   chunk   short sequences share a tile: an element sees its own sequence
#   ends    each query sees the keys before an end of its own
#   blocks  an AttentionMask: a schedule of blocks, and one bit for each pair
KINDS = dict(full=0, causal=1, chunk=2, ends=3, blocks=4)
FULL = tl.constexpr(KINDS["full"])
CAUSAL = tl.constexpr(KINDS["causal"])
CHUNK = tl.constexpr(KINDS["chunk"])
ENDS = tl.constexpr(KINDS["ends"])
BLOCKS = tl.constexpr(KINDS["blocks"])

# How ops/masks.py lays out an AttentionMask.
MASK_BLOCK = tl.constexpr(BLOCK)  # queries, or keys, in a block of the schedule
SCHEDULE_ROW = tl.constexpr(MAX_LENGTH // BLOCK + 1)  # a count, then that many entries
BITS_PER_WORD = tl.constexpr(32)


# ------------------------------------------------------------------------- loading and storing


@triton.jit
def load_tile(
    ptr,  # of row 0, column 0
    row,  # [rows]
    column,  # [columns]
    row_stride,  # values from one row to the next
    end,  # rows from here on are not read
    EVEN: tl.constexpr,  # whether all rows are before `end`
):
    """[rows, columns]: some columns of some rows, with zeros for rows that are not read."""
    address = ptr + row[:, None] * row_stride + column[None, :]
    if EVEN:
        return tl.load(address)
    return tl.load(address, mask=(row < end)[:, None], other=0.0)


@triton.jit
def store_tile(
    ptr,  # of row 0, column 0
    row,  # [rows]
    column,  # [columns]
    row_stride,  # values from one row to the next
    end,  # rows from here on are not written
    value,  # [rows, columns]
    EVEN: tl.constexpr,  # whether all rows are before `end`
):
    """Stores some columns of some rows, in the type of the memory."""
    address = ptr + row[:, None] * row_stride + column[None, :]
    value = value.to(ptr.dtype.element_ty)
    if EVEN:
        tl.store(address, value)
    else:
        tl.store(address, value, mask=(row < end)[:, None])


@triton.jit
def load_float_tile(
    ptr,  # of row 0, column 0
    row,  # [rows], all of which exist
    column,  # [columns]
    row_stride,  # values from one row to the next
):
    """[rows, columns]: some columns of some rows, in float32."""
    return load_tile(ptr, row, column, row_stride, 0, EVEN=True).to(tl.float32)


@triton.jit
def load_vector(ptr, column):
    """[columns]: some columns of the row that `ptr` points at, in float32."""
    return tl.load(ptr + column).to(tl.float32)


# ------------------------------------------------------------------------- parts of the kernel


@triton.jit
def _hide_unseen(
    scores,  # [BLOCK_Q, BLOCK_K]
    query,  # [BLOCK_Q] index in the sequence
    key,  # [BLOCK_K] index in the sequence
    first_key,  # key[0]
    position_offset,  # query i stands at position i + position_offset of the keys
    keys,  # how many there are
    chunk,  # elements of a chunk; read for CHUNK
    visible_end,  # [BLOCK_Q] the first key that the query does not see; read for ENDS
    query_bits_ptr,  # [BLOCK_Q] where the query's bits for keys 0..31 are; read for BLOCKS
    bits_stride,  # words from there to its bits for keys 32..63; read for BLOCKS
    KIND: tl.constexpr,
    EVEN: tl.constexpr,
):
    """[BLOCK_Q, BLOCK_K]: the scores, -inf where the query does not see the key."""
    if KIND == BLOCKS:
        # The 64 keys of a block are two words of bits.
        first_word = first_key // BITS_PER_WORD
        low_word = tl.load(query_bits_ptr + first_word * bits_stride)  # [BLOCK_Q]
        high_word = tl.load(query_bits_ptr + (first_word + 1) * bits_stride)  # [BLOCK_Q]
        key_in_block = key - first_key  # [BLOCK_K], 0..63
        is_in_low_word = (key_in_block < BITS_PER_WORD)[None, :]
        word = tl.where(is_in_low_word, low_word[:, None], high_word[:, None])
        bit = (key_in_block & (BITS_PER_WORD - 1))[None, :]
        is_seen = ((word >> bit) & 1) != 0
        return tl.where(is_seen, scores, float("-inf"))
    if KIND == CAUSAL:
        return tl.where(key[None, :] <= query[:, None] + position_offset, scores, float("-inf"))
    if KIND == ENDS:
        return tl.where(key[None, :] < visible_end[:, None], scores, float("-inf"))
    if KIND == CHUNK:
        chunk_of_key = (key // chunk)[None, :]
        chunk_of_query = (query // chunk)[:, None]
        return tl.where(chunk_of_key == chunk_of_query, scores, float("-inf"))
    # FULL: only keys past the end are hidden. They were loaded as zeros and would score 0.
    if not EVEN:
        return tl.where((key < keys)[None, :], scores, float("-inf"))
    return scores


@triton.jit
def _attend_last_query(
    # Of this sequence and head.
    q_ptr,  # the last query: [E]
    k_ptr,  # key 0; keys are kv_row_stride apart
    v_ptr,  # value 0, likewise
    out_ptr,  # the last query's output: [E]
    lse_ptr,  # the last query's log-sum-exp: one float32
    last,  # index of the last element; a multiple of BLOCK_K
    kv_row_stride,
    scale_log2,  # log2(e) / sqrt(E)
    E0: tl.constexpr,
    E1: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The last query sees all keys, on CUDA cores.

    BLOCK_K online softmaxes run side by side, one for each place in a block of keys, and are joined
    at the end. So the loop contains no sum across keys, for which threads would have to wait for
    each other.
    """
    # Phase 1: the query, and its score with the last key, which no block contains.
    column0 = tl.arange(0, E0)
    column1 = E0 + tl.arange(0, max(E1, 1))  # unused where E1 is 0; an empty range is not allowed
    q0 = load_vector(q_ptr, column0) * scale_log2  # [E0]
    last_score = tl.sum(q0 * load_vector(k_ptr + last * kv_row_stride, column0))
    acc0 = tl.zeros((BLOCK_K, E0), tl.float32)
    if E1 > 0:
        q1 = load_vector(q_ptr, column1) * scale_log2  # [E1]
        last_score += tl.sum(q1 * load_vector(k_ptr + last * kv_row_stride, column1))
        acc1 = tl.zeros((BLOCK_K, E1), tl.float32)
    running_max = tl.full((BLOCK_K,), float("-inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_K,), tl.float32)

    # Phase 2: the other keys. `last` is a multiple of BLOCK_K, so they fill their blocks.
    for first_key in tl.range(0, last, BLOCK_K, num_stages=STAGES):
        key = first_key + tl.arange(0, BLOCK_K)
        k0 = load_float_tile(k_ptr, key, column0, kv_row_stride)  # [BLOCK_K, E0]
        scores = tl.sum(k0 * q0[None, :], 1)  # [BLOCK_K]
        if E1 > 0:
            k1 = load_float_tile(k_ptr, key, column1, kv_row_stride)  # [BLOCK_K, E1]
            scores += tl.sum(k1 * q1[None, :], 1)
        new_max = tl.maximum(running_max, scores)  # [BLOCK_K], and so are the next three
        weights = tl.exp2(scores - new_max)
        rescale = tl.exp2(running_max - new_max)
        running_sum = running_sum * rescale + weights
        v0 = load_float_tile(v_ptr, key, column0, kv_row_stride)  # [BLOCK_K, E0]
        acc0 = acc0 * rescale[:, None] + weights[:, None] * v0  # [BLOCK_K, E0]
        if E1 > 0:
            v1 = load_float_tile(v_ptr, key, column1, kv_row_stride)  # [BLOCK_K, E1]
            acc1 = acc1 * rescale[:, None] + weights[:, None] * v1  # [BLOCK_K, E1]
        running_max = new_max

    # Phase 3: join the BLOCK_K softmaxes and the last key.
    joint_max = tl.maximum(tl.max(running_max), last_score)
    rescale = tl.exp2(running_max - joint_max)  # [BLOCK_K]
    last_weight = tl.exp2(last_score - joint_max)
    joint_sum = tl.sum(running_sum * rescale) + last_weight
    out0 = tl.sum(acc0 * rescale[:, None], 0)  # [E0]
    out0 += last_weight * load_vector(v_ptr + last * kv_row_stride, column0)
    tl.store(out_ptr + column0, (out0 / joint_sum).to(out_ptr.dtype.element_ty))
    if E1 > 0:
        out1 = tl.sum(acc1 * rescale[:, None], 0)  # [E1]
        out1 += last_weight * load_vector(v_ptr + last * kv_row_stride, column1)
        tl.store(out_ptr + column1, (out1 / joint_sum).to(out_ptr.dtype.element_ty))
    tl.store(lse_ptr, joint_max + tl.log2(joint_sum))


@triton.jit
def _attend_query_block(
    # Pointers at element 0 of this sequence and head; the kernel describes them.
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    ends_ptr,
    schedule_ptr,  # of the mask, for all sequences and heads
    bits_ptr,  # likewise
    query_block,  # which BLOCK_Q queries
    queries,
    keys,
    chunk,
    bits_stride,
    q_row_stride,
    kv_row_stride,
    out_row_stride,
    scale_log2,
    KIND: tl.constexpr,
    TAIL: tl.constexpr,
    EVEN: tl.constexpr,
    E0: tl.constexpr,
    E1: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BLOCK_Q queries of one head see their keys, on tensor cores."""
    # A mask is scheduled in blocks of 64 keys, for 64 or 128 queries. With a TAIL, the other keys
    # are a multiple of 64: a block of 128 could contain the last key, which would count twice.
    tl.static_assert(BLOCK_K == 64 or (KIND != BLOCKS and not TAIL))
    tl.static_assert(BLOCK_Q == 64 or BLOCK_Q == 128)

    # Phase 1: load the queries. With a TAIL the last one is not among them.
    query_end = queries - TAIL
    column0 = tl.arange(0, E0)
    column1 = E0 + tl.arange(0, max(E1, 1))  # unused where E1 is 0; an empty range is not allowed
    query = query_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q0 = load_tile(q_ptr, query, column0, q_row_stride, query_end, EVEN)  # [BLOCK_Q, E0]
    if E1 > 0:
        q1 = load_tile(q_ptr, query, column1, q_row_stride, query_end, EVEN)  # [BLOCK_Q, E1]

    # Phase 2: begin the online softmax. It keeps three things for each query, all over the keys so
    # far: the largest score (running_max), the sum of the weights exp2(score - largest)
    # (running_sum), and the sum of weight * value (acc), which is the output before the division.
    if TAIL:
        # The last key goes first. So far its score is the largest, and its weight is exp2(0) = 1.
        last_kv = query_end * kv_row_stride
        float_q0 = q0.to(tl.float32)
        running_max = tl.sum(float_q0 * load_vector(k_ptr + last_kv, column0)[None, :], 1)
        acc0 = tl.zeros((BLOCK_Q, E0), tl.float32)
        acc0 += load_vector(v_ptr + last_kv, column0)[None, :]
        if E1 > 0:
            float_q1 = q1.to(tl.float32)
            running_max += tl.sum(float_q1 * load_vector(k_ptr + last_kv, column1)[None, :], 1)
            acc1 = tl.zeros((BLOCK_Q, E1), tl.float32)
            acc1 += load_vector(v_ptr + last_kv, column1)[None, :]
        running_max *= scale_log2
        running_sum = tl.full((BLOCK_Q,), 1.0, tl.float32)
    else:
        running_max = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
        running_sum = tl.zeros((BLOCK_Q,), tl.float32)
        acc0 = tl.zeros((BLOCK_Q, E0), tl.float32)
        if E1 > 0:
            acc1 = tl.zeros((BLOCK_Q, E1), tl.float32)

    # Phase 3: how many blocks of keys these queries visit.
    position_offset = keys - queries
    # Two placeholders: `_hide_unseen` always takes both, and reads each for one KIND only.
    visible_end = query
    query_bits_ptr = query
    if KIND == ENDS:
        visible_end = tl.load(ends_ptr + query, mask=query < queries, other=0)
        visible_end = tl.minimum(visible_end, keys)  # [BLOCK_Q]
        key_blocks = tl.cdiv(tl.max(visible_end), BLOCK_K)
    elif KIND == BLOCKS:
        schedule_ptr += query_block * SCHEDULE_ROW
        key_blocks = tl.load(schedule_ptr)
        # There are bits for queries up to a multiple of 128: no check.
        query_bits_ptr = bits_ptr + query  # [BLOCK_Q]
    elif KIND == CAUSAL:
        end_of_last_query = (query_block + 1) * BLOCK_Q + position_offset
        key_blocks = tl.cdiv(tl.minimum(keys, end_of_last_query), BLOCK_K)
    else:
        key_blocks = tl.cdiv(keys - TAIL, BLOCK_K)

    # Phase 4: the blocks of keys. While one is computed, the next ones are being loaded (STAGES).
    for step in tl.range(0, key_blocks, num_stages=STAGES):
        first_key = step * BLOCK_K
        if KIND == BLOCKS:
            first_key = tl.load(schedule_ptr + 1 + step) * BLOCK_K
        key = first_key + tl.arange(0, BLOCK_K)

        # Phase 4a: the scores, a product over E = E0 + E1 columns and so a sum of two.
        k0 = load_tile(k_ptr, key, column0, kv_row_stride, keys, EVEN)  # [BLOCK_K, E0]
        scores = tl.dot(q0, tl.trans(k0))  # [BLOCK_Q, BLOCK_K]
        if E1 > 0:
            k1 = load_tile(k_ptr, key, column1, kv_row_stride, keys, EVEN)  # [BLOCK_K, E1]
            scores = tl.dot(q1, tl.trans(k1), scores)
        scores = _hide_unseen(
            scores,
            query,
            key,
            first_key,
            position_offset,
            keys,
            chunk,
            visible_end,
            query_bits_ptr,
            bits_stride,
            KIND,
            EVEN,
        )

        # Phase 4b: the weights. The sums so far are relative to the old maximum; `rescale` makes
        # them relative to the new one.
        new_max = tl.maximum(running_max, tl.max(scores, 1) * scale_log2)  # [BLOCK_Q]
        subtracted = new_max
        if KIND == ENDS or KIND == BLOCKS:
            # A query may see its first key in a later block. Until then its maximum is -inf, and
            # -inf - -inf would be NaN. With 0 subtracted, its weights are exp2(-inf) = 0. With the
            # other kinds every query sees a key of its first block. (Rows past the end may become
            # NaN; they are not stored.)
            subtracted = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores * scale_log2 - subtracted[:, None])  # [BLOCK_Q, BLOCK_K]
        rescale = tl.exp2(running_max - subtracted)  # [BLOCK_Q]
        running_sum = running_sum * rescale + tl.sum(weights, 1)
        running_max = new_max

        # Phase 4c: add weight * value. Tensor cores take both in one type.
        v0 = load_tile(v_ptr, key, column0, kv_row_stride, keys, EVEN)  # [BLOCK_K, E0]
        weights = weights.to(v0.dtype)
        acc0 = tl.dot(weights, v0, acc0 * rescale[:, None])  # [BLOCK_Q, E0]
        if E1 > 0:
            v1 = load_tile(v_ptr, key, column1, kv_row_stride, keys, EVEN)  # [BLOCK_K, E1]
            acc1 = tl.dot(weights, v1, acc1 * rescale[:, None])  # [BLOCK_Q, E1]

    # Phase 5: divide and store. From the scores and the log-sum-exp the backward pass computes the
    # probabilities again.
    out0 = acc0 / running_sum[:, None]
    store_tile(out_ptr, query, column0, out_row_stride, query_end, out0, EVEN)
    if E1 > 0:
        out1 = acc1 / running_sum[:, None]
        store_tile(out_ptr, query, column1, out_row_stride, query_end, out1, EVEN)
    lse = running_max + tl.log2(running_sum)  # [BLOCK_Q]
    if EVEN:
        tl.store(lse_ptr + query, lse)
    else:
        tl.store(lse_ptr + query, lse, mask=query < query_end)


# ---------------------------------------------------------------------------------- the kernel


@triton.jit(
    do_not_specialize=["queries", "keys", "heads", "programs_per_head", "chunk", "bits_stride"]
)
def attention_forward_kernel(
    # Inputs and outputs, bfloat16 or float16; N queries, M keys, H heads, E = E0 + E1.
    q_ptr,  # (B, N, H, E) with strides
    k_ptr,  # (B, M, H, E) with strides
    v_ptr,  # (B, M, H, E) with the strides of k
    out_ptr,  # (B, N, H, E) contiguous
    lse_ptr,  # (B, H, N) float32: log2 of the sum of exp2 of a query's scores
    # Masks.
    ends_ptr,  # (B, N) int32, how many keys each query sees; None unless KIND is ENDS
    schedule_ptr,  # (16, SCHEDULE_ROW) int32, blocks of keys to visit; None unless KIND is BLOCKS
    bits_ptr,  # (M / 32, bits_stride) int32, one bit per pair; None unless KIND is BLOCKS
    # Sizes.
    queries,  # N
    keys,  # M
    heads,  # H
    programs_per_head,  # blocks of queries, and with a TAIL one for the last query
    chunk,  # elements of a chunk; 0 unless KIND is CHUNK
    bits_stride,  # N rounded up to 128; 0 unless KIND is BLOCKS
    # Strides, in values. Heads lie side by side, E values each.
    q_batch_stride,
    q_row_stride,  # from a query to the next one
    kv_batch_stride,
    kv_row_stride,  # from a key to the next one
    scale_log2,  # log2(e) / sqrt(E)
    # Constants of the compiled kernel.
    KIND: tl.constexpr,  # one of KINDS
    TAIL: tl.constexpr,  # whether the last element is computed separately
    EVEN: tl.constexpr,  # whether queries and keys (without the TAIL) fill their blocks
    E0: tl.constexpr,  # columns of the first tile, a power of two
    E1: tl.constexpr,  # columns of the second tile, a power of two, or 0
    BLOCK_Q: tl.constexpr,  # queries of a program
    BLOCK_K: tl.constexpr,  # keys of one step
    STAGES: tl.constexpr,  # blocks of keys under way at once
):
    """One program for each block of queries of a head, and with a TAIL one for its last query."""
    # Phase 1: which queries. The programs of one head have neighboring numbers, so they run at the
    # same time: its keys and values come from memory once, and then from the L2 cache. The first
    # number is the last block's: in a causal head it takes longest. If it started last, it would
    # still run when the rest of the GPU has nothing to do.
    program = tl.program_id(0)
    query_block = programs_per_head - 1 - program % programs_per_head
    sequence_and_head = program // programs_per_head
    # 64 bits, because 3641 sequences of 256 x 3 x 768 values are more than 2^31.
    sequence = (sequence_and_head // heads).to(tl.int64)
    head = sequence_and_head % heads

    # Phase 2: move the pointers to this sequence and head.
    E: tl.constexpr = E0 + E1
    q_ptr += sequence * q_batch_stride + head * E
    k_ptr += sequence * kv_batch_stride + head * E
    v_ptr += sequence * kv_batch_stride + head * E
    out_ptr += sequence * queries * heads * E + head * E
    lse_ptr += sequence_and_head.to(tl.int64) * queries
    out_row_stride = heads * E
    if KIND == ENDS:
        ends_ptr += sequence * queries

    # Phase 3: attend. `_attend_query_block` is called in two places, and TAIL, a constant, removes
    # one of them. With a single call for both, kernels without a TAIL would contain a branch.
    last = queries - TAIL
    if TAIL:
        if query_block == programs_per_head - 1:
            _attend_last_query(
                q_ptr + last * q_row_stride,
                k_ptr,
                v_ptr,
                out_ptr + last * out_row_stride,
                lse_ptr + last,
                last,
                kv_row_stride,
                scale_log2,
                E0,
                E1,
                BLOCK_K,
                STAGES,
            )
        else:
            _attend_query_block(
                q_ptr,
                k_ptr,
                v_ptr,
                out_ptr,
                lse_ptr,
                ends_ptr,
                schedule_ptr,
                bits_ptr,
                query_block,
                queries,
                keys,
                chunk,
                bits_stride,
                q_row_stride,
                kv_row_stride,
                out_row_stride,
                scale_log2,
                KIND,
                TAIL,
                EVEN,
                E0,
                E1,
                BLOCK_Q,
                BLOCK_K,
                STAGES,
            )
    else:
        _attend_query_block(
            q_ptr,
            k_ptr,
            v_ptr,
            out_ptr,
            lse_ptr,
            ends_ptr,
            schedule_ptr,
            bits_ptr,
            query_block,
            queries,
            keys,
            chunk,
            bits_stride,
            q_row_stride,
            kv_row_stride,
            out_row_stride,
            scale_log2,
            KIND,
            TAIL,
            EVEN,
            E0,
            E1,
            BLOCK_Q,
            BLOCK_K,
            STAGES,
        )


# ------------------------------------------------------------- what a kernel is compiled for


def split_width(width: int) -> tuple[int, int]:
    """(E0, E1), the widths of a head's two tiles: 80 -> (64, 16), 64 -> (64, 0)."""
    largest_power_of_two = 1 << (width.bit_length() - 1)
    return largest_power_of_two, width - largest_power_of_two


def kind_of(visible: Operands) -> str:
    """The name in KINDS."""
    if visible.schedule is not None:
        return "blocks"
    if visible.ends is not None:
        return "ends"
    if visible.causal:
        return "causal"
    if visible.chunk:
        return "chunk"
    return "full"


def has_tail(kind: str, queries: int, keys: int) -> bool:
    """Whether the last element is computed separately: it would have a block of its own."""
    is_square = queries == keys
    is_one_too_many = queries > BLOCK and queries % BLOCK == 1
    return kind == "full" and is_square and is_one_too_many


def variant(direction: str, kind: str, queries: int, keys: int) -> str:
    """The kernel's name in configs/attention.json, "forward_full" and the like."""
    if has_tail(kind, queries, keys):
        return f"{direction}_tail"
    fills_its_blocks = queries % BLOCK == 0 and keys % BLOCK == 0
    if kind in ("full", "causal") and fills_its_blocks:
        return f"{direction}_{kind}"
    return f"{direction}_masked"


def constants(kind: str, queries: int, keys: int, width: int, config: dict) -> dict:
    """What both kernels are compiled for: the tiles and options of `config`, and KIND, TAIL, EVEN,
    E0, E1."""
    tail = has_tail(kind, queries, keys)
    queries_fill_their_blocks = (queries - tail) % config["BLOCK_Q"] == 0
    keys_fill_their_blocks = (keys - tail) % config["BLOCK_K"] == 0
    e0, e1 = split_width(width)
    return config | dict(
        KIND=KINDS[kind],
        TAIL=tail,
        EVEN=queries_fill_their_blocks and keys_fill_their_blocks,
        E0=e0,
        E1=e1,
    )


# -------------------------------------------------------------------------------- the launcher


def forward(q: Tensor, k: Tensor, v: Tensor, visible: Operands) -> tuple[Tensor, Tensor]:
    """Attention of q to k and v.

    Args:
        q: (B, N, H, E), heads side by side, rows and sequences with any stride.
        k, v: (B, M, H, E), likewise, with the same strides.
        visible: who sees whom.

    Returns:
        out (B, N, H, E) and the base-2 log-sum-exp (B, H, N) in float32.
    """
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    kind = kind_of(visible)
    if kind == "chunk" and (queries > BLOCK or queries % visible.chunk):
        raise ValueError(f"chunks of {visible.chunk} must fill the one tile of {queries} queries")

    config = tuning.lookup("attention", variant("forward", kind, queries, keys), width, q.device)
    settings = constants(kind, queries, keys, width, config)
    # One for each block of queries, and one for the last query if that is computed separately.
    tail = settings["TAIL"]
    programs_per_head = triton.cdiv(queries - tail, config["BLOCK_Q"]) + tail

    schedule = None
    if kind == "blocks":
        # Table 0 has a row for each 64 queries, table 1 for each 128.
        schedule = visible.schedule[config["BLOCK_Q"] // (2 * BLOCK)]
    bits = visible.row_bits
    bits_stride = 0 if bits is None else bits.shape[1]

    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    programs = batch * heads * programs_per_head
    if programs:
        attention_forward_kernel[(programs,)](
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            out_ptr=out,
            lse_ptr=lse,
            ends_ptr=visible.ends,
            schedule_ptr=schedule,
            bits_ptr=bits,
            queries=queries,
            keys=keys,
            heads=heads,
            programs_per_head=programs_per_head,
            chunk=visible.chunk,
            bits_stride=bits_stride,
            q_batch_stride=q.stride(0),
            q_row_stride=q.stride(1),
            kv_batch_stride=k.stride(0),
            kv_row_stride=k.stride(1),
            scale_log2=width**-0.5 * math.log2(math.e),
            **settings,
        )
    return out, lse
