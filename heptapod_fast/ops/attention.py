"""attention: softmax(scale * Q K^T) V over the keys that each query sees, exact, for short
sequences; packed QKV in, packed dQKV out.

    S_ij = q_i . k_j / sqrt(E)     P_ij = exp(S_ij - lse_i) where query i sees key j, else 0
    o_i  = sum_j P_ij v_j          lse_i = log sum_j exp(S_ij), statistics in float32

    dV_j = sum_i P_ij dO_i         delta_i = dO_i . o_i
    dS_ij = P_ij (dO_i . v_j - delta_i)
    dQ_i = sum_j dS_ij k_j / sqrt(E)     dK_j = sum_i dS_ij q_i / sqrt(E)

Who sees whom is one value, `visible`: see ops/masks.py.

The plain matmul form is the reference; in bf16 it also trains fastest on CPU at these lengths.
No dropout on the probabilities (a deviation from MAR, which drops 10% of them: it costs a fast
kernel; the projection's dropout stays). Suffixes: B sequences, N queries, M keys, H heads, E head
width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from heptapod_fast.ops import dispatch
from heptapod_fast.ops.masks import (
    BLOCK,
    FULL,
    HEAD_WIDTHS,
    MAX_LENGTH,
    AttentionMask,
    Causal,
    Ends,
    Full,
    Operands,
    Visible,
)
from heptapod_fast.ops.operators import Context, Gradients, Inputs, differentiable, once, operator

# What `watched_attention` has called while it lasts.
_WATCHERS: list[Callable[[Tensor, Tensor, Visible], None]] = []


@contextmanager
def watched_attention(watch: Callable[[Tensor, Tensor, Visible], None]) -> Iterator[None]:
    """While it lasts, each attention also calls watch(queries (B, N, H, E), keys (B, M, H, E), who
    sees whom), for those who look into a network; `attention_shares` makes its shares of them.
    Blocks that were compiled before may pass it by."""
    _WATCHERS.append(watch)
    try:
        yield
    finally:
        _WATCHERS.remove(watch)


def attention_shares(q: Tensor, k: Tensor, visible: Visible = FULL) -> Tensor:
    """How much each query takes of each key: (B, H, N, M) float32, rows that add up to 1.

    q: (B, N, H, E). k: (B, M, H, E). visible: as for `cross_attention`.
    """
    dense = _dense(visible, q.shape[1], k.shape[1], q.device)
    return _shares(q.float().transpose(1, 2), k.float().transpose(1, 2), dense)


def attention(qkv: Tensor, visible: Visible = FULL, implementation: str = "auto") -> Tensor:
    """Self-attention over packed queries, keys and values.

    Args:
        qkv: (B, N, 3, H, E) contiguous, as the projection writes it.
        visible: who sees whom: FULL, CAUSAL, or an AttentionMask of N queries and N keys on qkv's
            device.
        implementation: "auto", "triton" (bfloat16 or float16, E in HEAD_WIDTHS, N up to
            MAX_LENGTH), "flash" (the flash-attn package; FULL and CAUSAL only), "sdpa" (PyTorch's)
            or "reference".

    Returns:
        (B, N, H, E).

    Raises:
        ValueError: arguments that do not fit.
        dispatch.Unavailable: the implementation asked for cannot take them.
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3 or not qkv.is_contiguous():
        raise ValueError(
            "attention takes qkv (B, N, 3, H, E), contiguous as the projection writes "
            f"it, got {_layout(qkv)}"
        )
    _, length, _, _, width = qkv.shape
    if isinstance(visible, Ends):
        raise ValueError(
            "attention takes FULL, CAUSAL or an AttentionMask; Ends are for cross_attention"
        )
    _check(qkv, length, length, visible)
    for watch in _WATCHERS:
        watch(qkv[:, :, 0], qkv[:, :, 1], visible)
    chosen = dispatch.select(
        "attention", qkv.device, qkv.dtype, implementation, attention_limits(width, length, visible)
    )
    if chosen == "triton":
        return _triton(qkv, visible)
    if chosen == "flash":
        from flash_attn import flash_attn_qkvpacked_func

        return flash_attn_qkvpacked_func(
            qkv, causal=isinstance(visible, Causal), deterministic=True
        )
    q, k, v = qkv.unbind(2)
    return _plain(chosen, q, k, v, visible)


def cross_attention(
    q: Tensor, kv: Tensor, visible: Visible = FULL, implementation: str = "auto"
) -> Tensor:
    """Queries of one sequence against keys of another.

    Args:
        q: (B, N, H, E), the last two dimensions contiguous.
        kv: (B, M, 2, H, E), likewise.
        visible: who sees whom. CAUSAL: the queries are the last N of the M keys, N <= M (decoding
            with a cache). Ends: of shape (B, N).
        implementation: as for `attention`; the kernels take M up to MAX_LENGTH and any N.

    Returns:
        (B, N, H, E).

    Raises:
        ValueError, dispatch.Unavailable: as `attention`.
    """
    if (
        q.dim() != 4
        or kv.dim() != 5
        or kv.shape[2] != 2
        or q.shape[0] != kv.shape[0]
        or q.shape[2:] != kv.shape[3:]
        or not _has_packed_heads(q)
        or not _has_packed_heads(kv)
    ):
        raise ValueError(
            "cross_attention takes q (B, N, H, E) and kv (B, M, 2, H, E), heads and "
            "their widths contiguous, a sequence within 2^31 values, got "
            f"{_layout(q)} and {_layout(kv)}"
        )
    if q.dtype != kv.dtype or q.device != kv.device:
        raise ValueError(
            f"cross_attention takes q and kv of one dtype on one device, got {q.dtype}"
            f" on {q.device} and {kv.dtype} on {kv.device}"
        )
    keys = kv.shape[1]
    _check(q, q.shape[1], keys, visible)
    for watch in _WATCHERS:
        watch(q, kv[:, :, 0], visible)
    chosen = dispatch.select(
        "attention", q.device, q.dtype, implementation, attention_limits(q.shape[-1], keys, visible)
    )
    if chosen == "triton":
        operands = _operands(visible)
        return _cross_operator(
            q,
            kv,
            operands.causal,
            operands.ends,
            operands.schedule,
            operands.row_bits,
            operands.key_bits,
        )[0]
    if chosen == "flash":
        from flash_attn import flash_attn_kvpacked_func

        return flash_attn_kvpacked_func(
            q, kv, causal=isinstance(visible, Causal), deterministic=True
        )
    k, v = kv.unbind(2)
    return _plain(chosen, q, k, v, visible)


def with_cache(implementation: str) -> str:
    """What runs attention over a cache, whose queries see `Ends`: what was asked for, but not
    flash, which has no such mask and is meant for training."""
    return "auto" if implementation == "flash" else implementation


def attention_limits(head_width: int, keys: int, visible: Visible | type) -> dict[str, str | None]:
    """{implementation: why it cannot take such tensors, or None}, for `dispatch.choose`.

    visible: as for `attention`, or only its type where there is none yet.
    """
    kernel = flash = None
    if head_width not in HEAD_WIDTHS:
        kernel = (
            f"heads are {head_width} wide, there are kernels for {', '.join(map(str, HEAD_WIDTHS))}"
        )
    elif keys > MAX_LENGTH:
        kernel = f"{keys} keys, at most {MAX_LENGTH} fit"
    kind = visible if isinstance(visible, type) else type(visible)
    if kind in (Ends, AttentionMask):
        flash = "it has no such mask; use triton, sdpa or reference"
    elif head_width > 256:
        flash = f"heads are {head_width} wide, at most 256 fit"
    return {"triton": kernel, "flash": flash}


def _layout(x: Tensor) -> str:
    return f"{tuple(x.shape)} with strides {x.stride()}"


def _has_packed_heads(x: Tensor) -> bool:
    """Whether the heads of an element lie side by side, and a sequence within 2^31 values."""
    heads, width = x.shape[-2:]
    side_by_side = x.stride(-1) == 1 and (heads == 1 or x.stride(-2) == width)
    return side_by_side and max(x.stride(1), heads * width) * x.shape[1] < 2**31


def _check(x: Tensor, queries: int, keys: int, visible: Visible) -> None:
    """ValueError unless `visible` fits x (B, N, ...) and M keys."""
    if not x.is_floating_point():
        raise ValueError(f"attention takes floating-point tensors, got {x.dtype}")
    if not queries or not keys:
        raise ValueError(
            f"attention takes at least one query and one key, got {queries} queries and {keys} keys"
        )
    if isinstance(visible, Full):
        return
    if isinstance(visible, Causal):
        if queries > keys:
            raise ValueError(
                f"causal attention takes at most as many queries as keys, got "
                f"{queries} queries and {keys} keys"
            )
        return
    if isinstance(visible, Ends):
        ends = visible.ends_BN
        fits = ends.shape == (x.shape[0], queries) and ends.device == x.device
        if not fits or ends.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"attention takes ends {(x.shape[0], queries)} of int32 or int64 on "
                f"{x.device}, got {ends.dtype} {tuple(ends.shape)} on {ends.device}"
            )
        return
    if not isinstance(visible, AttentionMask):
        raise ValueError(
            f"attention takes FULL, CAUSAL, Ends or an AttentionMask (ops/masks.py), "
            f"got {type(visible).__name__}: AttentionMask.from_dense(booleans) makes "
            "one, once"
        )
    if (visible.num_queries, visible.num_keys) != (queries, keys):
        raise ValueError(
            f"the attention mask is for {visible.num_queries} queries and "
            f"{visible.num_keys} keys, the tensors have {queries} and {keys}"
        )
    if visible.schedule.device != x.device:
        raise ValueError(
            f"the attention mask is on {visible.schedule.device}, the tensors are on "
            f"{x.device}: use mask.to(device), once"
        )


