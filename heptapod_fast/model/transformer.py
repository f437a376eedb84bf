"""Transformer blocks and the causal backbone.

Suffixes: B sequences, N elements, D width, H heads, E head dim, M keys, R packed rows, P sequences
of a dropout mask. A block is MAR's (timm's ViT block): pre-LayerNorm with eps 1e-6, fused qkv with
bias, MLP of 4 x D with erf GELU. Parameters are float32 masters; products run in the dtype of the
activations, which is chosen once, where a sequence is embedded. In bf16 the residual stream is bf16
too, where MAR's autocast keeps it in float32; normalisation statistics and losses are float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heptapod_fast import ops

EPS = 1e-6


class Linear(nn.Linear):
    """nn.Linear whose weights follow the dtype of its input.

    init: "xavier", "normal" (0.02) or "zero"; read by systems.base.initial_value.
    """

    def __init__(self, inputs: int, outputs: int, init: str = "xavier"):
        super().__init__(inputs, outputs)
        self.init = init

    def reset_parameters(self) -> None:
        """Nothing: the system fills its parameters in one place."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))

    def product(self, x: Tensor) -> Tensor:
        """Without the bias, for an operation that adds it on its way."""
        return F.linear(x, self.weight.to(x.dtype))


class LayerNorm(nn.LayerNorm):
    """LayerNorm through the operation of the same name."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class Drop:
    """Counter-based dropout of one forward pass; `site` numbers the places where it acts.

    key_PS2: (P, sites, 2) int64 below 2**32; counter_PN: which element of its sequence a row is,
    (N,) for whole sequences and (R,) for packed rows.
    """

    key_PS2: Tensor
    counter_PN: Tensor
    p: float

    def mask(self, site: int) -> ops.DropoutMask:
        """The mask of one site over the rows of (P, N, D), or of (R, D) after `packed`."""
        return ops.DropoutMask(self.key_PS2[:, site], self.counter_PN, self.p)

    def packed(self, sequence_R: Tensor, element_R: Tensor) -> Drop:
        """The same masks for packed rows: row r is element element_R[r] of sequence_R[r]."""
        return Drop(self.key_PS2[sequence_R], element_R, self.p)


class NoDrop:
    """Dropout that is off."""

    def mask(self, site: int) -> None:
        """No mask."""

    def packed(self, sequence_R: Tensor, element_R: Tensor) -> NoDrop:
        """Itself."""
        return self


NO_DROP = NoDrop()


class Stream(NamedTuple):
    """The residual stream: x + dropout(branch + bias), the sum not taken yet.

    The next LayerNorm takes it in the same pass over memory.
    """

    x: Tensor
    branch: Tensor | None = None
    bias: Tensor | None = None
    mask: ops.DropoutMask | None = None

    def normed(self, norm: LayerNorm) -> tuple[Tensor, Tensor]:
        """(the sum, its LayerNorm)."""
        if self.branch is None:
            return self.x, norm(self.x)
        return ops.add_layer_norm(
            self.x, self.branch, self.bias, norm.weight, norm.bias, self.mask, norm.eps
        )

    def value(self) -> Tensor:
        """The sum alone."""
        if self.branch is None:
            return self.x
        return self.x + ops.dropout(self.branch + self.bias.to(self.x.dtype), self.mask)


class Block(nn.Module):
    """Pre-norm Transformer block; three dropout sites, 3 * layer + 0, 1, 2."""

    SITES = 3

    def __init__(self, width: int, heads: int, layer: int, attention: str):
        super().__init__()
        self.heads, self.layer, self.attention = heads, layer, attention
        self.norm1 = LayerNorm(width, eps=EPS)
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.norm2 = LayerNorm(width, eps=EPS)
        self.fc1 = Linear(width, 4 * width)
        self.fc2 = Linear(4 * width, width)

    def forward(self, stream: Stream, *, causal: bool = False, drop=NO_DROP, cache=None) -> Stream:
        """A stream of (B, N, D). cache: keys and values of earlier elements (sampling.KVCache)."""
        x_BND, y_BND = stream.normed(self.norm1)
        return self.finish(x_BND, self.attend(y_BND, causal=causal, cache=cache), drop)

    def forward_rows(
        self, stream: Stream, sequence_R: Tensor, element_R: Tensor, drop=NO_DROP
    ) -> Stream:
        """As a bidirectional `forward`, but only the given elements come out, packed: (R, D).

        The rows are gathered after attention: projection and MLP never see the others.
        """
        x_BND, y_BND = stream.normed(self.norm1)
        row_R = sequence_R * x_BND.shape[1] + element_R
        attended_RD = ops.gather_rows(self.attend(y_BND).flatten(0, 1), row_R)
        return self.finish(
            ops.gather_rows(x_BND.flatten(0, 1), row_R),
            attended_RD,
            drop.packed(sequence_R, element_R),
        )

    def attend(self, y_BND: Tensor, *, causal: bool = False, cache=None) -> Tensor:
        """Attention between its two products, of normalised y: (B, N, D)."""
        qkv_BN3HE = self.qkv(y_BND).unflatten(-1, (3, self.heads, -1))
        if cache is None:
            out_BNHE = ops.attention(qkv_BN3HE, ops.CAUSAL if causal else ops.FULL, self.attention)
        else:
            kv_BM2HE = cache.append(self.layer, qkv_BN3HE[:, :, 1:])
            out_BNHE = ops.cross_attention(
                qkv_BN3HE[:, :, 0], kv_BM2HE, ops.CAUSAL if causal else ops.FULL, self.attention
            )
        return out_BNHE.flatten(-2)

    def finish(self, x: Tensor, attended: Tensor, drop) -> Stream:
        """Projection, residual and MLP; x and attended (..., D)."""
        site = 3 * self.layer
        stream = Stream(x, self.proj.product(attended), self.proj.bias, drop.mask(site))
        x, y = stream.normed(self.norm2)
        hidden = ops.bias_gelu(self.fc1.product(y), self.fc1.bias, drop.mask(site + 1))
        return Stream(x, self.fc2.product(hidden), self.fc2.bias, drop.mask(site + 2))


class Backbone(nn.Module):
    """Causal Transformer over [S], tokens in sampling order: h_t has seen the class and t tokens.

    Learned tables: class, token (an embedding of codes or a projection of vectors), N grid
    positions, N time steps. Which position goes with which token is the system's choice: Heptapod
    adds a token's own position and gives [S] none; the 1D baselines add the position of the next
    target.
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
        attention: str,
    ):
        super().__init__()
        self.token = Linear(channels, width) if channels else nn.Embedding(vocabulary, width)
        self.label = nn.Embedding(num_classes, width)
        self.position = nn.Embedding(num_tokens, width)
        self.time = nn.Embedding(num_tokens, width)
        self.blocks = nn.ModuleList(Block(width, heads, i, attention) for i in range(depth))
        self.norm = LayerNorm(width, eps=EPS)
        self.dtype = torch.float32

    def embed_start(self, labels_B: Tensor, position_B: Tensor | None = None) -> Tensor:
        """[S]: class embedding, time row 0, and a grid position where given. (B, 1, D)."""
        x_BD = self.label(labels_B) + self.time.weight[0]
        if position_B is not None:
            x_BD = x_BD + self.position(position_B)
        return x_BD[:, None].to(self.dtype)

    def embed_tokens(self, tokens_BM: Tensor, position_BM: Tensor, first_time: int) -> Tensor:
        """M consecutive tokens of the order, the first at time `first_time` >= 1. (B, M, D)."""
        times = self.time.weight[first_time : first_time + position_BM.shape[1]]
        return (self.token(tokens_BM) + self.position(position_BM) + times).to(self.dtype)

    def forward(self, x_BND: Tensor, drop=NO_DROP, cache=None) -> Tensor:
        """(B, N, D) -> h (B, N, D), after the final LayerNorm."""
        stream = Stream(x_BND)
        for block in self.blocks:
            stream = block(stream, causal=True, drop=drop, cache=cache)
        return stream.normed(self.norm)[1]
