"""Heptapod: next 2D distribution prediction (paper, section 4).

Every sequence has its own random order. The backbone sees [S], then each token with its own
position, and is never told which position comes next; the 2D head turns h_0..h_t into one vector
for every position of its window, and every unseen one is supervised. Suffixes as in docs/legend.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heptapod_fast import grid as gridlib
from heptapod_fast.config import AttentionUse
from heptapod_fast.config.settings import at_least, between, setting
from heptapod_fast.data.tokens import Batch
from heptapod_fast.model.dropout import NO_DROPOUT, Dropout
from heptapod_fast.model.heads import Drawing, GlobalHead, LocalHead
from heptapod_fast.model.transformer import Stream, block_flops
from heptapod_fast.ops import CAUSAL, FULL, Ends
from heptapod_fast.ops.dispatch import AUTO, Operators
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


@dataclass(frozen=True, kw_only=True)
class HeptapodSettings(MarSettings):
    """The network, the 2D head, and what is supervised."""

    head: Literal["global", "local"] = setting(
        "2D prediction head: the whole grid, or the window that holds the next token."
    )
    head_depth: int = setting(
        "Blocks of the 2D head; the backbone gets the rest of the size's total (paper, Table 4).",
        rule=between(1, 2**10),
    )
    window: int = setting(
        "Tokens per window of the local head: a square number whose root divides the grid.",
        rule=at_least(1),
    )
    density: int = setting(
        "Supervision density n: steps per sequence that get a head pass and a loss.",
        rule=at_least(1),
    )
    rows_per_step: int | None = setting(
        "Unseen positions of each supervised step that get a loss, drawn anew every time and "
        "weighted to stand for all of them (global head); default: all.",
        rule=at_least(1),
        before=None,
    )
    steps: Literal["antithetic", "uniform", "mar"] = setting(
        "How supervised steps are drawn: mirrored pairs (static shapes), alone, or MAR's ratio."
    )
    loss_weight: Literal["position", "step"] = setting(
        "Average over supervised positions, or within each step first."
    )

    def resolve(self, defaults: Self, spec: TokenSpec) -> Self:
        """See SystemSettings.resolve. `defaults.head_depth` is half of the size's total depth."""
        settings = super().resolve(defaults.without("head_depth"), spec)
        settings = settings._with_depths(2 * defaults.head_depth)
        settings = settings._with_window(spec)
        if settings.density > spec.num_tokens:
            raise ValueError(
                f"--density {settings.density}: expected 1 to {spec.num_tokens} steps per sequence"
            )
        if settings.head == "local":
            settings.refuse(("rows_per_step",), "needs --head global; windows are whole")
        if (settings.rows_per_step or 1) > spec.num_tokens:
            raise ValueError(
                f"--rows-per-step {settings.rows_per_step}: expected 1 to {spec.num_tokens}, the "
                "tokens of an image"
            )
        return settings

    def rows_of_steps(self, spec: TokenSpec) -> float:
        """Supervised positions of an image, on average."""
        rows = gridlib.expected_rows(1, spec.num_tokens, self.density, self.steps)
        if self.rows_per_step is None:
            return rows
        return self.density * gridlib.expected_sample(
            spec.num_tokens, self.rows_per_step, self.steps
        )

    def _with_depths(self, total: int) -> Self:
        """depth and head_depth, which share the blocks of the size."""
        head_depth = total // 2 if self.head_depth is None else self.head_depth
        depth = total - head_depth if self.depth is None else self.depth
        if depth < 1:
            raise ValueError(
                f"--head-depth {head_depth}: expected 1 to {total - 1}, so that the backbone keeps "
                "a block (or give --depth too)"
            )
        return replace(self, depth=depth, head_depth=head_depth)

    def _with_window(self, spec: TokenSpec) -> Self:
        """head and window, which follow from each other."""
        head = self.head
        window = self.window
        whole = spec.num_tokens
        grid = spec.grid
        if head is None:
            head = "global" if window in (None, whole) else "local"
        if head == "global":
            if window not in (None, whole):
                raise ValueError(
                    f"--window {window} contradicts --head global, whose window is the whole grid "
                    f"of {whole} tokens; use --head local"
                )
            return replace(self, head=head, window=whole)
        windows = [side * side for side in range(1, grid) if grid % side == 0]
        if not windows:
            raise ValueError(f"--head local: a {grid}x{grid} grid has no smaller windows")
        if window is None:
            quarter = whole / 4
            window = min(windows, key=lambda w: abs(math.log(w / quarter)))
        if window not in windows:
            raise ValueError(
                f"--window {window}: a {grid}x{grid} grid divides into windows of "
                f"{', '.join(map(str, windows))} tokens"
            )
        return replace(self, head=head, window=window)

    def micro_batch_multiple(self) -> tuple[int, str]:
        """See SystemSettings.micro_batch_multiple."""
        if self.steps != "antithetic":
            return 1, ""
        return 2, (
            "is odd, but --steps antithetic works on pairs: use an even --micro-batch (and an even "
            "--batch per rank), or --steps uniform"
        )

    def attention_uses(self, spec: TokenSpec) -> list[AttentionUse]:
        """See SystemSettings.attention_uses."""
        backbone = AttentionUse(self.head_width, spec.num_tokens, CAUSAL)
        if self.head == "global":
            return [backbone, AttentionUse(self.head_width, spec.num_tokens + 1, FULL)]
        window = AttentionUse(self.head_width, self.window, FULL)
        return [backbone, AttentionUse(self.head_width, spec.num_tokens, Ends), window]

    def derived(self, spec: TokenSpec) -> Iterator[tuple[str, str]]:
        """See SystemSettings.derived."""
        yield "head dim", f"{self.head_width} = {self.width} / {self.heads}"
        rows = self.rows_of_steps(spec)
        if self.head == "local":
            how = "local windows"
        elif self.rows_per_step is not None:
            how = f"{rows:g} rows per image, at most {self.rows_per_step} of a step"
        elif self.steps == "mar":
            how = f"{rows:g} rows per image, MAR's mean ratio"
        else:
            how = f"{rows:g} = {self.density} x ({spec.num_tokens} + 1) / 2 rows per image"
        yield "supervision", f"w{self.window}n{self.density}, {how}"