# -------------------------------------------------------------------------------- plain PyTorch


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor | None:
    """(N, M) booleans, True where query i (of the last N) may look at key j; None for one query,
    which sees everything."""
    if queries == 1:
        return None
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def _dense(visible: Visible, queries: int, keys: int, device: torch.device) -> Tensor | None:
    """`visible` as booleans that broadcast to (B, H, N, M); None for everything."""
    if isinstance(visible, Causal):
        return causal_mask(queries, keys, device)
    if isinstance(visible, Ends):
        return torch.arange(keys, device=device) < visible.ends_BN[:, None, :, None]
    if isinstance(visible, AttentionMask):
        return visible.dense_NM
    return None


def _plain(implementation: str, q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
    """q (B, N, H, E), k and v (B, M, H, E) -> (B, N, H, E), by PyTorch's SDPA or the reference."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    queries = q.shape[2]
    keys = k.shape[2]
    if implementation == "sdpa":
        # is_causal aligns the first query with the first key: right for N = M alone.
        is_causal = isinstance(visible, Causal) and queries == keys
        dense = None if is_causal else _dense(visible, queries, keys, q.device)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=dense, is_causal=is_causal)
    else:
        out = _reference(q, k, v, _dense(visible, queries, keys, q.device))
    return out.transpose(1, 2)


def _reference(q_BHNE: Tensor, k_BHME: Tensor, v_BHME: Tensor, dense: Tensor | None) -> Tensor:
    """The definition. dense: booleans that broadcast to (B, H, N, M), True where a query sees."""
    return _shares(q_BHNE, k_BHME, dense) @ v_BHME


def _shares(q_BHNE: Tensor, k_BHME: Tensor, dense: Tensor | None) -> Tensor:
    scores_BHNM = (q_BHNE * q_BHNE.shape[-1] ** -0.5) @ k_BHME.transpose(-1, -2)
    if dense is not None:
        scores_BHNM = scores_BHNM.masked_fill(~dense, float("-inf"))
    return scores_BHNM.softmax(dim=-1)


# ------------------------------------------------------------------------------------- operators


def _operands(visible: Visible) -> Operands:
    """`visible` as the registered operators take it."""
    if isinstance(visible, Causal):
        return Operands(causal=True)
    if isinstance(visible, Ends):
        return Operands(ends=visible.ends_BN.to(torch.int32).contiguous())
    if isinstance(visible, AttentionMask):
        return Operands(
            schedule=visible.schedule, row_bits=visible.row_bits, key_bits=visible.key_bits
        )
    return Operands()


def _triton(qkv: Tensor, visible: Visible) -> Tensor:
    batch, length = qkv.shape[:2]
    operands = _operands(visible)
    if isinstance(visible, Full) and 2 * length <= BLOCK:
        # Several short sequences share a tile, each a chunk of it.
        packed = next(p for p in range(BLOCK // length, 0, -1) if batch % p == 0)
        if packed > 1:
            qkv = qkv.view(batch // packed, packed * length, *qkv.shape[2:])
            operands = operands._replace(chunk=length)
    out, _ = _operator(
        qkv,
        operands.causal,
        operands.chunk,
        operands.schedule,
        operands.row_bits,
        operands.key_bits,
    )
    return out.view(batch, length, *out.shape[2:])


def _forward(qkv, causal, chunk, schedule, row_bits, key_bits):
    from heptapod_fast.kernels import attention as kernels

    return kernels.forward(
        *qkv.unbind(2), Operands(causal, chunk, None, schedule, row_bits, key_bits)
    )


def _backward(grad, qkv, out, lse, causal, chunk, schedule, row_bits, key_bits):
    from heptapod_fast.kernels import attention_backward as kernels

    dqkv = torch.empty_like(qkv)
    kernels.backward(
        grad,
        *qkv.unbind(2),
        out,
        lse,
        *dqkv.unbind(2),
        Operands(causal, chunk, None, schedule, row_bits, key_bits),
    )
    return dqkv


def _with_heads(x: Tensor) -> Tensor:
    """x as the kernels read it; another layout comes from torch.compile only."""
    return x if _has_packed_heads(x) else x.contiguous()


def _cross_forward(q, kv, causal, ends, schedule, row_bits, key_bits):
    from heptapod_fast.kernels import attention as kernels

    return kernels.forward(
        _with_heads(q),
        *_with_heads(kv).unbind(2),
        Operands(causal, 0, ends, schedule, row_bits, key_bits),
    )


def _cross_backward(grad, q, kv, out, lse, causal, ends, schedule, row_bits, key_bits):
    from heptapod_fast.kernels import attention_backward as kernels

    dq = q.new_empty(q.shape)
    dkv = kv.new_empty(kv.shape)
    kernels.backward(
        grad,
        _with_heads(q),
        *_with_heads(kv).unbind(2),
        out,
        lse,
        dq,
        *dkv.unbind(2),
        Operands(causal, 0, ends, schedule, row_bits, key_bits),
    )
    return dq, dkv


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """(out, base-2 log-sum-exp) for queries (B, N, H, E)."""
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, length), dtype=torch.float32)


def _setup(ctx: Context, inputs: Inputs, output: Any) -> None:
    qkv, ctx.causal, ctx.chunk, *operands = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, *output, *operands)


def _gradient(ctx: Context, grad: Tensor | None, _: None) -> Gradients:
    if grad is None:
        return (None,) * 6
    qkv, out, lse, *operands = ctx.saved_tensors
    return (
        _backward_operator(grad.contiguous(), qkv, out, lse, ctx.causal, ctx.chunk, *operands),
        *(None,) * 5,
    )


def _cross_setup(ctx: Context, inputs: Inputs, output: Any) -> None:
    q, kv, ctx.causal, *operands = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, kv, *output, *operands)


def _cross_gradient(ctx: Context, grad: Tensor | None, _: None) -> Gradients:
    if grad is None:
        return (None,) * 7
    q, kv, out, lse, *operands = ctx.saved_tensors
    return (
        *_cross_backward_operator(grad.contiguous(), q, kv, out, lse, ctx.causal, *operands),
        *(None,) * 5,
    )


_MASK = "Tensor? schedule, Tensor? row_bits, Tensor? key_bits"
_operator = operator(
    f"attention(Tensor qkv, bool causal, int chunk, {_MASK}) -> (Tensor, Tensor)",
    _forward,
    lambda qkv, *_: _outputs(qkv[:, :, 0]),
)
_backward_operator = operator(
    "attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, bool causal, int chunk, "
    f"{_MASK}) -> Tensor",
    _backward,
    lambda grad, qkv, *_: torch.empty_like(qkv),
)
_cross_operator = operator(
    f"cross_attention(Tensor q, Tensor kv, bool causal, Tensor? ends, {_MASK}) -> (Tensor, Tensor)",
    _cross_forward,
    lambda q, *_: _outputs(q),
    strided=("q", "kv"),
)
_cross_backward_operator = operator(
    "cross_attention_backward(Tensor grad, Tensor q, Tensor kv, Tensor out, Tensor lse, "
    f"bool causal, Tensor? ends, {_MASK}) -> (Tensor, Tensor)",
    _cross_backward,
    lambda grad, q, kv, *_: (q.new_empty(q.shape), kv.new_empty(kv.shape)),
    strided=("q", "kv"),
)
differentiable(_operator, _gradient, _setup)
differentiable(_cross_operator, _cross_gradient, _cross_setup)
once(_backward_operator, "attention")
once(_cross_backward_operator, "attention")


# -------------------------------------------------------------------------------- registration


def _triton_check(device: torch.device, dtype: torch.dtype) -> str | None:
    return dispatch.triton_check(device, dtype, (torch.bfloat16, torch.float16))


_no_flash = importlib.util.find_spec("flash_attn") is None


def _flash_check(device: torch.device, dtype: torch.dtype) -> str | None:
    if _no_flash:
        return "flash-attn is not installed: pip install flash-attn --no-build-isolation"
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16 on cuda, these are {dtype} on {device.type}"
    return None


def _sdpa_avoided(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type == "cpu":
        return "its bf16 backward is slower than plain matmuls on CPU"
    return None


dispatch.register("attention", "triton", _triton_check, avoid=dispatch.avoid_interpreter)
dispatch.register(
    "attention", "flash", _flash_check, avoid=lambda device, dtype: "runs only when asked for"
)
dispatch.register("attention", "sdpa", lambda device, dtype: None, avoid=_sdpa_avoided)
dispatch.register("attention", "reference", lambda device, dtype: None)
