"""2D prediction heads: from the causal states h_0..h_t to one vector per unseen grid position.

Heptapod section 4.3 and Fig. 5. Suffixes: B sequences, N tokens, n supervised steps, S = B * n
(sequence, step) pairs, R supervised rows, W tokens of a window, D width, H heads, E head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heptapod_fast import grid as gridlib
from heptapod_fast import ops
from heptapod_fast.model.transformer import (
    EPS,
    NO_DROP,
    Block,
    LayerNorm,
    Linear,
    Stream,
)


class GlobalHead(nn.Module):
    """Bidirectional Transformer over [S] and the whole grid, h where seen, a mask token where not.

    Every element gets the head's own learned position embedding, [S] row 0. The length is N + 1 for
    every step, and the last block packs the supervised rows after attention.
    """

    def __init__(self, *, depth: int, width: int, heads: int, num_tokens: int, attention: str):
        super().__init__()
        self.mask_token = nn.Parameter(torch.empty(1, width))
        self.position = nn.Embedding(num_tokens + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads, i, attention) for i in range(depth))
        self.norm = LayerNorm(width, eps=EPS)

    def forward(
        self,
        h_BND: Tensor,
        order_BN: Tensor,
        steps_Bn: Tensor,
        pair_R: Tensor,
        position_R: Tensor,
        drop=NO_DROP,
    ) -> Tensor:
        """h (B, M, D) with M > max(steps): the states so far; rows: see grid.Rows.

        Returns (R, D): the head's output for every row, after the final LayerNorm.
        """
        stream = Stream(self.assemble(h_BND, order_BN, steps_Bn))
        for block in self.blocks[:-1]:
            stream = block(stream, drop=drop)
        rows = self.blocks[-1].forward_rows(stream, pair_R, position_R + 1, drop)
        return rows.normed(self.norm)[1]

    def assemble(self, h_BND: Tensor, order_BN: Tensor, steps_Bn: Tensor) -> Tensor:
        """The head's input (S, N + 1, D): element 0 is h_0, element 1 + p stands for position p."""
        placed_BLD = place(h_BND, order_BN)
        rank_BN = gridlib.ranks(order_BN)
        seen_BnN = rank_BN[:, None] < steps_Bn[..., None]
        seen_BnL = F.pad(seen_BnN, (1, 0), value=True)
        x_BnLD = torch.where(
            seen_BnL[..., None], placed_BLD[:, None], self.mask_token.to(h_BND.dtype)
        )
        return (x_BnLD + self.position.weight.to(h_BND.dtype)).flatten(0, 1)


def place(h_BMD: Tensor, order_BN: Tensor) -> Tensor:
    """Put h_0 into element 0 and h_i into element 1 + order[i - 1]; zero elsewhere. (B, N + 1, D).

    h_i (i >= 1) is the state whose input was token order[i - 1]; M <= N states are given.
    """
    (batch, states, _), length = h_BMD.shape, order_BN.shape[1] + 1
    element_BM = F.pad(order_BN[:, : states - 1] + 1, (1, 0))
    first_B1 = torch.arange(batch, device=h_BMD.device)[:, None] * length
    index = (first_B1 + element_BM).flatten()
    placed = ops.scatter_rows(h_BMD.flatten(0, 1), index, batch * length)
    return placed.view(batch, length, -1)


class LocalBlock(nn.Module):
    """Cross-attention to the states so far, then a bidirectional block inside the window."""

    def __init__(self, width: int, heads: int, layer: int, attention: str):
        super().__init__()
        self.heads, self.attention = heads, attention
        self.norm = LayerNorm(width, eps=EPS)
        self.q = Linear(width, width)
        self.kv = Linear(width, 2 * width)
        self.proj = Linear(width, width)
        self.block = Block(width, heads, layer, attention)
        self.site = layer

    def forward(self, stream: Stream, h_BMD: Tensor, ends_BQ: Tensor, drop, cross_drop) -> Stream:
        """stream: the windows' queries (S, W, D); ends (B, n * W): how many states each may see.

        Keys and values are projected once per sequence, whatever the number of steps.
        """
        batch = len(h_BMD)
        x_SWD, y_SWD = stream.normed(self.norm)
        q_BQHE = self.q(y_SWD).view(batch, -1, self.heads, x_SWD.shape[-1] // self.heads)
        kv_BM2HE = self.kv(h_BMD).unflatten(-1, (2, self.heads, -1))
        seen = ops.cross_attention(q_BQHE, kv_BM2HE, ops.Ends(ends_BQ), self.attention)
        branch_SWD = self.proj.product(seen.flatten(-2).view_as(x_SWD))
        stream = Stream(x_SWD, branch_SWD, self.proj.bias, cross_drop.mask(self.site))
        return self.block(stream, drop=drop)


class LocalHead(nn.Module):
    """Predicts the window that holds the next token: W learned queries per supervised step.

    The queries carry the embedding of their grid position; the states are used as they leave the
    backbone's final LayerNorm. Shapes are static: W rows per (sequence, step), seen ones weigh
    zero.
    """

    def __init__(
        self, *, depth: int, width: int, heads: int, grid: int, window: int, attention: str
    ):
        super().__init__()
        self.query = nn.Parameter(torch.empty(window, width))
        self.position = nn.Embedding(grid * grid, width)
        self.blocks = nn.ModuleList(LocalBlock(width, heads, i, attention) for i in range(depth))
        self.norm = LayerNorm(width, eps=EPS)
        self.register_buffer("windows", gridlib.window_positions(grid, window), persistent=False)
        self.register_buffer("owner", gridlib.window_of(grid, window), persistent=False)

    def window_positions(self, next_S: Tensor) -> Tensor:
        """next: (S,) grid positions -> (S, W) positions of the windows that hold them."""
        return self.windows[self.owner[next_S]]

    def forward(
        self, h_BMD: Tensor, steps_Bn: Tensor, position_SW: Tensor, drop=NO_DROP, cross_drop=NO_DROP
    ) -> Tensor:
        """h (B, M, D), steps (B, n), windows (S, W) -> (S * W, D), after the final LayerNorm."""
        stream = Stream((self.query + self.position(position_SW)).to(h_BMD.dtype))
        # After t tokens there are t + 1 states.
        ends_Bn = (steps_Bn + 1).to(torch.int32)
        ends_BQ = ends_Bn.repeat_interleave(position_SW.shape[1], dim=1)
        for block in self.blocks:
            stream = block(stream, h_BMD, ends_BQ, drop, cross_drop)
        return stream.normed(self.norm)[1].flatten(0, 1)