def _defaults(name: str, network: NetworkSize) -> HeptapodSettings:
    return HeptapodSettings(
        head_depth=network.depth,
        density=2 if name == "tiny" else 1,
        steps="antithetic",
        loss_weight="position",
    )


HeptapodSettings.SIZES = sizes(_defaults)


@dataclass(frozen=True, kw_only=True)
class HeptapodOptions(SampleOptions):
    """How an image is filled in, and how tokens are drawn."""

    positions_per_step: int = setting(
        "Positions filled in per step; the 2D distribution allows more than one.",
        default=1,
        rule=at_least(1),
    )
    position_schedule: Literal["constant", "cosine"] = setting(
        "Equal groups, or few positions at first and many at the end.", default="constant"
    )
    position_order: Literal["random", "confidence"] = setting(
        "Where the next token goes: a random order, or where the drawn code is likeliest.",
        default="random",
    )

    def check_tokens(self, spec: TokenSpec) -> None:
        """See SampleOptions.check_tokens."""
        super().check_tokens(spec)
        if self.positions_per_step > spec.num_tokens:
            raise ValueError(
                f"--positions-per-step {self.positions_per_step}: expected 1 to {spec.num_tokens}, "
                "the tokens of an image"
            )
        if self.position_order == "confidence" and spec.kind == "continuous":
            raise ValueError("--position-order confidence needs discrete tokens")


