"""2D prediction heads: from the causal states h_0..h_t to one vector per unseen grid position.

Heptapod section 4.3 and Fig. 5. Suffixes as in docs/legend.md: S = B * n (sequence, step) pairs,
L = N + 1 elements of the global head, Q = n * W queries of a sequence in the local one.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heptapod_fast import grid as gridlib
from heptapod_fast import ops
from heptapod_fast.model.dropout import NO_DROPOUT, Dropout, Masks
from heptapod_fast.model.layers import Embedding, LayerNorm, Linear, Modules
from heptapod_fast.model.transformer import Block, Packing, Stream, block_flops
from heptapod_fast.ops.dispatch import AUTO, Operators
from heptapod_fast.ops.masks import FULL, Ends
from heptapod_fast.sampling.kv_cache import KVCache, LayerCache


class GlobalHead(nn.Module):
    """Bidirectional Transformer over [S] and the whole grid, h where seen, a mask token where not.

    Every element gets the head's own learned position embedding, [S] row 0. The length is N + 1 for
    every step, and the last block packs the supervised rows after attention.
    """

    def __init__(
        self,
        *,
        depth: int,
        width: int,
        heads: int,
        num_tokens: int,
        operators: Operators = AUTO,
    ):
        super().__init__()
        self.operators = operators
        self.mask_token = nn.Parameter(torch.empty(1, width))
        self.position = Embedding(num_tokens + 1, width)
        self.blocks = Modules[Block](Block(width, heads, operators) for _ in range(depth))
        self.norm = LayerNorm(width, operators=operators)

    def forward(
        self,
        h_BMD: Tensor,
        order_BN: Tensor,
        steps_Bn: Tensor,
        pair_R: Tensor,
        position_R: Tensor,
        dropout: Dropout = NO_DROPOUT,
    ) -> Tensor:
        """The head's vectors for packed rows.

        Args:
            h_BMD: the states so far, M > max(steps).
            order_BN: grid position of each token of the order.
            steps_Bn: how many tokens are visible, for each of n steps.
            pair_R, position_R: which (sequence, step) pair and which grid position a row is.
            dropout: of S sequences of N + 1 elements.

        Returns:
            (R, D), after the final LayerNorm.
        """
        stream = Stream(self.assemble(h_BMD, order_BN, steps_Bn))
        last = len(self.blocks) - 1
        for i in range(last):
            stream = self.blocks[i](stream, FULL, dropout.sites(Block.SITES * i, Block.SITES))
        packing = Packing(pair_R, position_R + 1)
        masks = dropout.last(Block.SITES).packed(*packing).sites(0, Block.SITES)
        rows = self.blocks[last](stream, FULL, masks, packing=packing)
        return rows.normed(self.norm)[1]

    def assemble(self, h_BMD: Tensor, order_BN: Tensor, steps_Bn: Tensor) -> Tensor:
        """The head's input (S, L, D): element 0 is h_0, element 1 + p stands for position p."""
        placed_BLD = self.place(h_BMD, order_BN)
        rank_BN = gridlib.ranks(order_BN)
        seen_BnN = rank_BN[:, None] < steps_Bn[..., None]
        seen_BnL = F.pad(seen_BnN, (1, 0), value=True)
        mask_token = self.mask_token.to(h_BMD.dtype)
        x_BnLD = torch.where(seen_BnL[..., None], placed_BLD[:, None], mask_token)
        return (x_BnLD + self.position.weight.to(h_BMD.dtype)).flatten(0, 1)

    def place(self, h_BMD: Tensor, order_BN: Tensor) -> Tensor:
        """h_0 into element 0 and h_i into element 1 + order[i - 1], zero elsewhere: (B, L, D).

        h_i (i >= 1) is the state whose input was token order[i - 1]; M <= N states are given.
        """
        batch, states, _ = h_BMD.shape
        length = order_BN.shape[1] + 1
        element_BM = F.pad(order_BN[:, : states - 1] + 1, (1, 0))
        first_B1 = torch.arange(batch, device=h_BMD.device)[:, None] * length
        index = (first_B1 + element_BM).flatten()
        placed = ops.scatter_rows(
            h_BMD.flatten(0, 1),
            index,
            batch * length,
            implementation=self.operators["scatter_rows"],
        )
        return placed.view(batch, length, -1)

    def drawing(self, batch: int, dtype: torch.dtype) -> GlobalDrawing:
        """The head's work while images are drawn, at its beginning."""
        return GlobalDrawing(self, batch, dtype)

    @property
    def dropout_sites(self) -> int:
        """Sites of one forward pass."""
        return Block.SITES * len(self.blocks)

    def flops(self, num_tokens: int, density: int, rows: float) -> float:
        """Forward FLOPs per image; rows: supervised positions of a step, on average."""
        width = self.mask_token.shape[1]
        length = num_tokens + 1
        full = block_flops(width, length, length)
        last = block_flops(width, length, length, rows=rows)
        return density * ((len(self.blocks) - 1) * full + last)


