"""attention: softmax(scale * Q K^T) V over the keys that each query sees, exact, for short
sequences; packed QKV in, packed dQKV out.

    S_ij = q_i . k_j / sqrt(D)     P_ij = exp(S_ij - lse_i) where query i sees key j, else 0
    o_i  = sum_j P_ij v_j          lse_i = log sum_j exp(S_ij), statistics in float32

    dV_j = sum_i P_ij dO_i         delta_i = dO_i . o_i
    dS_ij = P_ij (dO_i . v_j - delta_i)
    dQ_i = sum_j dS_ij k_j / sqrt(D)     dK_j = sum_i dS_ij q_i / sqrt(D)

Who sees whom: everyone everything; causal, j <= i + M - N (queries are the last N of M keys); the
first ends[b, i] keys, per sequence; or a `grid.AttentionMask`, block-sparse, for all sequences.

The plain matmul form is the reference; in bf16 it also trains fastest on CPU at these lengths.
No dropout on the probabilities (a deviation from MAR, which drops 10% of them: it costs a fast
kernel; the projection's dropout stays). Suffixes: B sequences, N queries, M keys, H heads, D head
width.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from heptapod_fast.ops import dispatch
from heptapod_fast.ops.operators import differentiable, once, operator

if TYPE_CHECKING:
    from heptapod_fast.grid import AttentionMask

HEAD_DIMS = (32, 64, 80, 96, 128)
MAX_LENGTH = 1024
BLOCK = 64  # what masks are described in, and the smallest tile of queries


class Visible(NamedTuple):
    """Which keys a query sees, as the operators pass it on; everything by default.

    chunk: j // chunk == i // chunk. ends: (B, N) int32. The tensors of an AttentionMask.
    """

    causal: bool = False
    chunk: int = 0
    ends: Tensor | None = None
    schedule: Tensor | None = None
    row_bits: Tensor | None = None
    key_bits: Tensor | None = None


def attention(qkv: Tensor, *, causal: bool = False, mask: AttentionMask | None = None,
              implementation: str = "auto") -> Tensor:
    """Self-attention: qkv (B, N, 3, H, D) contiguous, as the projection writes it -> (B, N, H, D).

    mask: of N queries and N keys, on qkv's device; not with causal. implementation: "auto",
    "triton" (bfloat16 or float16, D in HEAD_DIMS, N up to MAX_LENGTH), "flash" (the flash-attn
    package; no mask), "sdpa" (PyTorch's) or "reference". Raises ValueError if the arguments do not
    fit, dispatch.Unavailable if the implementation asked for cannot take them.
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3 or not qkv.is_contiguous():
        raise ValueError("attention takes qkv (B, N, 3, H, D), contiguous as the projection writes "
                         f"it, got {_layout(qkv)}")
    batch, length, _, _, width = qkv.shape
    _check(qkv, length, length, causal, mask)
    chosen = dispatch.select("attention", qkv.device, qkv.dtype, implementation,
                             attention_limits(width, length, mask is not None))
    if chosen == "triton":
        return _triton(qkv, causal, mask)
    if chosen == "flash":
        from flash_attn import flash_attn_qkvpacked_func

        return flash_attn_qkvpacked_func(qkv, causal=causal, deterministic=True)
    q, k, v = qkv.unbind(2)
    return _plain(chosen, q, k, v, causal, None if mask is None else mask.dense_NM)


def cross_attention(q: Tensor, kv: Tensor, *, causal: bool = False, ends: Tensor | None = None,
                    mask: AttentionMask | None = None, implementation: str = "auto") -> Tensor:
    """Queries of one sequence against keys of another: q (B, N, H, D), kv (B, M, 2, H, D), the last
    two dimensions of both contiguous -> (B, N, H, D).

    causal: the queries are the last N of the M keys, N <= M (decoding with a cache). ends: (B, N)
    int32 or int64, 1 to M: query i sees the first ends[b, i] keys; values are not checked, outside
    1 to M the result is undefined. At most one of causal, ends and mask. The kernels take M up to
    MAX_LENGTH and any N. Otherwise as `attention`.
    """
    if (q.dim() != 4 or kv.dim() != 5 or kv.shape[2] != 2 or q.shape[0] != kv.shape[0]
            or q.shape[2:] != kv.shape[3:] or not _rows(q) or not _rows(kv)):
        raise ValueError("cross_attention takes q (B, N, H, D) and kv (B, M, 2, H, D), heads and "
                         "their widths contiguous, a sequence within 2^31 values, got "
                         f"{_layout(q)} and {_layout(kv)}")
    if q.dtype != kv.dtype or q.device != kv.device:
        raise ValueError(f"cross_attention takes q and kv of one dtype on one device, got {q.dtype}"
                         f" on {q.device} and {kv.dtype} on {kv.device}")
    length, keys = q.shape[1], kv.shape[1]
    _check(q, length, keys, causal, mask, ends)
    chosen = dispatch.select("attention", q.device, q.dtype, implementation,
                             attention_limits(q.shape[-1], keys,
                                              mask is not None or ends is not None))
    if chosen == "triton":
        if ends is not None:
            ends = ends.to(torch.int32).contiguous()
        return _cross_operator(q, kv, causal, ends, *_operands(mask))[0]
    if chosen == "flash":
        from flash_attn import flash_attn_kvpacked_func

        return flash_attn_kvpacked_func(q, kv, causal=causal, deterministic=True)
    k, v = kv.unbind(2)
    dense = None if mask is None else mask.dense_NM
    if ends is not None:
        dense = torch.arange(keys, device=q.device) < ends[:, None, :, None]
    return _plain(chosen, q, k, v, causal, dense)


def attention_limits(head_dim: int, keys: int, masked: bool) -> dict[str, str | None]:
    """{implementation: why it cannot take such tensors, or None}; masked: by ends or a mask."""
    kernel = flash = None
    if head_dim not in HEAD_DIMS:
        kernel = (f"heads are {head_dim} wide, there are kernels for "
                  f"{', '.join(map(str, HEAD_DIMS))}")
    elif keys > MAX_LENGTH:
        kernel = f"{keys} keys, at most {MAX_LENGTH} fit"
    if masked:
        flash = "it has no such mask; use triton, sdpa or reference"
    elif head_dim > 256:
        flash = f"heads are {head_dim} wide, at most 256 fit"
    return {"triton": kernel, "flash": flash}


def _layout(x: Tensor) -> str:
    return f"{tuple(x.shape)} with strides {x.stride()}"


def _rows(x: Tensor) -> bool:
    """Whether the heads of an element lie side by side, and a sequence within 2^31 values."""
    element = x.shape[-2] * x.shape[-1]
    return (x.stride(-1) == 1 and (x.shape[-2] == 1 or x.stride(-2) == x.shape[-1])
            and max(x.stride(1), element) * x.shape[1] < 2**31)


def _check(x: Tensor, queries: int, keys: int, causal: bool, mask: AttentionMask | None,
           ends: Tensor | None = None) -> None:
    if not x.is_floating_point():
        raise ValueError(f"attention takes floating-point tensors, got {x.dtype}")
    if not queries or not keys:
        raise ValueError(f"attention takes at least one query and one key, got {queries} queries "
                         f"and {keys} keys")
    if causal + (mask is not None) + (ends is not None) > 1:
        raise ValueError("attention takes one of causal, ends and mask, got several")
    if causal and queries > keys:
        raise ValueError(f"causal attention takes at most as many queries as keys, got {queries} "
                         f"queries and {keys} keys")
    if mask is not None and not hasattr(mask, "schedule"):
        raise ValueError(f"attention takes a grid.AttentionMask, got {type(mask).__name__}: "
                         "AttentionMask.from_dense(booleans) makes one, once")
    if mask is not None and (mask.num_queries, mask.num_keys) != (queries, keys):
        raise ValueError(f"the attention mask is for {mask.num_queries} queries and "
                         f"{mask.num_keys} keys, the tensors have {queries} and {keys}")
    if mask is not None and mask.schedule.device != x.device:
        raise ValueError(f"the attention mask is on {mask.schedule.device}, the tensors are on "
                         f"{x.device}: use mask.to(device), once")
    if ends is not None and (ends.shape != (x.shape[0], queries) or ends.device != x.device
                             or ends.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"attention takes ends {(x.shape[0], queries)} of int32 or int64 on "
                         f"{x.device}, got {ends.dtype} {tuple(ends.shape)} on {ends.device}")


# -------------------------------------------------------------------------------- plain PyTorch

def causal_mask(length: int, keys: int, device: torch.device) -> Tensor | None:
    """(length, keys) boolean, True where query i (of the last `length`) may look at key j."""
    if length == 1:
        return None
    visible = torch.ones(length, keys, dtype=torch.bool, device=device)
    return visible.tril(keys - length)


def _plain(implementation: str, q: Tensor, k: Tensor, v: Tensor, causal: bool,
           dense: Tensor | None) -> Tensor:
    """dense: boolean, True where a query may look, broadcastable to (B, H, N, M)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    length, keys = q.shape[2], k.shape[2]
    if causal and (length != keys or implementation == "reference"):
        dense, causal = causal_mask(length, keys, q.device), False
    if implementation == "sdpa":
        # is_causal aligns the first query with the first key: right for N = M alone.
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=dense, is_causal=causal)
    else:
        out = _reference(q, k, v, dense)
    return out.transpose(1, 2)


def _reference(q: Tensor, k: Tensor, v: Tensor, dense: Tensor | None) -> Tensor:
    scores_BHNM = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if dense is not None:
        scores_BHNM = scores_BHNM.masked_fill(~dense, float("-inf"))
    return scores_BHNM.softmax(dim=-1) @ v


# ------------------------------------------------------------------------------------- operators

def _triton(qkv: Tensor, causal: bool, mask: AttentionMask | None) -> Tensor:
    batch, length = qkv.shape[:2]
    chunk = 0
    if mask is None and not causal and 2 * length <= BLOCK:
        # Several short sequences share a tile, each a chunk of it.
        packed = next(p for p in range(BLOCK // length, 0, -1) if batch % p == 0)
        if packed > 1:
            qkv, chunk = qkv.view(batch // packed, packed * length, *qkv.shape[2:]), length
    out, _ = _operator(qkv, causal, chunk, *_operands(mask))
    return out.view(batch, length, *out.shape[2:])


def _operands(mask: AttentionMask | None) -> tuple[Tensor | None, ...]:
    return (None,) * 3 if mask is None else (mask.schedule, mask.row_bits, mask.key_bits)


def _forward(qkv, causal, chunk, schedule, row_bits, key_bits):
    from heptapod_fast.kernels import attention as kernels

    return kernels.forward(*qkv.unbind(2), Visible(causal, chunk, None, schedule, row_bits,
                                                   key_bits))


def _backward(grad, qkv, out, lse, causal, chunk, schedule, row_bits, key_bits):
    from heptapod_fast.kernels import attention_backward as kernels

    dqkv = torch.empty_like(qkv)
    kernels.backward(grad, *qkv.unbind(2), out, lse, *dqkv.unbind(2),
                     Visible(causal, chunk, None, schedule, row_bits, key_bits))
    return dqkv


def _with_heads(x: Tensor) -> Tensor:
    """x as the kernels read it; another layout comes from torch.compile only."""
    return x if _rows(x) else x.contiguous()


def _cross_forward(q, kv, causal, ends, schedule, row_bits, key_bits):
    from heptapod_fast.kernels import attention as kernels

    return kernels.forward(_with_heads(q), *_with_heads(kv).unbind(2),
                           Visible(causal, 0, ends, schedule, row_bits, key_bits))


def _cross_backward(grad, q, kv, out, lse, causal, ends, schedule, row_bits, key_bits):
    from heptapod_fast.kernels import attention_backward as kernels

    dq, dkv = q.new_empty(q.shape), kv.new_empty(kv.shape)
    kernels.backward(grad, _with_heads(q), *_with_heads(kv).unbind(2), out, lse, dq, *dkv.unbind(2),
                     Visible(causal, 0, ends, schedule, row_bits, key_bits))
    return dq, dkv


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """(out, base-2 log-sum-exp) for queries (B, N, H, D)."""
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, length), dtype=torch.float32)


def _setup(ctx, inputs, output) -> None:
    qkv, ctx.causal, ctx.chunk, *operands = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, *output, *operands)


def _gradient(ctx, grad: Tensor | None, _):
    if grad is None:
        return (None,) * 6
    qkv, out, lse, *operands = ctx.saved_tensors
    return (_backward_operator(grad.contiguous(), qkv, out, lse, ctx.causal, ctx.chunk, *operands),
            *(None,) * 5)


def _cross_setup(ctx, inputs, output) -> None:
    q, kv, ctx.causal, *operands = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, kv, *output, *operands)


def _cross_gradient(ctx, grad: Tensor | None, _):
    if grad is None:
        return (None,) * 7
    q, kv, out, lse, *operands = ctx.saved_tensors
    return (*_cross_backward_operator(grad.contiguous(), q, kv, out, lse, ctx.causal, *operands),
            *(None,) * 5)


_MASK = "Tensor? schedule, Tensor? row_bits, Tensor? key_bits"
_operator = operator(f"attention(Tensor qkv, bool causal, int chunk, {_MASK}) -> (Tensor, Tensor)",
                     _forward, lambda qkv, *_: _outputs(qkv[:, :, 0]))
_backward_operator = operator(
    "attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, bool causal, int chunk, "
    f"{_MASK}) -> Tensor", _backward, lambda grad, qkv, *_: torch.empty_like(qkv))
_cross_operator = operator(
    f"cross_attention(Tensor q, Tensor kv, bool causal, Tensor? ends, {_MASK}) "
    "-> (Tensor, Tensor)", _cross_forward, lambda q, *_: _outputs(q), strided=("q", "kv"))
_cross_backward_operator = operator(
    "cross_attention_backward(Tensor grad, Tensor q, Tensor kv, Tensor out, Tensor lse, "
    f"bool causal, Tensor? ends, {_MASK}) -> (Tensor, Tensor)", _cross_backward,
    lambda grad, q, kv, *_: (q.new_empty(q.shape), kv.new_empty(kv.shape)), strided=("q", "kv"))
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
dispatch.register("attention", "flash", _flash_check, avoid=lambda device, dtype: (
    "runs only when asked for"))
dispatch.register("attention", "sdpa", lambda device, dtype: None, avoid=_sdpa_avoided)
dispatch.register("attention", "reference", lambda device, dtype: None)
