"""The backward pass of attention: see `heptapod_fast.ops.attention`. One launch, one program for
each sequence and head, five products for each pair of blocks:

    S^T = K Q^T    P^T = exp2(S^T - lse)    dV += P^T dO                        (exp2: base 2)
    dP^T = V dO^T  dS^T = P^T (dP^T - delta)  dK += dS^T Q  dQ += dS K          delta = rowsum(dO O)

The keys go by in chunks, the last one first; for each chunk dK and dV stay in registers while the
queries go by in blocks, and P^T and dS^T feed dV and dK from registers. dQ is added up in its own
output, rounded once per chunk: the same program loads, adds and stores, in the same order always.
No atomics and no float32 dQ in memory. A barrier between the chunks orders a thread's load after
another thread's store.

TAIL is for one row more than a multiple of 64 (a class token): the last key and the last query are
rank-1 updates on the CUDA cores, so that no tile is all but empty. All of that happens before the
first chunk, except that dK and dV get the last query's share from two vectors in memory.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from heptapod_fast.kernels import tuning
from heptapod_fast.kernels.attention import (
    BLOCKS,
    CAUSAL,
    CHUNK,
    ENDS,
    FULL,
    SCHEDULE_ROW,
    constants,
    kind_of,
    load_rows,
    load_vector,
    offline_case,
    offline_settings,
    store_rows,
    variant,
)
from heptapod_fast.ops.masks import Operands


@triton.jit
def _add(ptr, row, column, stride, end, value, written, ALWAYS: tl.constexpr, EVEN: tl.constexpr):
    """Adds to what was `written`, or begins. No branches: Triton 3.6 cannot compile them here."""
    at = ptr + row[:, None] * stride + column[None, :]
    if EVEN and ALWAYS:
        before = tl.load(at)
    elif EVEN:
        before = tl.load(at, mask=written, other=0.0)
    else:
        before = tl.load(at, mask=(row < end)[:, None] & written, other=0.0)
    store_rows(ptr, row, column, stride, end, before.to(tl.float32) + value, EVEN)


@triton.jit
def _each(ptr, row, end, EVEN: tl.constexpr):
    """One number for each row, zero from `end` on. The sum over one column keeps the layout of the
    load: Triton 3.6 would copy each number once for every thread that needs it."""
    at = (ptr + row)[:, None]
    if EVEN:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=(row < end)[:, None], other=0)
    return tl.sum(x, axis=1)


@triton.jit
def _delta(
    grad_ptr,
    out_ptr,
    delta_ptr,
    stride,
    queries,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ROWS: tl.constexpr,
):
    """delta = rowsum(dO * O), for all queries: many rows at once, to wait for memory once."""
    column0 = tl.arange(0, D0)
    column1 = D0 + tl.arange(0, max(D1, 1))
    for start in tl.range(0, queries, ROWS):
        row = start + tl.arange(0, ROWS)
        grad = load_rows(grad_ptr, row, column0, stride, queries, False).to(tl.float32)
        out = load_rows(out_ptr, row, column0, stride, queries, False).to(tl.float32)
        delta = tl.sum(grad * out, axis=1)
        if D1 > 0:
            grad = load_rows(grad_ptr, row, column1, stride, queries, False).to(tl.float32)
            out = load_rows(out_ptr, row, column1, stride, queries, False).to(tl.float32)
            delta += tl.sum(grad * out, axis=1)
        tl.store(delta_ptr + row, delta, mask=row < queries)


@triton.jit
def _tail(
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
    grad_row,
    q_row,
    kv_row,
    dq_row,
    dkv_row,
    last,
    scale,
    scale2,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ROWS: tl.constexpr,
):
    """delta of all queries; all that the last key and the last query do, except to dK and dV of
    other keys: for these the last query's p and ds are left at delta + span and delta + 2 span."""
    column0 = tl.arange(0, D0)
    column1 = D0 + tl.arange(0, max(D1, 1))
    TYPE: tl.constexpr = dq_ptr.dtype.element_ty
    q0 = load_vector(q_ptr + last * q_row, column0)
    k0 = load_vector(k_ptr + last * kv_row, column0)
    v0 = load_vector(v_ptr + last * kv_row, column0)
    g0 = load_vector(grad_ptr + last * grad_row, column0)
    score = tl.sum(q0 * k0, axis=0)
    dp = tl.sum(g0 * v0, axis=0)
    delta = tl.sum(g0 * load_vector(out_ptr + last * grad_row, column0), axis=0)
    if D1 > 0:
        q1 = load_vector(q_ptr + last * q_row, column1)
        k1 = load_vector(k_ptr + last * kv_row, column1)
        v1 = load_vector(v_ptr + last * kv_row, column1)
        g1 = load_vector(grad_ptr + last * grad_row, column1)
        score += tl.sum(q1 * k1, axis=0)
        dp += tl.sum(g1 * v1, axis=0)
        delta += tl.sum(g1 * load_vector(out_ptr + last * grad_row, column1), axis=0)
    lse = tl.load(lse_ptr + last)
    p = tl.exp2(score * scale2 - lse)
    ds = p * (dp - delta)
    dq0 = tl.zeros((ROWS, D0), tl.float32)
    dk0 = tl.zeros((ROWS, D0), tl.float32)
    dv0 = tl.zeros((ROWS, D0), tl.float32)
    dq1 = tl.zeros((ROWS, max(D1, 1)), tl.float32)
    dk1 = tl.zeros((ROWS, max(D1, 1)), tl.float32)
    dv1 = tl.zeros((ROWS, max(D1, 1)), tl.float32)
    for start in tl.range(0, last, ROWS, num_stages=3):
        row = start + tl.arange(0, ROWS)
        # The last key for these queries.
        q0_R = load_rows(q_ptr, row, column0, q_row, last, True).to(tl.float32)
        g0_R = load_rows(grad_ptr, row, column0, grad_row, last, True).to(tl.float32)
        o0_R = load_rows(out_ptr, row, column0, grad_row, last, True).to(tl.float32)
        score_R = tl.sum(q0_R * k0[None, :], axis=1)
        dp_R = tl.sum(g0_R * v0[None, :], axis=1)
        delta_R = tl.sum(g0_R * o0_R, axis=1)
        if D1 > 0:
            q1_R = load_rows(q_ptr, row, column1, q_row, last, True).to(tl.float32)
            g1_R = load_rows(grad_ptr, row, column1, grad_row, last, True).to(tl.float32)
            o1_R = load_rows(out_ptr, row, column1, grad_row, last, True).to(tl.float32)
            score_R += tl.sum(q1_R * k1[None, :], axis=1)
            dp_R += tl.sum(g1_R * v1[None, :], axis=1)
            delta_R += tl.sum(g1_R * o1_R, axis=1)
        tl.store(delta_ptr + row, delta_R)
        p_R = tl.exp2(score_R * scale2 - tl.load(lse_ptr + row))
        ds_R = p_R * (dp_R - delta_R)
        dq_R = (ds_R * scale)[:, None]
        store_rows(dq_ptr, row, column0, dq_row, last, dq_R * k0[None, :], True)
        dk0 += ds_R[:, None] * q0_R
        dv0 += p_R[:, None] * g0_R
        if D1 > 0:
            store_rows(dq_ptr, row, column1, dq_row, last, dq_R * k1[None, :], True)
            dk1 += ds_R[:, None] * q1_R
            dv1 += p_R[:, None] * g1_R
        # The last query for these keys.
        k0_R = load_rows(k_ptr, row, column0, kv_row, last, True).to(tl.float32)
        v0_R = load_rows(v_ptr, row, column0, kv_row, last, True).to(tl.float32)
        score_R = tl.sum(k0_R * q0[None, :], axis=1)
        dp_R = tl.sum(v0_R * g0[None, :], axis=1)
        if D1 > 0:
            k1_R = load_rows(k_ptr, row, column1, kv_row, last, True).to(tl.float32)
            v1_R = load_rows(v_ptr, row, column1, kv_row, last, True).to(tl.float32)
            score_R += tl.sum(k1_R * q1[None, :], axis=1)
            dp_R += tl.sum(v1_R * g1[None, :], axis=1)
        p_R = tl.exp2(score_R * scale2 - lse)
        ds_R = p_R * (dp_R - delta)
        tl.store(delta_ptr + span + row, p_R)
        tl.store(delta_ptr + 2 * span + row, ds_R)
        dq0 += ds_R[:, None] * k0_R
        if D1 > 0:
            dq1 += ds_R[:, None] * k1_R
    # And the two for each other.
    dq = (tl.sum(dq0, axis=0) + ds * k0) * scale
    dk = (tl.sum(dk0, axis=0) + ds * q0) * scale
    tl.store(dq_ptr + last * dq_row + column0, dq.to(TYPE))
    tl.store(dk_ptr + last * dkv_row + column0, dk.to(TYPE))
    tl.store(dv_ptr + last * dkv_row + column0, (tl.sum(dv0, axis=0) + p * g0).to(TYPE))
    if D1 > 0:
        dq = (tl.sum(dq1, axis=0) + ds * k1) * scale
        dk = (tl.sum(dk1, axis=0) + ds * q1) * scale
        tl.store(dq_ptr + last * dq_row + column1, dq.to(TYPE))
        tl.store(dk_ptr + last * dkv_row + column1, dk.to(TYPE))
        tl.store(dv_ptr + last * dkv_row + column1, (tl.sum(dv1, axis=0) + p * g1).to(TYPE))