class Drawing(Protocol):
    """What a head keeps from step to step while images are drawn."""

    def place(self, states: int) -> None:
        """So many states were seen before those that `see` takes next. Outside of what is recorded
        and replayed."""
        ...

    def see(self, h_BMD: Tensor, element_BM: Tensor) -> None:
        """Take in the states that the backbone has added; element 0 is [S], 1 + p the token at
        position p."""
        ...

    def vectors(self, position_Bk: Tensor) -> Tensor:
        """The head's vectors at k unseen positions of each sequence: (B * k, D)."""
        ...


class GlobalDrawing:
    """A `GlobalHead` at work: see `Drawing`.

    Every state is put on the grid once, and once projected by the first block, where no element
    has seen another yet; what is not seen there is the same in all sequences at the start. Of the
    last block only the elements that are drawn are computed.
    """

    def __init__(self, head: GlobalHead, batch: int, dtype: torch.dtype):
        self.head = head
        self._position_LD = head.position.weight.to(dtype)
        unseen_1LD = (head.mask_token.to(dtype) + self._position_LD)[None]
        self._x_BLD = unseen_1LD.repeat(batch, 1, 1)
        self._sequence_B1 = torch.arange(batch, device=unseen_1LD.device)[:, None]
        self._qkv_BL3HE: Tensor | None = None
        if len(head.blocks) > 1:
            self._qkv_BL3HE = self._projected(unseen_1LD).repeat(batch, 1, 1, 1, 1)

    def place(self, states: int) -> None:
        """See `Drawing`: states are told apart by their elements here."""

    def _projected(self, x_BND: Tensor) -> Tensor:
        first = self.head.blocks[0]
        return first.project(first.norm1(x_BND))

    def see(self, h_BMD: Tensor, element_BM: Tensor) -> None:
        """See `Drawing`."""
        x_BMD = h_BMD + self._position_LD[element_BM]
        self._x_BLD[self._sequence_B1, element_BM] = x_BMD
        if self._qkv_BL3HE is not None:
            self._qkv_BL3HE[self._sequence_B1, element_BM] = self._projected(x_BMD)

    def vectors(self, position_Bk: Tensor) -> Tensor:
        """See `Drawing`."""
        *others, last = self.head.blocks
        stream = Stream(self._x_BLD)
        if self._qkv_BL3HE is not None:
            attended_BLD = others[0].mix(self._qkv_BL3HE)
            stream = others[0].finish(self._x_BLD, attended_BLD, Block.NO_MASKS)
        for block in others[1:]:
            stream = block(stream)
        element_Bk = position_Bk + 1
        if self._is_few(position_Bk.shape[1]):
            rows = last.few(stream, element_Bk)
        else:
            sequence_Bk = self._sequence_B1.expand_as(element_Bk)
            rows = last(stream, packing=Packing(sequence_Bk.flatten(), element_Bk.flatten()))
        return rows.normed(self.head.norm)[1].view(-1, self._x_BLD.shape[-1])

    def _is_few(self, count: int) -> bool:
        """Whether to read all elements once per row and head is less than to project them."""
        return 2 * count * self.head.blocks[-1].heads <= self._x_BLD.shape[-1]


