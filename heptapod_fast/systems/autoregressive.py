"""The 1D baselines of the paper: one next token per step, in raster or in random order.

The backbone is Heptapod's with its head's blocks added, so that the parameters match. Both are told
where the next token goes: the input at time i carries token i - 1 and the position embedding of its
*target*, order[i] (the left shift of Fig. 4), and no embedding of its own position. A pointwise
head scores the next token at all N steps.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from heptapod_fast import grid as gridlib
from heptapod_fast.config import AttentionUse
from heptapod_fast.data.tokens import Batch
from heptapod_fast.model.dropout import NO_DROPOUT, Dropout
from heptapod_fast.model.transformer import block_flops
from heptapod_fast.ops import CAUSAL
from heptapod_fast.rng import Rng
from heptapod_fast.sampling import Given, KVCache, SampleOptions
from heptapod_fast.sampling.replay import Entering, steps_for
from heptapod_fast.systems.base import NOWHERE, Elements, Phase
from heptapod_fast.systems.mar import (
    Completing,
    MarSettings,
    NetworkSize,
    put,
    put_given,
    sizes,
)
from heptapod_fast.tokenizers import TokenSpec

_ONE_AT_A_TIME = (
    "this system predicts one next token in a given order; a 2D distribution is what allows more"
)


@dataclass(frozen=True, kw_only=True)
class NextTokenSettings(MarSettings):
    """The network."""

    def attention_uses(self, spec: TokenSpec) -> list[AttentionUse]:
        """See SystemSettings.attention_uses."""
        return [AttentionUse(self.head_width, spec.num_tokens, CAUSAL)]

    def derived(self, spec: TokenSpec) -> Iterator[tuple[str, str]]:
        """See SystemSettings.derived."""
        yield "head dim", f"{self.head_width} = {self.width} / {self.heads}"


def _defaults(name: str, network: NetworkSize) -> NextTokenSettings:
    # Same parameters as Heptapod's backbone and head together.
    return NextTokenSettings(depth=2 * network.depth)


NextTokenSettings.SIZES = sizes(_defaults)


@dataclass
class Canvas:
    """Images that are being drawn.

    Attributes:
        index_B: keys of their draws.
        order_BN: the positions in the order they are drawn.
        tokens_BN: what is there, in raster order.
        entering: x (B, M, D) that enters the backbone next.
        seen_1: (1,) int64, how many tokens are there.
        cache: keys and values.
    """

    index_B: Tensor
    order_BN: Tensor
    tokens_BN: Tensor
    entering: Entering
    seen_1: Tensor
    cache: KVCache


class NextToken(Completing):
    """One next token per step; `orders` says in which order."""

    Settings = NextTokenSettings
    REFUSED_OPTIONS = {
        "positions_per_step": _ONE_AT_A_TIME,
        "position_schedule": _ONE_AT_A_TIME,
        "position_order": _ONE_AT_A_TIME,
        "guidance": "this system is trained without a null class, so there is nothing to guide "
        "against",
    }
    settings: NextTokenSettings

    @abstractmethod
    def orders(self, index_B: Tensor, rng: Rng) -> Tensor:
        """(B, N): the order of every sequence."""

    def units(self) -> list[nn.Module]:
        """See System.units."""
        return list(self.backbone.blocks)

    def predicted(self, batch: Batch, rng: Rng) -> tuple[gridlib.Rows, Tensor]:
        """See MarSystem.predicted: all tokens, in the order that they come."""
        order_BN = self.orders(batch.index, rng)
        h_BND = self.states(batch, order_BN, rng)
        return gridlib.rows_of_all_steps(order_BN), h_BND.flatten(0, 1)

    def states(self, batch: Batch, order_BN: Tensor, rng: Rng) -> Tensor:
        """The backbone's vector of every token in its order: (B, N, D)."""
        ordered_BN = gridlib.take_tokens(batch.tokens, order_BN)
        start_B1D = self.backbone.embed_start(batch.labels, order_BN[:, 0])
        x_BMD = self.backbone.embed_tokens(ordered_BN[:, :-1], order_BN[:, 1:], 1)
        dropout = NO_DROPOUT
        if self.training:
            dropout = Dropout.draw(
                self.settings.dropout,
                "backbone",
                batch.index,
                0,
                self.backbone.dropout_sites,
                self.num_tokens,
                rng,
            )
        return self.backbone(torch.cat((start_B1D, x_BMD), dim=1), dropout)

    def look(self, batch: Batch, rng: Rng, seen: int) -> list[Elements]:
        """See System.look: an element carries the token before, and works on the next one."""
        order_BN = self.orders(batch.index, rng)
        self.states(batch, order_BN, rng)
        start_B1 = torch.full_like(order_BN[:, :1], NOWHERE)
        carried_BN = torch.cat((start_B1, order_BN[:, :-1]), dim=1)
        return [Elements(carried_BN, ((order_BN, carried_BN),))] * len(self.backbone.blocks)

    def next_token_losses(self, batch: Batch, rng: Rng) -> Tensor:
        """See System.next_token_losses."""
        rows, z_RD = self.predicted(batch, rng)
        _, loss_R = self.token_losses(z_RD, batch, rows, rng)
        return loss_R.view(-1, self.num_tokens)

    def draw(
        self,
        classes: Tensor,
        rng: Rng,
        options: SampleOptions | None,
        index: Tensor | None,
        given: Given | None,
    ) -> Tensor:
        """One token per step with a KV cache; see Completing.draw."""
        options = self.own_options(options, SampleOptions)
        self.check_sampling(classes, options)
        classes, index_B = self.place_sampling(classes, index)
        device = classes.device
        order_BN = self.orders(index_B, rng)
        tokens_BN = self.empty_tokens(len(classes), device)
        seen = 0
        before: list[Tensor] = []
        if given is not None:
            order_BN, token_BK = put_given(given, order_BN, tokens_BN)
            seen = given.num_known
            # A token stands with the position of the one that comes next.
            before = [self.backbone.embed_tokens(token_BK, order_BN[:, 1 : seen + 1], 1)]
        start_B1D = self.backbone.embed_start(classes, order_BN[:, 0])
        canvas = Canvas(
            index_B=index_B,
            order_BN=order_BN,
            tokens_BN=tokens_BN,
            entering=Entering(torch.cat((start_B1D, *before), dim=1)),
            seen_1=torch.zeros(1, dtype=torch.int64, device=device),
            cache=KVCache(len(self.backbone.blocks), self.num_tokens, device),
        )
        steps = steps_for(options, rng, self.num_tokens, device)
        for step in range(seen, self.num_tokens):
            now = options.at(step / self.num_tokens)
            is_last = step + 1 == self.num_tokens
            entering = canvas.entering.count
            kind: Hashable = (now.diffusion_steps,)
            if is_last or entering != 1:
                kind = None
            canvas.cache.place(step + 1 - entering)
            canvas.seen_1.fill_(step)
            steps.run(step, kind, partial(self.draw_token, canvas, now, is_last))
        return tokens_BN

    def draw_token(self, canvas: Canvas, options: SampleOptions, is_last: bool, rng: Rng) -> None:
        """One step: the newest elements enter, a token is drawn and becomes one."""
        (x_BMD,) = canvas.entering
        z_BD = self.backbone(x_BMD, cache=canvas.cache)[:, -1]
        position_B1 = canvas.order_BN.index_select(1, canvas.seen_1)
        token_B, _ = self.token_loss.draw(z_BD, rng, canvas.index_B, position_B1[:, 0], options)
        put(canvas.tokens_BN, position_B1, token_B[:, None])
        if is_last:
            return
        next_B1 = canvas.order_BN.index_select(1, canvas.seen_1 + 1)
        x_B1D = self.backbone.embed_tokens(token_B[:, None], next_B1, canvas.seen_1 + 1)
        canvas.entering.put(x_B1D)

    def expected_count(self, batch: int, phase: Phase | None = None) -> float:
        """Every token of every sequence."""
        return float(batch * self.num_tokens)

    def flops_per_image(self, phase: Phase | None = None) -> dict[str, float]:
        """See System.flops_per_image."""
        width = self.settings.width
        tokens = self.num_tokens
        return {
            "embedding": 2 * width * self.spec.channels * (tokens - 1),
            "backbone": self.settings.depth * block_flops(width, tokens, (tokens + 1) / 2),
            "token loss": self.token_loss.flops(tokens),
        }


class RasterOrder(NextToken):
    """1d-raster: row by row."""

    def orders(self, index_B: Tensor, rng: Rng) -> Tensor:
        """See NextToken.orders."""
        return gridlib.raster_orders(index_B, self.num_tokens)

    def check_given(self, given: Given, batch: int) -> None:
        """See System.check_given: only what comes first anyway can be given."""
        super().check_given(given, batch)
        if not bool(given.known_N[: given.num_known].all()):
            raise ValueError(
                "1d-raster draws row by row, so that only the first tokens can be given, as those "
                "of the top half; heptapod and 1d-random go on from any part"
            )


class RandomOrder(NextToken):
    """1d-random: an order of its own for every sequence."""

    def orders(self, index_B: Tensor, rng: Rng) -> Tensor:
        """See NextToken.orders."""
        return gridlib.random_orders(index_B, self.num_tokens, rng)
