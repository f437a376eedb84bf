"""Heptapod: next 2D distribution prediction (paper, section 4).

Every sequence has its own random order. The backbone sees [S], then each token with its own
position, and is never told which position comes next; the 2D head turns h_0..h_t into one vector
for every position of its window, and every unseen one is supervised. Suffixes as in grid.py and
model/heads.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heptapod_fast import grid as gridlib
from heptapod_fast.config import Config
from heptapod_fast.data.tokens import Batch
from heptapod_fast.model.heads import GlobalHead, LocalHead
from heptapod_fast.model.transformer import Block
from heptapod_fast.rng import Rng
from heptapod_fast.sampling import KVCache, SampleOptions
from heptapod_fast.systems.base import Loss, System, block_flops
from heptapod_fast.tokenizers.base import TokenSpec


class Heptapod(System):
    """Causal backbone, 2D head (global or local), token loss."""

    def __init__(self, config: Config, spec: TokenSpec, num_classes: int, attention: str):
        super().__init__(config, spec, num_classes, attention)
        shared = dict(
            depth=config.head_depth, width=config.width, heads=config.heads, attention=attention
        )
        if config.head == "global":
            self.head = GlobalHead(num_tokens=self.num_tokens, **shared)
        else:
            self.head = LocalHead(grid=spec.grid, window=config.window, **shared)

    # ------------------------------------------------------------------------------------ training

    def loss(self, batch: Batch, rng: Rng) -> Loss:
        """Sum of the token loss over the supervised positions; see System.loss."""
        config, index_B = self.config, batch.index
        order_BN = gridlib.random_orders(index_B, self.num_tokens, rng)
        steps_Bn = gridlib.draw_steps(index_B, self.num_tokens, config.density, config.steps, rng)
        h_BND = self.states(batch, order_BN, rng)
        if config.head == "global":
            rows, z_RD = self.global_head(h_BND, order_BN, steps_Bn, index_B, rng)
        else:
            rows, z_RD = self.local_head(h_BND, order_BN, steps_Bn, index_B, rng)
        sequence_R = rows.pair_R // config.density
        slot_R = rows.pair_R % config.density * self.num_tokens + rows.position_R
        total, _ = self.token_losses(
            z_RD, batch, sequence_R, rows.position_R, slot_R, rng, rows.weight_R
        )
        count = float(len(sequence_R)) if rows.weight_R is None else rows.weight_R.sum()
        return Loss(total, count, {})

    def states(self, batch: Batch, order_BN: Tensor, rng: Rng) -> Tensor:
        """h_0..h_{N-1} of every sequence: (B, N, D)."""
        before_BM = order_BN[:, :-1]
        tokens_BM = gridlib.take_tokens(batch.tokens, before_BM)
        x_BND = torch.cat(
            (
                self.backbone.embed_start(batch.labels),
                self.backbone.embed_tokens(tokens_BM, before_BM, 1),
            ),
            dim=1,
        )
        sites = Block.SITES * len(self.backbone.blocks)
        drop = self.drop("backbone", batch.index, 0, sites, x_BND.shape[1], rng)
        return self.backbone(x_BND, drop)

    def global_head(
        self, h_BND: Tensor, order_BN: Tensor, steps_Bn: Tensor, index_B: Tensor, rng: Rng
    ) -> tuple[gridlib.Rows, Tensor]:
        """Supervised rows over the whole grid and their vectors (R, D)."""
        if self.config.steps == "antithetic":
            rows = gridlib.packed_rows(order_BN, steps_Bn, self.config.loss_weight)
        else:
            rows = gridlib.padded_rows(gridlib.ranks(order_BN), steps_Bn, self.config.loss_weight)
        drop = self.head_drop("head", index_B, self.num_tokens + 1, rng)
        z_RD = self.head(h_BND, order_BN, steps_Bn, rows.pair_R, rows.position_R, drop)
        return rows, z_RD

    def local_head(
        self, h_BND: Tensor, order_BN: Tensor, steps_Bn: Tensor, index_B: Tensor, rng: Rng
    ) -> tuple[gridlib.Rows, Tensor]:
        """Rows of the windows that hold the next tokens, and their vectors (R, D)."""
        position_SW = self.head.window_positions(order_BN.gather(1, steps_Bn).flatten())
        rows = gridlib.window_rows(
            position_SW, gridlib.ranks(order_BN), steps_Bn, self.config.loss_weight
        )
        drop = self.head_drop("head", index_B, self.config.window, rng)
        cross = self.head_drop("cross", index_B, self.config.window, rng)
        return rows, self.head(h_BND, steps_Bn, position_SW, drop, cross)

    def head_drop(self, stream: str, index_B: Tensor, length: int, rng: Rng):
        """Dropout of the S = B * n head sequences; the slot tells the n steps apart."""
        density = self.config.density
        slot_S = torch.arange(density, device=index_B.device).repeat(len(index_B))
        sites = (Block.SITES if stream == "head" else 1) * len(self.head.blocks)
        return self.drop(stream, index_B.repeat_interleave(density), slot_S, sites, length, rng)

    # ------------------------------------------------------------------------------------ sampling

    @torch.no_grad()
    def sample(
        self,
        classes: Tensor,
        rng: Rng,
        options: SampleOptions | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """One (position, token) pair per step, or several; the backbone runs with a KV cache.

        See System.sample. With the local head the positions are drawn first and only their windows
        are run.
        """
        options = SampleOptions() if options is None else options
        self.check_sampling(classes, options)
        if options.position_order == "confidence" and self.config.head == "local":
            raise ValueError(
                "--position-order confidence compares the whole grid; a run with "
                "--head local predicts one window at a time"
            )
        classes, index_B = self.place_sampling(classes, index)
        order_BN = gridlib.random_orders(index_B, self.num_tokens, rng)
        tokens_BN = self.empty_tokens(len(classes), classes.device)
        cache = KVCache(len(self.backbone.blocks), self.num_tokens)
        x_BMD, states, seen = self.backbone.embed_start(classes), [], 0
        sizes = gridlib.group_sizes(
            self.num_tokens, options.positions_per_step, options.position_schedule
        )
        for step, count in enumerate(sizes):
            states.append(self.backbone(x_BMD, cache=cache))
            cache.advance(x_BMD.shape[1])
            h_BMD = torch.cat(states, dim=1)
            if options.position_order == "confidence":
                order_BN, token_Bk = self.most_confident(
                    h_BMD, order_BN, seen, count, rng.at(step), index_B, options
                )
            else:
                token_Bk = self.draw_next(
                    h_BMD, order_BN, seen, count, rng.at(step), index_B, options
                )
            position_Bk = order_BN[:, seen : seen + count]
            put(tokens_BN, position_Bk, token_Bk)
            if seen + count < self.num_tokens:
                x_BMD = self.backbone.embed_tokens(token_Bk, position_Bk, seen + 1)
            seen += count
        return tokens_BN

    def draw_next(
        self,
        h_BMD: Tensor,
        order_BN: Tensor,
        seen: int,
        count: int,
        rng: Rng,
        index_B: Tensor,
        options: SampleOptions,
    ) -> Tensor:
        """Tokens (B, k) or (B, k, C) at the next k positions of the order."""
        position_Bk = order_BN[:, seen : seen + count]
        z_RD = self.predict(h_BMD, order_BN, seen, position_Bk)
        index_R = index_B.repeat_interleave(count)
        token_R, _ = self.draw_tokens(z_RD, rng, index_R, position_Bk.flatten(), options)
        return token_R.unflatten(0, (-1, count))

    def most_confident(
        self,
        h_BMD: Tensor,
        order_BN: Tensor,
        seen: int,
        count: int,
        rng: Rng,
        index_B: Tensor,
        options: SampleOptions,
    ) -> tuple[Tensor, Tensor]:
        """Draw a code everywhere unseen, keep the k likeliest; the order is rearranged to match."""
        open_BU = order_BN[:, seen:]
        z_RD = self.predict(h_BMD, order_BN, seen, open_BU)
        index_R = index_B.repeat_interleave(open_BU.shape[1])
        code_R, chance_R = self.draw_tokens(z_RD, rng, index_R, open_BU.flatten(), options)
        ranking_BU = chance_R.view_as(open_BU).argsort(dim=1, descending=True, stable=True)
        order_BN = torch.cat((order_BN[:, :seen], open_BU.gather(1, ranking_BU)), dim=1)
        return order_BN, code_R.view_as(open_BU).gather(1, ranking_BU[:, :count])

    def predict(self, h_BMD: Tensor, order_BN: Tensor, seen: int, position_Bk: Tensor) -> Tensor:
        """The head's vectors at k positions of every sequence: (B * k, D)."""
        batch, count = position_Bk.shape
        step_B1 = torch.full((batch, 1), seen, device=order_BN.device)
        if self.config.head == "global":
            pair_R = torch.arange(batch, device=order_BN.device).repeat_interleave(count)
            return self.head(h_BMD, order_BN, step_B1, pair_R, position_Bk.flatten())
        # One window per drawn position: a local query sees its own window only.
        position_SW = self.head.window_positions(position_Bk.flatten())
        steps_Bk = step_B1.expand(-1, count)
        z_SWD = self.head(h_BMD, steps_Bk, position_SW).unflatten(0, position_SW.shape)
        wanted_SW = position_SW == position_Bk.reshape(-1, 1)
        return z_SWD[wanted_SW]

    # ------------------------------------------------------------------------------------ counting

    def expected_count(self, batch: int) -> float:
        """See System.expected_count."""
        if self.config.loss_weight == "step":
            return float(batch * self.config.density)
        return self.expected_rows(batch)

    def expected_rows(self, batch: int) -> float:
        """Expected number of supervised positions of `batch` sequences."""
        config = self.config
        rows = gridlib.expected_rows(batch, self.num_tokens, config.density, config.steps)
        if config.head == "global":
            return rows
        # An unseen position shares the window of the next token: that token itself, and each of the
        # other N - t - 1 unseen ones with probability (W - 1) / (N - 1).
        others = rows - batch * config.density
        return batch * config.density + others * (config.window - 1) / max(self.num_tokens - 1, 1)

    def flops_per_image(self) -> dict[str, float]:
        """See System.flops_per_image."""
        config, width, tokens = self.config, self.config.width, self.num_tokens
        embed = 2 * width * self.spec.channels * (tokens - 1)
        backbone = config.depth * block_flops(width, tokens, (tokens + 1) / 2)
        supervised = self.expected_rows(2) / 2
        n, blocks = config.density, config.head_depth
        if config.head == "global":
            full = block_flops(width, tokens + 1, tokens + 1)
            last = block_flops(width, tokens + 1, tokens + 1, rows=supervised / n)
            head = n * ((blocks - 1) * full + last)
        else:
            window = config.window
            states = tokens + 1 - gridlib.expected_rows(1, tokens, 1, config.steps)
            cross = 2 * (
                2 * width**2 * n * window + 2 * width**2 * tokens + 2 * width * n * window * states
            )
            head = blocks * (cross + n * block_flops(width, window, window))
        return {
            "embedding": embed,
            "backbone": backbone,
            "head": head,
            "token loss": self.token_loss_flops(supervised),
        }


def put(tokens_BN: Tensor, position_Bk: Tensor, token_Bk: Tensor) -> None:
    """tokens[b, position[b, i]] = token[b, i], in place."""
    sequence_B1 = torch.arange(len(tokens_BN), device=tokens_BN.device)[:, None]
    tokens_BN[sequence_B1, position_Bk] = token_Bk.to(tokens_BN.dtype)