@dataclass
class Canvas:
    """Images that are being drawn.

    Attributes:
        index_B: keys of their draws.
        order_BN: the positions in the order they are drawn.
        tokens_BN: what is there, in raster order.
        entering: x (B, M, D) that enters the backbone next, and (B, M) as which elements of the
            head.
        seen_1: (1,) int64, how many tokens are there; seen: the same, for the host.
        cache: keys and values of the backbone.
        drawing: what the head keeps.
    """

    index_B: Tensor
    order_BN: Tensor
    tokens_BN: Tensor
    entering: Entering
    seen_1: Tensor
    cache: KVCache
    drawing: Drawing
    seen: int = 0

    def begin(self, placed: int, seen: int) -> None:
        """A step before which so many elements were placed, and so many tokens are there."""
        self.cache.place(placed)
        self.drawing.place(placed)
        self.seen = seen
        self.seen_1.fill_(seen)


class Heptapod(Completing):
    """Causal backbone, 2D head (global or local), token loss."""

    Settings = HeptapodSettings
    Options = HeptapodOptions
    REFUSED_OPTIONS = {
        "guidance": "this system is trained without a null class, so there is nothing to guide "
        "against"
    }
    settings: HeptapodSettings

    def __init__(
        self,
        settings: HeptapodSettings,
        spec: TokenSpec,
        num_classes: int,
        operators: Operators = AUTO,
    ):
        super().__init__(settings, spec, num_classes, operators)
        self.head: GlobalHead | LocalHead
        if settings.head == "global":
            self.head = GlobalHead(
                depth=settings.head_depth,
                width=settings.width,
                heads=settings.heads,
                num_tokens=spec.num_tokens,
                operators=operators,
            )
        else:
            self.head = LocalHead(
                depth=settings.head_depth,
                width=settings.width,
                heads=settings.heads,
                grid=spec.grid,
                window=settings.window,
                operators=operators,
            )

    def units(self) -> list[nn.Module]:
        """See System.units."""
        return [*self.backbone.blocks, *self.head.blocks]

    # ------------------------------------------------------------------------------------ training

    def predicted(self, batch: Batch, rng: Rng) -> tuple[gridlib.Rows, Tensor]:
        """See MarSystem.predicted: the unseen positions of the drawn steps, or of their windows."""
        settings = self.settings
        index_B = batch.index
        order_BN = gridlib.random_orders(index_B, self.num_tokens, rng)
        steps_Bn = gridlib.draw_steps(
            index_B, self.num_tokens, settings.density, settings.steps, rng
        )
        h_BND = self.states(batch, order_BN, rng)
        if settings.head == "global":
            return self.global_head(h_BND, order_BN, steps_Bn, index_B, rng)
        return self.local_head(h_BND, order_BN, steps_Bn, index_B, rng)

    def states(self, batch: Batch, order_BN: Tensor, rng: Rng) -> Tensor:
        """h_0..h_{N-1} of every sequence: (B, N, D)."""
        before_BM = order_BN[:, :-1]
        tokens_BM = gridlib.take_tokens(batch.tokens, before_BM)
        start_B1D = self.backbone.embed_start(batch.labels)
        x_BMD = self.backbone.embed_tokens(tokens_BM, before_BM, 1)
        x_BND = torch.cat((start_B1D, x_BMD), dim=1)
        dropout = self.dropout("backbone", batch.index, 0, self.backbone.dropout_sites, rng)
        return self.backbone(x_BND, dropout)

    def global_head(
        self, h_BND: Tensor, order_BN: Tensor, steps_Bn: Tensor, index_B: Tensor, rng: Rng
    ) -> tuple[gridlib.Rows, Tensor]:
        """Supervised rows over the whole grid and their vectors (R, D)."""
        settings = self.settings
        head = cast(GlobalHead, self.head)
        if settings.rows_per_step is not None:
            rows = gridlib.sampled_rows(
                order_BN, steps_Bn, settings.rows_per_step, settings.loss_weight
            )
        elif settings.steps == "antithetic":
            rows = gridlib.packed_rows(order_BN, steps_Bn, settings.loss_weight)
        else:
            rows = gridlib.padded_rows(gridlib.ranks(order_BN), steps_Bn, settings.loss_weight)
        length = self.num_tokens + 1
        dropout = self.head_dropout("head", index_B, length, head.dropout_sites, rng)
        pair_R = rows.pair_R(settings.density)
        z_RD = head(h_BND, order_BN, steps_Bn, pair_R, rows.position_R, dropout)
        return rows, z_RD

    def local_head(
        self, h_BND: Tensor, order_BN: Tensor, steps_Bn: Tensor, index_B: Tensor, rng: Rng
    ) -> tuple[gridlib.Rows, Tensor]:
        """Rows of the windows that hold the next tokens, and their vectors (R, D)."""
        settings = self.settings
        head = cast(LocalHead, self.head)
        next_S = order_BN.gather(1, steps_Bn).flatten()
        position_SW = head.window_positions(next_S)
        rows = gridlib.window_rows(
            position_SW, gridlib.ranks(order_BN), steps_Bn, settings.loss_weight
        )
        length = settings.window
        dropout = self.head_dropout("head", index_B, length, head.dropout_sites, rng)
        cross = self.head_dropout("cross", index_B, length, len(head.blocks), rng)
        return rows, head(h_BND, steps_Bn, position_SW, dropout, cross)

    def dropout(
        self,
        stream: str,
        index_P: Tensor,
        slot_P: Tensor | int,
        sites: int,
        rng: Rng,
        length: int | None = None,
    ) -> Dropout:
        """Masks of one pass over P sequences, by default of N elements; none while sampling."""
        if not self.training:
            return NO_DROPOUT
        length = self.num_tokens if length is None else length
        return Dropout.draw(self.settings.dropout, stream, index_P, slot_P, sites, length, rng)

    def head_dropout(
        self, stream: str, index_B: Tensor, length: int, sites: int, rng: Rng
    ) -> Dropout:
        """Dropout of the S = B * n head sequences; the slot tells the n steps apart."""
        density = self.settings.density
        slot_S = torch.arange(density, device=index_B.device).repeat(len(index_B))
        index_S = index_B.repeat_interleave(density)
        return self.dropout(stream, index_S, slot_S, sites, rng, length)

    # ------------------------------------------------------------------------------------ sampling

    def draw(
        self,
        classes: Tensor,
        rng: Rng,
        options: SampleOptions | None,
        index: Tensor | None,
        given: Given | None,
    ) -> Tensor:
        """One (position, token) pair per step, or several; the backbone runs with a KV cache.

        See Completing.draw. With the local head the positions are drawn first and only their
        windows are run.
        """
        options = self.own_options(options, HeptapodOptions)
        self.check_sampling(classes, options)
        classes, index_B = self.place_sampling(classes, index)
        device = classes.device
        canvas = self.canvas(classes, rng, index_B, given)
        seen = 0 if given is None else given.num_known
        left = self.num_tokens - seen
        sizes = gridlib.group_sizes(
            left, self._positions_per_step(options, left), options.position_schedule
        )
        steps = steps_for(options, rng, len(sizes), device)
        placed = 0  # elements in the cache
        for step, count in enumerate(sizes):
            entering = canvas.entering.count
            now = options.at(seen / self.num_tokens)
            is_last = step + 1 == len(sizes)
            # Likeness: as many elements enter as are drawn, so that all tensors stay in place.
            kind: Hashable = (count, now.diffusion_steps)
            if is_last or entering != count or options.position_order == "confidence":
                kind = None
            canvas.begin(placed, seen)
            draw_group = partial(self.draw_group, canvas, count, now, is_last)
            steps.run(step, kind, draw_group)
            placed += entering
            seen += count
        return canvas.tokens_BN

    def canvas(self, classes: Tensor, rng: Rng, index_B: Tensor, given: Given | None) -> Canvas:
        """Images of which nothing but the given tokens is there."""
        device = classes.device
        order_BN = gridlib.random_orders(index_B, self.num_tokens, rng)
        tokens_BN = self.empty_tokens(len(classes), device)
        x_BMD = self.backbone.embed_start(classes)
        element_BM = torch.zeros_like(classes)[:, None]
        if given is not None:
            order_BN, token_BK = put_given(given, order_BN, tokens_BN)
            position_BK = order_BN[:, : given.num_known]
            x_BKD = self.backbone.embed_tokens(token_BK, position_BK, 1)
            x_BMD = torch.cat((x_BMD, x_BKD), dim=1)
            element_BM = torch.cat((element_BM, position_BK + 1), dim=1)
        return Canvas(
            index_B=index_B,
            order_BN=order_BN,
            tokens_BN=tokens_BN,
            entering=Entering(x_BMD, element_BM),
            seen_1=torch.zeros(1, dtype=torch.int64, device=device),
            cache=KVCache(len(self.backbone.blocks), self.num_tokens, device),
            drawing=self.head.drawing(len(classes), self.backbone.dtype),
        )

    def draw_group(
        self, canvas: Canvas, count: int, options: HeptapodOptions, is_last: bool, rng: Rng
    ) -> None:
        """One step: the newest elements enter, `count` tokens are drawn and become elements."""
        x_BMD, element_BM = canvas.entering
        h_BMD = self.backbone(x_BMD, cache=canvas.cache)
        canvas.drawing.see(h_BMD, element_BM)
        draw_at = partial(self.draw_at, canvas.drawing, rng, canvas.index_B, options)
        if options.position_order == "confidence":
            seen = canvas.seen
            ranked_BU, token_Bk = self.most_confident(draw_at, canvas.order_BN[:, seen:], count)
            canvas.order_BN[:, seen:] = ranked_BU
            position_Bk = ranked_BU[:, :count]
        else:
            next_k = canvas.seen_1 + torch.arange(count, device=canvas.seen_1.device)
            position_Bk = canvas.order_BN.index_select(1, next_k)
            token_Bk, _ = draw_at(position_Bk)
        put(canvas.tokens_BN, position_Bk, token_Bk)
        if is_last:
            return
        x_BkD = self.backbone.embed_tokens(token_Bk, position_Bk, canvas.seen_1 + 1)
        canvas.entering.put(x_BkD, position_Bk + 1)

    def _positions_per_step(self, options: HeptapodOptions, left: int) -> int:
        """As asked for, but not more than are left to draw."""
        asked = options.positions_per_step
        return min(asked, left) if asked <= self.num_tokens else asked

    def check_sampling(self, classes: Tensor, options: SampleOptions) -> None:
        """See System.check_sampling."""
        super().check_sampling(classes, options)
        options = self.own_options(options, HeptapodOptions)
        if options.position_order == "confidence" and self.settings.head == "local":
            raise ValueError(
                "--position-order confidence compares the whole grid; a run with --head local "
                "predicts one window at a time"
            )

    def draw_at(
        self,
        drawing: Drawing,
        rng: Rng,
        index_B: Tensor,
        options: SampleOptions,
        position_Bk: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, k) or (B, k, C) at unseen positions, and the probabilities (B, k) of codes."""
        index_R = index_B.repeat_interleave(position_Bk.shape[1])
        z_RD = drawing.vectors(position_Bk)
        token_R, chance_R = self.token_loss.draw(z_RD, rng, index_R, position_Bk.flatten(), options)
        chance_Bk = None if chance_R is None else chance_R.view_as(position_Bk)
        return token_R.unflatten(0, position_Bk.shape), chance_Bk

    def most_confident(
        self,
        draw_at: Callable[[Tensor], tuple[Tensor, Tensor | None]],
        unseen_BU: Tensor,
        count: int,
    ) -> tuple[Tensor, Tensor]:
        """A code is drawn everywhere unseen: (the positions, the likeliest first; the codes of the
        first `count` of them)."""
        code_BU, chance_BU = draw_at(unseen_BU)
        assert chance_BU is not None  # only codes are drawn by confidence
        ranking_BU = chance_BU.argsort(dim=1, descending=True, stable=True)
        return unseen_BU.gather(1, ranking_BU), code_BU.gather(1, ranking_BU[:, :count])

    # ---------------------------------------------------------------------------------- looking in

    def look(self, batch: Batch, rng: Rng, seen: int) -> list[Elements]:
        """See System.look: the head is shown h_0 to h_seen, and lets out all of its elements."""
        order_BN = gridlib.random_orders(batch.index, self.num_tokens, rng)
        h_BND = self.states(batch, order_BN, rng)
        start_B1 = torch.full_like(order_BN[:, :1], NOWHERE)
        own_BN = torch.cat((start_B1, order_BN[:, :-1]), dim=1)
        backbone = Elements(own_BN, ((own_BN, own_BN),))
        steps_B1 = torch.full_like(start_B1, seen)
        if isinstance(self.head, GlobalHead):
            stream = Stream(self.head.assemble(h_BND, order_BN, steps_B1))
            for block in self.head.blocks:
                stream = block(stream)
            every_L = torch.arange(NOWHERE, self.num_tokens, device=order_BN.device)
            every_BL = every_L.expand(len(order_BN), -1)
            head = Elements(every_BL, ((every_BL, every_BL),))
        else:
            window_BW = self.head.window_positions(order_BN[:, seen])
            self.head(h_BND, steps_B1, window_BW)
            head = Elements(window_BW, ((window_BW, own_BN), (window_BW, window_BW)))
        return [backbone] * len(self.backbone.blocks) + [head] * len(self.head.blocks)

    def next_token_losses(self, batch: Batch, rng: Rng) -> Tensor:
        """See System.next_token_losses: a head pass for each of the N steps."""
        order_BN = gridlib.random_orders(batch.index, self.num_tokens, rng)
        h_BND = self.states(batch, order_BN, rng)
        drawing: Drawing = self.head.drawing(len(order_BN), h_BND.dtype)
        element_BN = F.pad(order_BN[:, :-1] + 1, (1, 0))  # whose states they are: [S] is 0
        target_BN = gridlib.take_tokens(batch.tokens, order_BN)
        losses = []
        for step in range(self.num_tokens):
            drawing.place(step)
            drawing.see(h_BND[:, step : step + 1], element_BN[:, step : step + 1])
            position_B1 = order_BN[:, step : step + 1]
            z_BD = drawing.vectors(position_B1)
            _, loss_B = self.token_loss.loss(
                z_BD, target_BN[:, step], rng, batch.index, position_B1[:, 0]
            )
            losses.append(loss_B)
        return torch.stack(losses, dim=1)

    # ------------------------------------------------------------------------------------ counting

    def expected_count(self, batch: int, phase: Phase | None = None) -> float:
        """See System.expected_count; exact for antithetic steps."""
        if self.settings.loss_weight == "step":
            return float(batch * self.settings.density)
        return self.expected_rows(batch)

    def expected_rows(self, batch: int) -> float:
        """Expected number of supervised positions of `batch` sequences."""
        settings = self.settings
        rows = gridlib.expected_rows(batch, self.num_tokens, settings.density, settings.steps)
        if settings.head == "global":
            return rows
        # An unseen position shares the window of the next token: that token itself, and each of the
        # other N - t - 1 unseen ones with probability (W - 1) / (N - 1).
        next_tokens = batch * settings.density
        others = rows - next_tokens
        return next_tokens + others * (settings.window - 1) / max(self.num_tokens - 1, 1)

    def flops_per_image(self, phase: Phase | None = None) -> dict[str, float]:
        """See System.flops_per_image."""
        settings = self.settings
        width = self.settings.width
        tokens = self.num_tokens
        supervised = self.expected_rows(2) / 2
        if settings.rows_per_step is not None:
            supervised = settings.rows_of_steps(self.spec)
        if isinstance(self.head, GlobalHead):
            head = self.head.flops(tokens, settings.density, supervised / settings.density)
        else:
            unseen = gridlib.expected_rows(1, tokens, 1, settings.steps)
            head = self.head.flops(tokens, settings.density, states=tokens + 1 - unseen)
        return {
            "embedding": 2 * width * self.spec.channels * (tokens - 1),
            "backbone": settings.depth * block_flops(width, tokens, (tokens + 1) / 2),
            "head": head,
            "token loss": self.token_loss.flops(supervised),
        }
