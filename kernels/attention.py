"""attention: see `heptapod_fast.ops.attention`. One launch forward, one backward, no atomics.

At 256 elements a pass is memory-bound on Hopper, so bytes decide: q, k and v are read in place from
the packed projection, D = 80 and 96 are two tiles (64 + 16, 64 + 32) and never padded, and element
257 is a rank-1 update on CUDA cores instead of another tile. Who sees whom is a constant of the
compiled kernel (KIND); lengths are not, because a KV cache grows by one each step.

Forward: a program takes BLOCK_Q queries of one head and goes through the keys with the online
softmax, in base 2. The backward pass is in attention_backward.py.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from heptapod_fast.kernels import offline, tuning
from heptapod_fast.ops.masks import BLOCK, HEAD_WIDTHS, MAX_LENGTH, Operands

KINDS = dict(full=0, causal=1, chunk=2, ends=3, blocks=4)
FULL, CAUSAL, CHUNK, ENDS, BLOCKS = (tl.constexpr(value) for value in KINDS.values())
SCHEDULE_ROW = tl.constexpr(MAX_LENGTH // BLOCK + 1)


@triton.jit
def load_rows(ptr, row, column, stride, end, EVEN: tl.constexpr):
    """Some columns of some rows; zeros for rows from `end` on, which EVEN says do not occur."""
    at = ptr + row[:, None] * stride + column[None, :]
    if EVEN:
        return tl.load(at)
    return tl.load(at, mask=(row < end)[:, None], other=0.0)


@triton.jit
def store_rows(ptr, row, column, stride, end, value, EVEN: tl.constexpr):
    """The rows before `end` only."""
    at = ptr + row[:, None] * stride + column[None, :]
    value = value.to(ptr.dtype.element_ty)
    if EVEN:
        tl.store(at, value)
    else:
        tl.store(at, value, mask=(row < end)[:, None])


@triton.jit
def load_vector(ptr, column):
    """float32."""
    return tl.load(ptr + column).to(tl.float32)


@triton.jit
def _last_row(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    last,
    kv_row,
    scale,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Query `last` against keys 0..last, on CUDA cores; all pointers but k's and v's at it.

    BLOCK_K softmaxes run side by side, one per place in a block, and are joined at the end: within
    the loop nothing is summed across keys, so nothing waits.
    """
    column0 = tl.arange(0, D0)
    column1 = D0 + tl.arange(0, max(D1, 1))
    q0 = load_vector(q_ptr, column0) * scale
    score = tl.sum(q0 * load_vector(k_ptr + last * kv_row, column0))
    acc0 = tl.zeros((BLOCK_K, D0), tl.float32)
    if D1 > 0:
        q1 = load_vector(q_ptr, column1) * scale
        score += tl.sum(q1 * load_vector(k_ptr + last * kv_row, column1))
        acc1 = tl.zeros((BLOCK_K, D1), tl.float32)
    largest = tl.full((BLOCK_K,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for start in tl.range(0, last, BLOCK_K, num_stages=STAGES):
        key = start + tl.arange(0, BLOCK_K)
        k0 = load_rows(k_ptr, key, column0, kv_row, last, True).to(tl.float32)
        s = tl.sum(k0 * q0[None, :], 1)
        if D1 > 0:
            k1 = load_rows(k_ptr, key, column1, kv_row, last, True).to(tl.float32)
            s += tl.sum(k1 * q1[None, :], 1)
        new = tl.maximum(largest, s)
        p = tl.exp2(s - new)
        rescale = tl.exp2(largest - new)
        total = total * rescale + p
        v0 = load_rows(v_ptr, key, column0, kv_row, last, True).to(tl.float32)
        acc0 = acc0 * rescale[:, None] + p[:, None] * v0
        if D1 > 0:
            v1 = load_rows(v_ptr, key, column1, kv_row, last, True).to(tl.float32)
            acc1 = acc1 * rescale[:, None] + p[:, None] * v1
        largest = new
    most = tl.maximum(tl.max(largest), score)
    rescale = tl.exp2(largest - most)
    p = tl.exp2(score - most)
    sum = tl.sum(total * rescale) + p
    out0 = tl.sum(acc0 * rescale[:, None], 0) + p * load_vector(v_ptr + last * kv_row, column0)
    tl.store(out_ptr + column0, (out0 / sum).to(out_ptr.dtype.element_ty))
    if D1 > 0:
        out1 = tl.sum(acc1 * rescale[:, None], 0) + p * load_vector(v_ptr + last * kv_row, column1)
        tl.store(out_ptr + column1, (out1 / sum).to(out_ptr.dtype.element_ty))
    tl.store(lse_ptr, most + tl.log2(sum))


@triton.jit
def _visible(
    s,
    row,
    key,
    start,
    offset,
    keys,
    chunk,
    end,
    bits_at,
    words,
    KIND: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Scores, -inf where the query does not see the key."""
    if KIND == BLOCKS:
        low = tl.load(bits_at + start // 32 * words)
        high = tl.load(bits_at + (start // 32 + 1) * words)
        column = key - start
        bits = tl.where((column < 32)[None, :], low[:, None], high[:, None])
        return tl.where(((bits >> (column & 31)[None, :]) & 1) != 0, s, float("-inf"))
    if KIND == CAUSAL:
        return tl.where(key[None, :] <= row[:, None] + offset, s, float("-inf"))
    if KIND == ENDS:
        return tl.where(key[None, :] < end[:, None], s, float("-inf"))
    if KIND == CHUNK:
        return tl.where((key // chunk)[None, :] == (row // chunk)[:, None], s, float("-inf"))
    if not EVEN:
        return tl.where((key < keys)[None, :], s, float("-inf"))
    return s


@triton.jit
def _block(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    ends_ptr,
    schedule_ptr,
    bits_ptr,
    block,
    queries,
    keys,
    chunk,
    words,
    q_row,
    kv_row,
    out_row,
    scale,
    KIND: tl.constexpr,
    TAIL: tl.constexpr,
    EVEN: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BLOCK_Q queries of one head; pointers are at the first one of the sequence and head."""
    # What the schedule of a mask, and keys up to the last one, are cut into.
    tl.static_assert(BLOCK_K == 64 or (KIND != BLOCKS and not TAIL))
    tl.static_assert(BLOCK_Q == 64 or BLOCK_Q == 128)
    limit = queries - TAIL
    column0 = tl.arange(0, D0)
    column1 = D0 + tl.arange(0, max(D1, 1))
    row = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q0 = load_rows(q_ptr, row, column0, q_row, limit, EVEN)
    if D1 > 0:
        q1 = load_rows(q_ptr, row, column1, q_row, limit, EVEN)
    if TAIL:
        # The last key begins the softmax.
        last = limit * kv_row
        largest = tl.sum(q0.to(tl.float32) * load_vector(k_ptr + last, column0)[None, :], 1)
        acc0 = tl.zeros((BLOCK_Q, D0), tl.float32) + load_vector(v_ptr + last, column0)[None, :]
        if D1 > 0:
            largest += tl.sum(q1.to(tl.float32) * load_vector(k_ptr + last, column1)[None, :], 1)
            acc1 = tl.zeros((BLOCK_Q, D1), tl.float32) + load_vector(v_ptr + last, column1)[None, :]
        largest *= scale
        total = tl.full((BLOCK_Q,), 1.0, tl.float32)
    else:
        largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_Q,), tl.float32)
        acc0 = tl.zeros((BLOCK_Q, D0), tl.float32)
        if D1 > 0:
            acc1 = tl.zeros((BLOCK_Q, D1), tl.float32)
    offset = keys - queries
    end = row
    bits_at = row
    if KIND == ENDS:
        end = tl.minimum(tl.load(ends_ptr + row, mask=row < queries, other=0), keys)
        steps = tl.cdiv(tl.max(end), BLOCK_K)
    elif KIND == BLOCKS:
        schedule_ptr += block * SCHEDULE_ROW
        steps = tl.load(schedule_ptr)
        bits_at = bits_ptr + row
    elif KIND == CAUSAL:
        steps = tl.cdiv(tl.minimum(keys, (block + 1) * BLOCK_Q + offset), BLOCK_K)
    else:
        steps = tl.cdiv(keys - TAIL, BLOCK_K)
    for step in tl.range(0, steps, num_stages=STAGES):
        start = step * BLOCK_K
        if KIND == BLOCKS:
            start = tl.load(schedule_ptr + 1 + step) * BLOCK_K
        key = start + tl.arange(0, BLOCK_K)
        k0 = load_rows(k_ptr, key, column0, kv_row, keys, EVEN)
        s = tl.dot(q0, tl.trans(k0))
        if D1 > 0:
            k1 = load_rows(k_ptr, key, column1, kv_row, keys, EVEN)
            s = tl.dot(q1, tl.trans(k1), s)
        s = _visible(s, row, key, start, offset, keys, chunk, end, bits_at, words, KIND, EVEN)
        new = tl.maximum(largest, tl.max(s, 1) * scale)
        base = new
        if KIND == ENDS or KIND == BLOCKS:
            # A row may see its first key in a later block.
            base = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s * scale - base[:, None])
        rescale = tl.exp2(largest - base)
        total = total * rescale + tl.sum(p, 1)
        largest = new
        v0 = load_rows(v_ptr, key, column0, kv_row, keys, EVEN)
        p = p.to(v0.dtype)
        acc0 = tl.dot(p, v0, acc0 * rescale[:, None])
        if D1 > 0:
            v1 = load_rows(v_ptr, key, column1, kv_row, keys, EVEN)
            acc1 = tl.dot(p, v1, acc1 * rescale[:, None])
    store_rows(out_ptr, row, column0, out_row, limit, acc0 / total[:, None], EVEN)
    if D1 > 0:
        store_rows(out_ptr, row, column1, out_row, limit, acc1 / total[:, None], EVEN)
    lse = largest + tl.log2(total)
    if EVEN:
        tl.store(lse_ptr + row, lse)
    else:
        tl.store(lse_ptr + row, lse, mask=row < limit)