class LocalBlock(nn.Module):
    """Cross-attention to the states so far, then a bidirectional block inside the window."""

    def __init__(self, width: int, heads: int, operators: Operators = AUTO):
        super().__init__()
        self.heads = heads
        self.operators = operators
        self.norm = LayerNorm(width, operators=operators)
        self.q = Linear(width, width)
        self.kv = Linear(width, 2 * width)
        self.proj = Linear(width, width)
        self.block = Block(width, heads, operators)

    def forward(
        self,
        stream: Stream,
        h_BMD: Tensor,
        visible: Ends,
        masks: Masks = Block.NO_MASKS,
        cross_mask: ops.DropoutMask | None = None,
        cache: LayerCache | None = None,
    ) -> Stream:
        """A stream of the windows' queries (S, W, D) -> the same.

        visible: how many states each of a sequence's Q queries sees. masks: dropout of the block's
        three sites. cross_mask: of the one after the cross-attention's projection. cache: keys and
        values of earlier states, to which those of h are added. Keys and values are projected once
        per sequence, whatever the number of steps.
        """
        batch = len(h_BMD)
        x_SWD, y_SWD = stream.normed(self.norm)
        q_BQHE = self.q(y_SWD).view(batch, -1, self.heads, x_SWD.shape[-1] // self.heads)
        kv_BM2HE = self.kv(h_BMD).unflatten(-1, (2, self.heads, -1))
        if cache is not None:
            kv_BM2HE = cache.append(kv_BM2HE)
        seen_BQHE = ops.cross_attention(q_BQHE, kv_BM2HE, visible, self.operators["attention"])
        branch_SWD = self.proj.product(seen_BQHE.flatten(-2).view_as(x_SWD))
        stream = Stream(x_SWD, branch_SWD, self.proj.bias, cross_mask)
        return self.block(stream, FULL, masks)


class LocalHead(nn.Module):
    """Predicts the window that holds the next token: W learned queries per supervised step.

    The queries carry the embedding of their grid position; the states are used as they leave the
    backbone's final LayerNorm. Shapes are static: W rows per (sequence, step), seen ones weigh
    zero.
    """

    windows: Tensor
    owner: Tensor

    def __init__(
        self,
        *,
        depth: int,
        width: int,
        heads: int,
        grid: int,
        window: int,
        operators: Operators = AUTO,
    ):
        super().__init__()
        self.query = nn.Parameter(torch.empty(window, width))
        self.position = Embedding(grid * grid, width)
        self.blocks = Modules[LocalBlock](LocalBlock(width, heads, operators) for _ in range(depth))
        self.norm = LayerNorm(width, operators=operators)
        self.register_buffer("windows", gridlib.window_positions(grid, window), persistent=False)
        self.register_buffer("owner", gridlib.window_of(grid, window), persistent=False)

    def window_positions(self, next_S: Tensor) -> Tensor:
        """next: (S,) grid positions -> (S, W) positions of the windows that hold them."""
        return self.windows[self.owner[next_S]]

    def forward(
        self,
        h_BMD: Tensor,
        steps_Bn: Tensor,
        position_SW: Tensor,
        dropout: Dropout = NO_DROPOUT,
        cross_dropout: Dropout = NO_DROPOUT,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The head's vectors for every position of the windows.

        Args:
            h_BMD: the states so far, M > max(steps); with a cache those that are new.
            steps_Bn: how many tokens are visible, for each of n steps.
            position_SW: the grid positions of each pair's window.
            dropout, cross_dropout: of S sequences of W elements.
            cache: keys and values of the states before h.

        Returns:
            (S * W, D), after the final LayerNorm.
        """
        stream = Stream((self.query + self.position(position_SW)).to(h_BMD.dtype))
        # After t tokens there are t + 1 states.
        ends_Bn = (steps_Bn + 1).to(torch.int32)
        visible = Ends(ends_Bn.repeat_interleave(position_SW.shape[1], dim=1))
        for i, block in enumerate(self.blocks):
            masks = dropout.sites(Block.SITES * i, Block.SITES)
            (cross_mask,) = cross_dropout.sites(i, 1)
            layer = None if cache is None else cache.layer(i)
            stream = block(stream, h_BMD, visible, masks, cross_mask, layer)
        return stream.normed(self.norm)[1].flatten(0, 1)

    def drawing(self, batch: int, dtype: torch.dtype) -> LocalDrawing:
        """The head's work while images are drawn, at its beginning."""
        return LocalDrawing(self)

    @property
    def dropout_sites(self) -> int:
        """Sites of the blocks; the cross-attentions have `len(blocks)` of their own."""
        return Block.SITES * len(self.blocks)

    def flops(self, num_tokens: int, density: int, states: float) -> float:
        """Forward FLOPs per image; states: how many a query sees, on average."""
        window, width = self.query.shape
        queries = density * window
        cross = 2 * (
            2 * width**2 * queries + 2 * width**2 * num_tokens + 2 * width * queries * states
        )
        return len(self.blocks) * (cross + density * block_flops(width, window, window))


class LocalDrawing:
    """A `LocalHead` at work: see `Drawing`. Keys and values of every state are computed once."""

    def __init__(self, head: LocalHead):
        self.head = head
        device = head.query.device
        self._cache = KVCache(len(head.blocks), len(head.owner), device)
        self._new: Tensor | None = None

    def place(self, states: int) -> None:
        """See `Drawing`."""
        self._cache.place(states)
        self._new = None  # of a step that has failed half way, and is done again

    def see(self, h_BMD: Tensor, element_BM: Tensor) -> None:
        """See `Drawing`; `vectors` has to come before the next states."""
        assert self._new is None
        self._new = h_BMD

    def vectors(self, position_Bk: Tensor) -> Tensor:
        """See `Drawing`. One window is run for each position: a query sees its own window only."""
        assert self._new is not None
        h_BMD = self._new
        last_1 = self._cache.slots(h_BMD.shape[1])[-1:]  # state t has seen t tokens
        position_SW = self.head.window_positions(position_Bk.flatten())
        z_RD = self.head(h_BMD, last_1.expand_as(position_Bk), position_SW, cache=self._cache)
        self._new = None
        own_S1 = (position_SW == position_Bk.reshape(-1, 1)).int().argmax(1, keepdim=True)
        z_SWD = z_RD.unflatten(0, position_SW.shape)
        return z_SWD.take_along_dim(own_S1[..., None], 1)[:, 0]
