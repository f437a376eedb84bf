"""LlamaGen's Transformer: RMSNorm, SwiGLU, rotary embedding in two dimensions, no biases.

Names of modules and parameters are those of the published files, so that these load as they are
(llamagen:autoregressive/models/gpt.py). Suffixes as in docs/legend.md; F is the width of the MLP.
"""

from __future__ import annotations

from torch import Tensor, nn

from heptapod_fast import ops
from heptapod_fast.model.dropout import Masks
from heptapod_fast.model.layers import Linear, RMSNorm
from heptapod_fast.model.transformer import Stream
from heptapod_fast.ops.dispatch import AUTO, Operators
from heptapod_fast.ops.masks import CAUSAL, Visible
from heptapod_fast.sampling.kv_cache import LayerCache


def mlp_width(width: int) -> int:
    """F: two thirds of 4 D, up to the next multiple of 256."""
    return -(-(8 * width // 3) // 256) * 256


class Attention(nn.Module):
    """Queries, keys and values of all heads in one product, and the product behind them."""

    def __init__(self, width: int, heads: int, operators: Operators = AUTO):
        super().__init__()
        self.heads = heads
        self.operators = operators
        self.wqkv = Linear(width, 3 * width, init="normal", bias=False)
        self.wo = Linear(width, width, init="normal", bias=False)

    def forward(
        self,
        y_BND: Tensor,
        table: Tensor,
        cache: LayerCache | None = None,
        visible: Visible = CAUSAL,
    ) -> Tensor:
        """Attention of normalised y, without dropout: (B, N, D).

        table: (N, E / 2, 2) of `ops.rotary`, for these elements. cache: keys and values of earlier
        elements, rotated, to which these are added; `visible` are its Ends then.
        """
        qkv_BN3HE = self.wqkv(y_BND).unflatten(-1, (3, self.heads, -1))
        qkv_BN3HE = ops.rotary(qkv_BN3HE, table, self.operators["rotary"])
        how = self.operators["attention"]
        if cache is None:
            out_BNHE = ops.attention(qkv_BN3HE, visible, how)
        else:
            kv_BM2HE = cache.append(qkv_BN3HE[:, :, 1:])
            how = ops.with_cache(how)
            out_BNHE = ops.cross_attention(qkv_BN3HE[:, :, 0], kv_BM2HE, visible, how)
        return self.wo(out_BNHE.flatten(-2))


class FeedForward(nn.Module):
    """w2(silu(w1 y) * (w3 y))."""

    def __init__(self, width: int, operators: Operators = AUTO):
        super().__init__()
        inner = mlp_width(width)
        self.operators = operators
        self.w1 = Linear(width, inner, init="normal", bias=False)
        self.w3 = Linear(width, inner, init="normal", bias=False)
        self.w2 = Linear(inner, width, init="normal", bias=False)

    def forward(self, y: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.w2(ops.swiglu(self.w1(y), self.w3(y), self.operators["swiglu"]))


class LlamaBlock(nn.Module):
    """Pre-norm block. Its dropout acts behind both of its branches."""

    SITES = 2
    NO_MASKS: Masks = (None,) * SITES

    def __init__(self, width: int, heads: int, operators: Operators = AUTO):
        super().__init__()
        self.attention_norm = RMSNorm(width, operators=operators)
        self.attention = Attention(width, heads, operators)
        self.ffn_norm = RMSNorm(width, operators=operators)
        self.feed_forward = FeedForward(width, operators)

    def forward(
        self,
        stream: Stream,
        table: Tensor,
        masks: Masks = NO_MASKS,
        cache: LayerCache | None = None,
        visible: Visible = CAUSAL,
    ) -> Stream:
        """A stream of (B, N, D) -> the same; arguments as of `Attention`."""
        after_attention, after_mlp = masks
        x, y = stream.normed(self.attention_norm)
        attended = self.attention(y, table, cache, visible)
        x, y = Stream(x, attended, mask=after_attention).normed(self.ffn_norm)
        return Stream(x, self.feed_forward(y), mask=after_mlp)


def block_flops(width: int, elements: float, keys: float) -> float:
    """Forward FLOPs of a block over `elements` that each see `keys` on average."""
    products = 4 * width**2 + 3 * width * mlp_width(width)
    return 2 * elements * (products + 2 * width * keys)
