"""attention: softmax(scale * Q K^T + mask) V, exact, for short sequences.

    S_ij = q_i . k_j / sqrt(D)          causal: j <= i + M - N (queries are the last N of M keys)
    P    = softmax_j(S)                 statistics in float32
    o_i  = sum_j P_ij v_j

The plain matmul form is the reference; at a few hundred tokens it is also the fastest on CPU.
No dropout on the probabilities (a deviation from MAR, which drops 10% of them: it costs a fast
kernel; the projection's dropout stays).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from heptapod_fast.ops import dispatch


def attention(q_BNHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor, *, causal: bool = False,
              mask: Tensor | None = None, implementation: str = "reference") -> Tensor:
    """q (B, N, H, D), k and v (B, M, H, D), N <= M where causal -> (B, N, H, D) in q's dtype.

    mask: boolean, True where a query may look, broadcastable to (B, H, N, M); not with causal.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BNHD, k_BMHD, v_BMHD))
    length, keys = q.shape[2], k.shape[2]
    if causal and (length != keys or implementation == "reference"):
        mask = causal_mask(length, keys, q.device)
    if implementation == "sdpa":
        # is_causal aligns the first query with the first key: right for N = M alone.
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask,
                                             is_causal=causal and length == keys)
    else:
        out = _reference(q, k, v, mask)
    return out.transpose(1, 2)


def causal_mask(length: int, keys: int, device: torch.device) -> Tensor | None:
    """(length, keys) boolean, True where query i (of the last `length`) may look at key j."""
    if length == 1:
        return None
    visible = torch.ones(length, keys, dtype=torch.bool, device=device)
    return visible.tril(keys - length)


def _reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores_BHNM = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores_BHNM = scores_BHNM.masked_fill(~mask, float("-inf"))
    return scores_BHNM.softmax(dim=-1) @ v


def _sdpa_avoided(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type == "cpu":
        return "its backward is slower than plain matmuls on CPU"
    return None


dispatch.register("attention", "sdpa", lambda device, dtype: None, avoid=_sdpa_avoided)
dispatch.register("attention", "reference", lambda device, dtype: None)