@triton.jit(do_not_specialize=["queries", "keys", "heads", "blocks", "chunk", "words"])
def _forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    ends_ptr,
    schedule_ptr,
    bits_ptr,
    queries,
    keys,
    heads,
    blocks,
    chunk,
    words,
    q_batch,
    q_row,
    kv_batch,
    kv_row,
    scale,
    KIND: tl.constexpr,
    TAIL: tl.constexpr,
    EVEN: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Blocks of one head run side by side; the longest of a causal head begin first.
    program = tl.program_id(0)
    block = blocks - 1 - program % blocks
    pair = program // blocks
    batch = (pair // heads).to(tl.int64)
    head = pair % heads
    D: tl.constexpr = D0 + D1
    q_ptr += batch * q_batch + head * D
    k_ptr += batch * kv_batch + head * D
    v_ptr += batch * kv_batch + head * D
    out_ptr += batch * queries * heads * D + head * D
    lse_ptr += pair.to(tl.int64) * queries
    out_row = heads * D
    if KIND == ENDS:
        ends_ptr += batch * queries
    limit = queries - TAIL
    # Two calls, of which TAIL leaves one branch: a branch without it would stay in every kernel.
    if TAIL:
        if block == blocks - 1:
            _last_row(
                q_ptr + limit * q_row,
                k_ptr,
                v_ptr,
                out_ptr + limit * out_row,
                lse_ptr + limit,
                limit,
                kv_row,
                scale,
                D0,
                D1,
                BLOCK_K,
                STAGES,
            )
        else:
            _block(
                q_ptr,
                k_ptr,
                v_ptr,
                out_ptr,
                lse_ptr,
                ends_ptr,
                schedule_ptr,
                bits_ptr,
                block,
                queries,
                keys,
                chunk,
                words,
                q_row,
                kv_row,
                out_row,
                scale,
                KIND,
                TAIL,
                EVEN,
                D0,
                D1,
                BLOCK_Q,
                BLOCK_K,
                STAGES,
            )
    else:
        _block(
            q_ptr,
            k_ptr,
            v_ptr,
            out_ptr,
            lse_ptr,
            ends_ptr,
            schedule_ptr,
            bits_ptr,
            block,
            queries,
            keys,
            chunk,
            words,
            q_row,
            kv_row,
            out_row,
            scale,
            KIND,
            TAIL,
            EVEN,
            D0,
            D1,
            BLOCK_Q,
            BLOCK_K,
            STAGES,
        )


def split(width: int) -> tuple[int, int]:
    """A head's width as two tiles of columns: 80 = 64 + 16, 64 = 64 + 0."""
    main = 1 << (width.bit_length() - 1)
    return main, width - main


def kind_of(visible: Operands) -> str:
    """The name in KINDS."""
    if visible.schedule is not None:
        return "blocks"
    if visible.ends is not None:
        return "ends"
    return "causal" if visible.causal else "chunk" if visible.chunk else "full"


def has_tail(kind: str, queries: int, keys: int) -> bool:
    """Whether the last element is a rank-1 update."""
    return kind == "full" and queries == keys and queries > 64 and queries % 64 == 1


def variant(direction: str, kind: str, queries: int, keys: int) -> str:
    """The name in the table of configurations."""
    if has_tail(kind, queries, keys):
        return f"{direction}_tail"
    plain = kind in ("full", "causal") and queries % 64 == 0 and keys % 64 == 0
    return f"{direction}_{kind if plain else 'masked'}"


def constants(kind: str, queries: int, keys: int, width: int, config: dict) -> dict:
    """What both kernels are compiled for, with the tiles and options of `config`.

    EVEN: queries and keys fill their tiles, no bounds to check.
    """
    tail = has_tail(kind, queries, keys)
    even = all(
        (length - tail) % config[tile] == 0
        for length, tile in ((queries, "BLOCK_Q"), (keys, "BLOCK_K"))
    )
    main, rest = split(width)
    return dict(config, KIND=KINDS[kind], TAIL=tail, EVEN=even, D0=main, D1=rest)


def forward(q: Tensor, k: Tensor, v: Tensor, visible: Operands) -> tuple[Tensor, Tensor]:
    """q (B, N, H, D), k and v (B, M, H, D), strided alike, heads contiguous -> out (B, N, H, D),
    base-2 log-sum-exp (B, H, N) float32.
    """
    (batch, queries, heads, width), keys = q.shape, k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    kind = kind_of(visible)
    if kind == "chunk" and (queries > 64 or queries % visible.chunk):
        raise ValueError(f"chunks of {visible.chunk} must fill the one tile of {queries} queries")
    config = tuning.lookup("attention", variant("forward", kind, queries, keys), width, q.device)
    settings = constants(kind, queries, keys, width, config)
    blocks = triton.cdiv(queries - settings["TAIL"], config["BLOCK_Q"]) + settings["TAIL"]
    bits, schedule = visible.row_bits, None
    if kind == "blocks":
        schedule = visible.schedule[config["BLOCK_Q"] // 128]
    if batch * heads:
        _forward[(blocks * batch * heads,)](
            q,
            k,
            v,
            out,
            lse,
            visible.ends,
            schedule,
            bits,
            queries,
            keys,
            heads,
            blocks,
            visible.chunk,
            0 if bits is None else bits.shape[1],
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            width**-0.5 * math.log2(math.e),
            **settings,
        )
    return out, lse


_TYPES = dict(
    q_ptr="*bf16",
    k_ptr="*bf16",
    v_ptr="*bf16",
    out_ptr="*bf16",
    lse_ptr="*fp32",
    queries="i32",
    keys="i32",
    heads="i32",
    blocks="i32",
    chunk="i32",
    words="i32",
    q_batch="i32",
    q_row="i32",
    kv_batch="i32",
    kv_row="i32",
    scale="fp32",
    ends_ptr="*i32",
    schedule_ptr="*i32",
    bits_ptr="*i32",
)
_USED_BY = dict(ends_ptr=("ends",), schedule_ptr=("blocks",), bits_ptr=("blocks",))


def shapes(width: int) -> list[tuple[str, int]]:
    """(kind, length) of what is compiled offline for a width of heads."""
    if width not in (64, 80):
        return [("full", 257), ("causal", 255)]
    return [
        ("full", 256),
        ("causal", 256),
        ("full", 257),
        ("full", 321),
        ("full", 255),
        ("blocks", 512),
        ("blocks", 514),
        ("ends", 100),
        ("chunk", 51),
    ]


def offline_case(
    direction: str,
    kernel,
    kind: str,
    length: int,
    width: int,
    settings: dict,
    types: dict[str, str],
    used_by: dict[str, tuple[str, ...]],
    **expected,
) -> offline.Case:
    """used_by: which kinds of masks pass a pointer; expected: as offline.Case takes it."""
    absent = {pointer: None for pointer, kinds in used_by.items() if kind not in kinds}
    constexprs = absent | settings
    options = dict(num_warps=constexprs.pop("num_warps"))
    types = {name: type for name, type in types.items() if name not in absent}
    return offline.Case(
        f"attention {direction}, {kind} {length}, D {width}",
        kernel,
        types,
        constexprs,
        options,
        tensor_cores=True,
        **expected,
    )


def offline_settings(direction: str, arch: str, settings_of=constants):
    """(kind, length, width, settings of the kernel) of everything compiled offline."""
    for width in HEAD_WIDTHS:
        for kind, length in shapes(width):
            name = variant(direction, kind, length, length)
            config = tuning.config("attention", name, width, arch)
            yield kind, length, width, settings_of(kind, length, length, width, config)


def compile_cases(arch: str):
    """The forward kernel for every width of heads; see offline.Case."""
    for kind, length, width, settings in offline_settings("forward", arch):
        # 16 warps on an SM hide each other's waits; what is even is what the models run.
        warps = {64: 16, 80: 12}.get(width, 4) if settings["EVEN"] else 4
        yield offline_case(
            "forward",
            _forward,
            kind,
            length,
            width,
            settings,
            _TYPES,
            _USED_BY,
            ctas=max(1, warps // settings["num_warps"]),
        )
