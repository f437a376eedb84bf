"""Transformer blocks and the causal backbone.

A block is MAR's (timm's ViT block): pre-LayerNorm with eps 1e-6, fused qkv with bias, MLP of 4 x D
with erf GELU. Products run in the dtype of the activations, which is chosen once, where a sequence
is embedded. In bf16 the residual stream is bf16 too, where MAR's autocast keeps it in float32;
normalisation statistics and losses are float32.

A block knows neither its place in the network nor who sees whom: both are handed to it, so that
torch.compile sees one block, and whatever wraps a block (sharding, recomputation) finds everything
it needs in its arguments. Suffixes as in docs/legend.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heptapod_fast import grid as gridlib
from heptapod_fast import ops
from heptapod_fast.model.dropout import NO_DROPOUT, Dropout, Masks
from heptapod_fast.model.layers import Embedding, LayerNorm, Linear, Modules, RMSNorm
from heptapod_fast.ops.checks import at_least_float32
from heptapod_fast.ops.dispatch import AUTO, Operators
from heptapod_fast.ops.masks import CAUSAL, FULL, Causal, Visible
from heptapod_fast.sampling.kv_cache import KVCache, LayerCache


class Stream(NamedTuple):
    """The residual stream: x + dropout(branch + bias), the sum not taken yet.

    The next LayerNorm takes it in the same pass over memory, and its backward pass yields the
    bias's gradient on the way.

    x, branch: (..., D). bias: (D,) float32. mask: dropout of the branch.
    """

    x: Tensor
    branch: Tensor | None = None
    bias: Tensor | None = None
    mask: ops.DropoutMask | None = None

    def normed(self, norm: LayerNorm | RMSNorm) -> tuple[Tensor, Tensor]:
        """(the sum, its norm)."""
        if self.branch is None:
            return self.x, norm(self.x)
        return norm.after(self.x, self.branch, self.bias, self.mask)

    def value(self) -> Tensor:
        """The sum alone."""
        if self.branch is None:
            return self.x
        branch = self.branch
        if self.bias is not None:
            branch = branch + self.bias.to(self.x.dtype)
        return self.x + ops.dropout(branch, self.mask)


class Packing(NamedTuple):
    """Some elements of a batch of sequences, packed: row r is element element_R[r] of sequence
    sequence_R[r]."""

    sequence_R: Tensor
    element_R: Tensor


class Block(nn.Module):
    """Pre-norm Transformer block.

    Its dropout acts at three sites: after the attention's projection, after the GELU, and after the
    MLP's second product.
    """

    SITES = 3
    NO_MASKS: Masks = (None,) * SITES

    def __init__(self, width: int, heads: int, operators: Operators = AUTO):
        super().__init__()
        self.heads = heads
        self.operators = operators
        self.norm1 = LayerNorm(width, operators=operators)
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.norm2 = LayerNorm(width, operators=operators)
        self.fc1 = Linear(width, 4 * width)
        self.fc2 = Linear(4 * width, width)

    def forward(
        self,
        stream: Stream,
        visible: Visible = FULL,
        masks: Masks = NO_MASKS,
        cache: LayerCache | None = None,
        packing: Packing | None = None,
    ) -> Stream:
        """A stream of (B, N, D) -> the same, or of packed rows (R, D).

        Args:
            visible: who sees whom.
            masks: dropout of the three sites; with `packing` those of the rows (`Dropout.packed`).
            cache: keys and values of earlier elements, to which these elements are added;
                `visible` are Ends then.
            packing: only these elements come out. They are gathered after attention: projection and
                MLP never see the others.
        """
        x, y_BND = stream.normed(self.norm1)
        attended = self.attend(y_BND, visible, cache)
        if packing is not None:
            row_R = packing.sequence_R * x.shape[1] + packing.element_R
            x = self._gather(x, row_R)
            attended = self._gather(attended, row_R)
        return self.finish(x, attended, masks)

    def attend(self, y_BND: Tensor, visible: Visible, cache: LayerCache | None = None) -> Tensor:
        """Attention between its two products, of normalised y: (B, N, D)."""
        return self.mix(self.project(y_BND), visible, cache)

    def project(self, y_BND: Tensor) -> Tensor:
        """Queries, keys and values of normalised y: (B, N, 3, H, E)."""
        return self.qkv(y_BND).unflatten(-1, (3, self.heads, -1))

    def mix(
        self, qkv_BN3HE: Tensor, visible: Visible = FULL, cache: LayerCache | None = None
    ) -> Tensor:
        """What every query collects of the values that it sees: (B, N, D)."""
        how = self.operators["attention"]
        if cache is None:
            out_BNHE = ops.attention(qkv_BN3HE, visible, how)
        else:
            kv_BM2HE = cache.append(qkv_BN3HE[:, :, 1:])
            how = ops.with_cache(how)
            out_BNHE = ops.cross_attention(qkv_BN3HE[:, :, 0], kv_BM2HE, visible, how)
        return out_BNHE.flatten(-2)

    def few(self, stream: Stream, element_Bk: Tensor) -> Stream:
        """The stream of k elements of each sequence, which see all N: (B, k, D).

        As `forward` with a packing, for few elements and without dropout. Keys and values are
        not computed: with q and k linear in normalised y, a score q . (W y) is (W^T q) . y, and the
        sum of values a W y is W (sum of a y). So the N elements are read, but never multiplied by a
        matrix, and a row costs 4 N H D instead of a share of 4 N D^2.
        """
        x_BND, y_BND = stream.normed(self.norm1)
        attended_BkD = self._collect(gridlib.take_tokens(y_BND, element_Bk), y_BND)
        return self.finish(gridlib.take_tokens(x_BND, element_Bk), attended_BkD, self.NO_MASKS)

    def _collect(self, y_BkD: Tensor, y_BND: Tensor) -> Tensor:
        """Attention of k elements to N, between its two products."""
        width = y_BND.shape[-1]
        head_width = width // self.heads
        query_weight, key_weight, value_weight = self.qkv.weight.to(y_BND.dtype).split(width)
        query_bias, _, value_bias = self.qkv.bias.to(y_BND.dtype).split(width)
        # All scores of a query hold the same product with the keys' bias, so that it changes none
        # of their shares.
        q_BkHE = F.linear(y_BkD, query_weight, query_bias).unflatten(-1, (self.heads, -1))
        key_HED = key_weight.unflatten(0, (self.heads, -1))
        probe_BkHD = torch.einsum("bkhe,hed->bkhd", q_BkHE, key_HED)
        score_BKN = probe_BkHD.flatten(1, 2) @ y_BND.transpose(1, 2)
        score_BKN = at_least_float32(score_BKN) / head_width**0.5
        share_BKN = score_BKN.softmax(-1).to(y_BND.dtype)
        seen_BkHD = (share_BKN @ y_BND).view_as(probe_BkHD)
        value_HED = value_weight.unflatten(0, (self.heads, -1))
        return torch.einsum("bkhd,hed->bkhe", seen_BkHD, value_HED).flatten(-2) + value_bias

    def finish(self, x: Tensor, attended: Tensor, masks: Masks) -> Stream:
        """Projection, residual and MLP; x and attended (..., D)."""
        after_projection, after_gelu, after_mlp = masks
        stream = Stream(x, self.proj.product(attended), self.proj.bias, after_projection)
        x, y = stream.normed(self.norm2)
        hidden = ops.bias_gelu(
            self.fc1.product(y),
            self.fc1.bias,
            after_gelu,
            implementation=self.operators["bias_gelu"],
        )
        # A copy, not the parameter: the next unit uses it after this one is done, when sharding may
        # have freed this unit's parameters.
        bias = self.fc2.bias.clone()
        return Stream(x, self.fc2.product(hidden), bias, after_mlp)

    def _gather(self, x_BND: Tensor, row_R: Tensor) -> Tensor:
        return ops.gather_rows(
            x_BND.flatten(0, 1), row_R, implementation=self.operators["gather_rows"]
        )


def block_flops(width: int, queries: float, keys: float, rows: float | None = None) -> float:
    """Forward FLOPs of a `Block` over `queries` elements that each see `keys` on average.

    rows: how many elements reach projection and MLP (default: all).
    """
    rows = queries if rows is None else rows
    qkv = 3 * width**2 * queries
    attention = 2 * width * queries * keys
    projection_and_mlp = 9 * width**2 * rows
    return 2 * (qkv + attention + projection_and_mlp)


class Backbone(nn.Module):
    """Transformer over [S] and tokens in sampling order, causal unless `visible` says otherwise:
    h_t has seen the class and t tokens.

    Learned tables: class, token (an embedding of codes or a projection of vectors), N grid
    positions, N time steps (or `times`). Which position goes with which token is the system's
    choice: Heptapod adds a token's own position and gives [S] none; the 1D baselines add the
    position of the next target.

    Attributes:
        dtype: of the activations.
    """

    def __init__(
        self,
        *,
        depth: int,
        width: int,
        heads: int,
        num_classes: int,
        num_tokens: int,
        channels: int,
        vocabulary: int,
        times: int | None = None,
        operators: Operators = AUTO,
    ):
        super().__init__()
        self.token = Linear(channels, width) if channels else Embedding(vocabulary, width)
        self.label = Embedding(num_classes, width)
        self.position = Embedding(num_tokens, width)
        self.time = Embedding(num_tokens if times is None else times, width)
        self.blocks = Modules[Block](Block(width, heads, operators) for _ in range(depth))
        self.norm = LayerNorm(width, operators=operators)
        self.dtype = torch.float32

    def embed_start(self, labels_B: Tensor, position_B: Tensor | None = None) -> Tensor:
        """[S]: class embedding, time row 0, and a grid position where given. (B, 1, D)."""
        x_BD = self.label(labels_B) + self.time.weight[0]
        if position_B is not None:
            x_BD = x_BD + self.position(position_B)
        return x_BD[:, None].to(self.dtype)

    def embed_tokens(
        self, tokens_BM: Tensor, position_BM: Tensor, first_time: int | Tensor
    ) -> Tensor:
        """M consecutive tokens of the order, the first at time `first_time` >= 1, or (1,) int64 on
        the device. (B, M, D)."""
        count = position_BM.shape[1]
        if isinstance(first_time, Tensor):
            time_M = first_time + torch.arange(count, device=first_time.device)
            times_MD = self.time.weight.index_select(0, time_M)
        else:
            times_MD = self.time.weight[first_time : first_time + count]
        x_BMD = self.token(tokens_BM) + self.position(position_BM) + times_MD
        return x_BMD.to(self.dtype)

    def forward(
        self,
        x_BND: Tensor,
        dropout: Dropout = NO_DROPOUT,
        cache: KVCache | None = None,
        visible: Visible = CAUSAL,
        packing: Packing | None = None,
    ) -> Tensor:
        """(B, N, D) -> h (B, N, D), after the final LayerNorm. visible: who sees whom; with a cache
        CAUSAL is among all that is in it, and else Ends. packing: the last block lets only these
        elements out, and h is (R, D)."""
        if cache is not None and isinstance(visible, Causal):
            visible = cache.causal(x_BND.shape[0], x_BND.shape[1])
        stream = Stream(x_BND)
        last = len(self.blocks) - 1
        for i in range(last):
            layer = None if cache is None else cache.layer(i)
            masks = dropout.sites(Block.SITES * i, Block.SITES)
            stream = self.blocks[i](stream, visible, masks, layer)
        layer = None if cache is None else cache.layer(last)
        of_last = dropout.last(Block.SITES)
        if packing is not None:
            of_last = of_last.packed(*packing)
        masks = of_last.sites(0, Block.SITES)
        stream = self.blocks[last](stream, visible, masks, layer, packing)
        return stream.normed(self.norm)[1]

    @property
    def dropout_sites(self) -> int:
        """Sites of one forward pass."""
        return Block.SITES * len(self.blocks)