@triton.jit
def _mask(
    x,
    visible_ptr,
    bits_ptr,
    key,
    start,
    queries,
    keys,
    words,
    chunk,
    KIND: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Exponents x (keys, queries), -inf where the query does not see the key. Rows of queries past
    the end may see what they like: their q, dO, lse and delta are zero."""
    lane = tl.arange(0, BLOCK_Q)
    query = start + lane
    if KIND == FULL:
        if EVEN:
            return x
        seen = (key < keys)[:, None] & (lane >= 0)[None, :]
    elif KIND == CAUSAL:
        seen = key[:, None] <= (query + (keys - queries))[None, :]
    elif KIND == CHUNK:
        first = tl.where(key < keys, key // chunk * chunk, queries + BLOCK_Q)[:, None]
        seen = (query[None, :] >= first) & (query[None, :] < first + chunk)
    elif KIND == ENDS:
        end = _each(visible_ptr, query, queries, EVEN)
        seen = key[:, None] < tl.minimum(end, keys)[None, :]
    else:
        at = bits_ptr + start // 32 * words + key
        word = tl.load(at)[:, None]
        if BLOCK_Q == 64:
            word = tl.where((lane < 32)[None, :], word, tl.load(at + words)[:, None])
        seen = ((word >> (lane % 32)[None, :]) & 1) != 0
    return tl.where(seen, x, float("-inf"))


@triton.jit(do_not_specialize=["queries", "keys", "heads", "words", "chunk", "span"])
def _backward(
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
    visible_ptr,
    bits_ptr,
    queries,
    keys,
    heads,
    words,
    chunk,
    span,
    q_batch,
    q_row,
    kv_batch,
    kv_row,
    dq_batch,
    dq_row,
    dkv_batch,
    dkv_row,
    scale,
    scale2,
    KIND: tl.constexpr,
    TAIL: tl.constexpr,
    EVEN: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    SWAP: tl.constexpr,
):
    # What the schedule of a mask is cut into.
    tl.static_assert(KIND != BLOCKS or BLOCK_K == 64 or BLOCK_K == 128)
    tl.static_assert(KIND != BLOCKS or BLOCK_Q == 32 or BLOCK_Q == 64)
    TYPE: tl.constexpr = q_ptr.dtype.element_ty
    head = tl.program_id(0) % heads
    batch = (tl.program_id(0) // heads).to(tl.int64)
    grad_row = heads * (D0 + D1)
    at = head * (D0 + D1)
    grad_ptr += batch * queries * grad_row + at
    out_ptr += batch * queries * grad_row + at
    q_ptr += batch * q_batch + at
    k_ptr += batch * kv_batch + at
    v_ptr += batch * kv_batch + at
    dq_ptr += batch * dq_batch + at
    dk_ptr += batch * dkv_batch + at
    dv_ptr += batch * dkv_batch + at
    lse_ptr += (batch * heads + head) * queries
    delta_ptr += (batch * heads + head) * span * (3 if TAIL else 1)
    if KIND == ENDS:
        visible_ptr += batch * queries
    if TAIL:
        queries -= 1
        keys -= 1
        _tail(
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
            grad_row,
            q_row,
            kv_row,
            dq_row,
            dkv_row,
            queries,
            scale,
            scale2,
            D0,
            D1,
            ROWS,
        )
    else:
        _delta(grad_ptr, out_ptr, delta_ptr, grad_row, queries, D0, D1, ROWS)
    tl.debug_barrier()
    column0 = tl.arange(0, D0)
    column1 = D0 + tl.arange(0, max(D1, 1))
    for step in tl.range(0, tl.cdiv(keys, BLOCK_K)):
        index = tl.cdiv(keys, BLOCK_K) - 1 - step
        key = index * BLOCK_K + tl.arange(0, BLOCK_K)
        k0 = load_rows(k_ptr, key, column0, kv_row, keys, EVEN)
        v0 = load_rows(v_ptr, key, column0, kv_row, keys, EVEN)
        dk0 = tl.zeros((BLOCK_K, D0), tl.float32)
        dv0 = tl.zeros((BLOCK_K, D0), tl.float32)
        if D1 > 0:
            k1 = load_rows(k_ptr, key, column1, kv_row, keys, EVEN)
            v1 = load_rows(v_ptr, key, column1, kv_row, keys, EVEN)
            dk1 = tl.zeros((BLOCK_K, D1), tl.float32)
            dv1 = tl.zeros((BLOCK_K, D1), tl.float32)
        low = 0
        entry_ptr = visible_ptr
        if KIND == CAUSAL:
            low = tl.maximum(index * BLOCK_K - (keys - queries), 0) // BLOCK_Q * BLOCK_Q
        if KIND == BLOCKS:
            entry_ptr += index * SCHEDULE_ROW
            blocks = tl.load(entry_ptr) * (64 // BLOCK_Q)
        else:
            blocks = tl.cdiv(queries - low, BLOCK_Q)
        for block in tl.range(0, blocks, num_stages=2 * STAGES - 1 if KIND == BLOCKS else STAGES):
            if KIND == BLOCKS:
                entry = tl.load(entry_ptr + 1 + block // (64 // BLOCK_Q))
                start = entry // 2 * 64 + block % (64 // BLOCK_Q) * BLOCK_Q
                written = entry % 2 == 0
            else:
                start = low + block * BLOCK_Q
                written = (step > 0) | TAIL
                if KIND == CAUSAL:  # and the chunk before this one reached this block
                    written &= start + BLOCK_Q > (index + 1) * BLOCK_K - (keys - queries)
            query = start + tl.arange(0, BLOCK_Q)
            q0 = load_rows(q_ptr, query, column0, q_row, queries, EVEN)
            g0 = load_rows(grad_ptr, query, column0, grad_row, queries, EVEN)
            if D1 > 0:
                q1 = load_rows(q_ptr, query, column1, q_row, queries, EVEN)
                g1 = load_rows(grad_ptr, query, column1, grad_row, queries, EVEN)
            lse = _each(lse_ptr, query, queries, EVEN)
            delta = _each(delta_ptr, query, queries, EVEN)
            sT = tl.dot(k0, tl.trans(q0))
            dpT = tl.dot(v0, tl.trans(g0))
            if D1 > 0:
                sT = tl.dot(k1, tl.trans(q1), acc=sT)
                dpT = tl.dot(v1, tl.trans(g1), acc=dpT)
            sT = _mask(
                sT * scale2 - lse[None, :],
                visible_ptr,
                bits_ptr,
                key,
                start,
                queries,
                keys,
                words,
                chunk,
                KIND,
                BLOCK_Q,
                EVEN,
            )
            pT = tl.exp2(sT)
            dsT = (pT * (dpT - delta[None, :])).to(TYPE)
            pT = pT.to(TYPE)
            dv0 = tl.dot(pT, g0, acc=dv0)
            dk0 = tl.dot(dsT, q0, acc=dk0)
            if D1 > 0:
                dv1 = tl.dot(pT, g1, acc=dv1)
                dk1 = tl.dot(dsT, q1, acc=dk1)
            if not SWAP:
                dq0 = tl.dot(tl.trans(dsT), k0)
            else:
                dq0 = tl.trans(tl.dot(tl.trans(k0), dsT))
            _add(dq_ptr, query, column0, dq_row, queries, dq0 * scale, written, TAIL, EVEN)
            if D1 > 0:
                if not SWAP:
                    dq1 = tl.dot(tl.trans(dsT), k1)
                else:
                    dq1 = tl.trans(tl.dot(tl.trans(k1), dsT))
                _add(dq_ptr, query, column1, dq_row, queries, dq1 * scale, written, TAIL, EVEN)
        _finish(
            q_ptr + queries * q_row,
            grad_ptr + queries * grad_row,
            dk_ptr,
            dv_ptr,
            delta_ptr + span,
            span,
            key,
            column0,
            dkv_row,
            keys,
            dk0,
            dv0,
            scale,
            TAIL,
            EVEN,
        )
        if D1 > 0:
            _finish(
                q_ptr + queries * q_row,
                grad_ptr + queries * grad_row,
                dk_ptr,
                dv_ptr,
                delta_ptr + span,
                span,
                key,
                column1,
                dkv_row,
                keys,
                dk1,
                dv1,
                scale,
                TAIL,
                EVEN,
            )
        tl.debug_barrier()


@triton.jit
def _finish(
    q_ptr,
    grad_ptr,
    dk_ptr,
    dv_ptr,
    p_ptr,
    span,
    key,
    column,
    stride,
    keys,
    dk,
    dv,
    scale,
    TAIL: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Stores some columns of a chunk's dK and dV, with the last query's share where TAIL."""
    if TAIL:
        p = tl.load(p_ptr + key, mask=(key < keys) | EVEN, other=0.0)
        dv += p[:, None] * load_vector(grad_ptr, column)[None, :]
        ds = tl.load(p_ptr + span + key, mask=(key < keys) | EVEN, other=0.0)
        dk += ds[:, None] * load_vector(q_ptr, column)[None, :]
    store_rows(dv_ptr, key, column, stride, keys, dv, EVEN)
    store_rows(dk_ptr, key, column, stride, keys, dk * scale, EVEN)


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
    """Fills dq (B, N, H, D), dk and dv (B, M, H, D), strided with heads contiguous as q, k and v.

    grad and out (B, N, H, D) contiguous, lse (B, H, N) as `attention.forward` gives it. k and v are
    strided alike, dk and dv too.
    """
    (batch, queries, heads, width), keys, kind = q.shape, k.shape[1], kind_of(visible)
    if not batch * heads:
        return
    config = tuning.lookup("attention", variant("backward", kind, queries, keys), width, q.device)
    settings = _settings(kind, queries, keys, width, config)
    span = triton.cdiv(queries, 128) * 128
    delta = torch.empty(
        batch * heads * (3 if settings["TAIL"] else 1) * span, dtype=torch.float32, device=q.device
    )
    marks = visible.ends
    if kind == "blocks":
        marks = visible.schedule[2 + settings["BLOCK_K"] // 128]
    bits = visible.key_bits
    strides = [x.stride(i) for x in (q, k, dq, dk) for i in (0, 1)]
    _backward[(batch * heads,)](
        grad,
        q,
        k,
        v,
        out,
        lse,
        dq,
        dk,
        dv,
        delta,
        marks,
        bits,
        queries,
        keys,
        heads,
        0 if bits is None else bits.shape[1],
        visible.chunk,
        span,
        *strides,
        width**-0.5,
        width**-0.5 * math.log2(math.e),
        **settings,
    )


def _settings(kind: str, queries: int, keys: int, width: int, config: dict) -> dict:
    """The kernel's constants and options. SWAP: compute dQ^T = K^T dS^T instead of dQ, which has
    the 64 rows that wgmma needs where BLOCK_Q is 32. ROWS: of the passes before the first chunk."""
    config = {"SWAP": config["BLOCK_Q"] < 64} | config
    if keys <= 64:
        config["BLOCK_K"] = 64
    settings = constants(kind, queries, keys, width, config)
    return settings | dict(ROWS=32 if settings["TAIL"] else 32 * config["num_warps"])


_TYPES = (
    dict.fromkeys(("queries", "keys", "heads", "words", "chunk", "span"), "i32")
    | {f"{x}_{of}": "i32" for x in ("q", "kv", "dq", "dkv") for of in ("batch", "row")}
    | {f"{x}_ptr": "*bf16" for x in ("grad", "q", "k", "v", "out", "dq", "dk", "dv")}
    | dict(
        lse_ptr="*fp32",
        delta_ptr="*fp32",
        visible_ptr="*i32",
        bits_ptr="*i32",
        scale="fp32",
        scale2="fp32",
    )
)
# The last columns of dQ, transposed, have too few rows for wgmma.
_HMMA = {80: 8, 96: 16}
# Bytes of stack accepted, the most of Triton 3.6 and 3.7: lengths that do not fill the tiles, and
# widths that no model has.
_SPILLS = {
    ("sm_80", 64): 24,
    ("sm_80", 80): 80,
    ("sm_80", 96): 376,
    ("sm_80", 128): 8,
    ("sm_90", 80): 40,
}


_USED_BY = dict(visible_ptr=("ends", "blocks"), bits_ptr=("blocks",))


def compile_cases(arch: str):
    """The backward kernel for every width of heads; see offline.Case."""
    for kind, length, width, settings in offline_settings("backward", arch, _settings):
        spill = 0 if settings["EVEN"] and width <= 80 else _SPILLS.get((arch, width), 0)
        yield offline_case(
            "backward",
            _backward,
            kind,
            length,
            width,
            settings,
            _TYPES,
            _USED_BY,
            spill=spill,
            hmma=_HMMA.get(width, 0),
            why="dK, dV, S and dP fill the registers" if spill else "",
        )
