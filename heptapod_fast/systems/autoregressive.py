"""The 1D baselines of the paper: one next token per step, in raster or in random order.

The backbone is Heptapod's with its head's blocks added, so that the parameters match. Both are told
where the next token goes: the input at time i carries token i - 1 and the position embedding of its
*target*, order[i] (the left shift of Fig. 4), and no embedding of its own position. A pointwise
head scores the next token at all N steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heptapod_fast import grid as gridlib
from heptapod_fast.data.tokens import Batch
from heptapod_fast.model.transformer import Block
from heptapod_fast.rng import Rng
from heptapod_fast.sampling import KVCache, SampleOptions
from heptapod_fast.systems.base import Loss, System, block_flops
from heptapod_fast.systems.heptapod import put


class NextToken(System):
    """1d-raster and 1d-random."""

    def orders(self, index_B: Tensor, rng: Rng) -> Tensor:
        """(B, N): the order of every sequence."""
        if self.config.system == "1d-raster":
            return gridlib.raster_orders(index_B, self.num_tokens)
        return gridlib.random_orders(index_B, self.num_tokens, rng)

    def loss(self, batch: Batch, rng: Rng) -> Loss:
        """Sum of the token loss over all N steps of every sequence."""
        order_BN = self.orders(batch.index, rng)
        ordered_BN = gridlib.take_tokens(batch.tokens, order_BN)
        x_BND = torch.cat(
            (
                self.backbone.embed_start(batch.labels, order_BN[:, 0]),
                self.backbone.embed_tokens(ordered_BN[:, :-1], order_BN[:, 1:], 1),
            ),
            dim=1,
        )
        sites = Block.SITES * len(self.backbone.blocks)
        drop = self.drop("backbone", batch.index, 0, sites, self.num_tokens, rng)
        z_RD = self.backbone(x_BND, drop).flatten(0, 1)
        sequence_R = torch.arange(len(order_BN), device=order_BN.device).repeat_interleave(
            self.num_tokens
        )
        position_R = order_BN.flatten()
        total, _ = self.token_losses(z_RD, batch, sequence_R, position_R, position_R, rng)
        return Loss(total, float(len(position_R)), {})

    @torch.no_grad()
    def sample(
        self,
        classes: Tensor,
        rng: Rng,
        options: SampleOptions | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """One token per step with a KV cache; see System.sample."""
        options = SampleOptions() if options is None else options
        self.check_sampling(classes, options)
        how = (options.positions_per_step, options.position_order, options.position_schedule)
        if how != (1, "random", "constant"):
            raise ValueError(
                f"--positions-per-step, --position-order and --position-schedule: "
                f"{self.config.system} "
                "predicts one next token in a given order; a 2D distribution is what "
                "allows more"
            )
        classes, index_B = self.place_sampling(classes, index)
        order_BN = self.orders(index_B, rng)
        tokens_BN = self.empty_tokens(len(classes), classes.device)
        cache = KVCache(len(self.backbone.blocks), self.num_tokens)
        x_B1D = self.backbone.embed_start(classes, order_BN[:, 0])
        for step in range(self.num_tokens):
            z_BD = self.backbone(x_B1D, cache=cache)[:, 0]
            cache.advance(1)
            position_B = order_BN[:, step]
            token_B, _ = self.draw_tokens(z_BD, rng.at(step), index_B, position_B, options)
            put(tokens_BN, position_B[:, None], token_B[:, None])
            if step + 1 < self.num_tokens:
                x_B1D = self.backbone.embed_tokens(
                    token_B[:, None], order_BN[:, step + 1 : step + 2], step + 1
                )
        return tokens_BN

    def expected_count(self, batch: int) -> float:
        """Every token of every sequence."""
        return float(batch * self.num_tokens)

    def flops_per_image(self) -> dict[str, float]:
        """See System.flops_per_image."""
        width, tokens = self.config.width, self.num_tokens
        return {
            "embedding": 2 * width * self.spec.channels * (tokens - 1),
            "backbone": self.config.depth * block_flops(width, tokens, (tokens + 1) / 2),
            "token loss": self.token_loss_flops(tokens),
        }
