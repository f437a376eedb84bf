"""SAR: autoregression with self-token prediction (Chen, Shi, Wu), groups of tokens step by step.

The positions of the grid are an ordered partition into groups G_1 to G_T; a step predicts all
tokens of one group at once, from all earlier groups. What a group's elements are made of (h, the
"dependency injection") are tokens of earlier groups as well.

Where a group can be made of the one before, token by token (`shift`), one stream is enough: element
i of G_t is token i of G_{t-1}. Elsewhere a forward pass has two streams, context and generation:
the class and the true tokens, and for every token an element that h made, which sees the context of
earlier groups and its own group. Only the generation stream is scored.

The published slides leave open: that every element carries its own position and the number of its
group; that the class is the first element of the context, and the input of G_1; that elements of
the generation carry one learned vector (`query`), which alone is the injection `shared`; that the
context of G_T, which nothing sees, is left out; that z is dropped token by token. Depths and widths
are chosen for their totals of 141M, 714M and 1.3B. Suffixes as in docs/legend.md; M elements of a
forward pass, G tokens of a group, K tokens that make up an element.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor, nn

from heptapod_fast import grid as gridlib
from heptapod_fast.config import AttentionUse
from heptapod_fast.config.settings import at_least, setting, share
from heptapod_fast.data.tokens import Batch
from heptapod_fast.grid import Groups, Rows, Sources
from heptapod_fast.model.dropout import NO_DROPOUT, Dropout
from heptapod_fast.model.token_losses import Contrast
from heptapod_fast.model.transformer import Packing, block_flops, block_values
from heptapod_fast.ops import CAUSAL, FULL, AttentionMask
from heptapod_fast.ops.dispatch import AUTO, Operators
from heptapod_fast.ops.masks import MAX_LENGTH, Visible, group_mask, two_stream_mask
from heptapod_fast.rng import Rng
from heptapod_fast.sampling import KVCache, SampleOptions
from heptapod_fast.systems.base import Loss, Phase
from heptapod_fast.systems.mar import (
    TINY_DATA,
    MarSettings,
    MarSystem,
    NetworkSize,
    put,
    sizes,
)
from heptapod_fast.tokenizers import TokenSpec

_BY_GROUPS = "this system predicts the groups of --grouping, which decide steps and positions"


@dataclass(frozen=True, kw_only=True)
class SarSettings(MarSettings):
    """The network, its groups, and what training drops."""

    grouping: Literal["next-token", "next-row", "next-layer", "next-neighbor"] = setting(
        "Groups of tokens: single ones in raster order, rows, rings from the centre outwards, "
        "anti-diagonals."
    )
    injection: Literal["shift", "nearest", "shared", "average"] = setting(
        "What the elements of a group are made of: the group before (shift, of the same size), the "
        "closest earlier token, one learned vector, the mean of earlier neighbours. Default: shift "
        "where it can be, else average."
    )
    label_dropout: float = setting(
        "Share of the samples that are trained without their class, which --guidance and "
        "--guidance-z need.",
        rule=share(),
    )
    z_dropout: float = setting(
        "Share of the tokens whose head is trained without the backbone's vector, which "
        "--guidance-x needs.",
        rule=share(),
    )
    guidance_x: float = setting(
        "Scale of the guidance at the head that samples are drawn with unless told otherwise.",
        rule=at_least(1),
        may_change=True,
    )
    guidance_z: float = setting(
        "Scale of the guidance of the backbone's vectors, likewise.",
        rule=at_least(1),
        may_change=True,
    )

    def resolve(self, defaults: Self, spec: TokenSpec) -> Self:
        """See SystemSettings.resolve."""
        settings = super().resolve(defaults.without("injection"), spec)
        groups = gridlib.GROUPINGS[settings.grouping](spec.grid, spec.grid)
        can_shift = len(set(groups.sizes)) == 1
        if settings.injection is None:
            settings = replace(settings, injection="shift" if can_shift else "average")
        if settings.injection == "shift" and not can_shift:
            few, many = min(groups.sizes), max(groups.sizes)
            raise ValueError(
                f"--injection shift takes every group from the one before, of the same size, but "
                f"the groups of --grouping {settings.grouping} have {few} to {many} tokens: use "
                "--grouping next-token or next-row, or another --injection"
            )
        length = 2 * spec.num_tokens + 1
        if settings.injection != "shift" and length > MAX_LENGTH:
            raise ValueError(
                f"--injection {settings.injection} trains two streams, {length} elements for "
                f"{spec.num_tokens} tokens, where masks have {MAX_LENGTH} at most: use --injection "
                "shift, or fewer tokens"
            )
        return settings

    def attention_uses(self, spec: TokenSpec) -> list[AttentionUse]:
        """See SystemSettings.attention_uses."""
        length = 2 * spec.num_tokens + 1
        visible: Visible | type = AttentionMask
        if self.injection == "shift":
            length = spec.num_tokens
            if self.grouping == "next-token":
                visible = CAUSAL
        return [
            AttentionUse(self.head_width, length, visible),
            AttentionUse(self.head_width, spec.num_tokens + 1, FULL),
        ]

    def derived(self, spec: TokenSpec) -> Iterator[tuple[str, str]]:
        """See SystemSettings.derived."""
        groups = gridlib.GROUPINGS[self.grouping](spec.grid, spec.grid)
        streams = "one" if self.injection == "shift" else "two"
        yield "head dim", f"{self.head_width} = {self.width} / {self.heads}"
        yield "steps", f"{len(groups.sizes)} groups of {min(groups.sizes)} to {max(groups.sizes)}"
        yield "streams", streams


@dataclass(frozen=True, kw_only=True)
class SarOptions(SampleOptions):
    """How tokens are drawn, and what is guided: at most one pass more of backbone and head each."""

    guidance: float | None = setting(
        "Scale s of classifier-free guidance at the head: v_u + s (v - v_u), of vectors without "
        "and with the class; two passes of backbone and head. 1 is none.",
        rule=at_least(1),
    )
    guidance_x: float | None = setting(
        "Scale of x-CFG: v_0 + s (v - v_0), of the head without and with the backbone's vector; "
        "two passes of the head. 1 is none. Default: the run's.",
        rule=at_least(1),
    )
    guidance_z: float | None = setting(
        "Scale of z-CFG: z_u + s (z - z_u), of the backbone's vectors without and with the class; "
        "two passes of the backbone. 1 is none. Default: the run's.",
        rule=at_least(1),
    )


# (guidance_x, guidance_z) of the slides' Table 4.
_GUIDANCE = {"B": (1.35, 3.0), "L": (1.25, 2.7), "H": (1.2, 2.5)}
_TABLE = {
    "B": NetworkSize(
        depth=14, width=768, heads=12, diffusion_blocks=7, diffusion_width=1024, micro_batch=64
    ),
    "L": NetworkSize(
        depth=32, width=1280, heads=16, diffusion_blocks=8, diffusion_width=1280, micro_batch=32
    ),
    "H": NetworkSize(
        depth=40, width=1536, heads=16, diffusion_blocks=12, diffusion_width=1536, micro_batch=16
    ),
}


def _defaults(network: NetworkSize) -> SarSettings:
    names = [name for name, known in _TABLE.items() if known == network]
    guidance_x, guidance_z = _GUIDANCE[names[0]] if names else (1.0, 1.0)
    # tiny has as many blocks as the other systems' tiny.
    return SarSettings(
        depth=network.depth if names else 2 * network.depth,
        grouping="next-neighbor",
        injection="average",
        token_loss="flow",
        label_dropout=0.1,
        z_dropout=0.1,
        guidance_x=guidance_x,
        guidance_z=guidance_z,
    )


SarSettings.SIZES = sizes(_defaults, _TABLE, tiny_data=replace(TINY_DATA, tokenizer="patch"))


class Sar(MarSystem):
    """Groups of tokens, each predicted at once."""

    Settings = SarSettings
    Options = SarOptions
    REFUSED_OPTIONS = {
        "positions_per_step": _BY_GROUPS,
        "position_schedule": _BY_GROUPS,
        "position_order": _BY_GROUPS,
    }
    settings: SarSettings
    null_classes = 1
    order_N: Tensor
    time_N: Tensor
    is_first_N: Tensor
    source_NK: Tensor
    weight_NK: Tensor

    def __init__(
        self,
        settings: SarSettings,
        spec: TokenSpec,
        num_classes: int,
        operators: Operators = AUTO,
    ):
        super().__init__(settings, spec, num_classes, operators)
        with torch.device("cpu"):
            self.groups = self.make_groups(settings, spec)
            sources = self.make_sources(settings, self.groups)
        self.has_two_streams = settings.injection != "shift"
        self.query = nn.Parameter(torch.empty(1, settings.width))

        # All below in the order of the groups.
        order_N = self.groups.order_N
        time_N = self.groups.group_N[order_N]
        for name, values in {
            "order_N": order_N,
            "time_N": time_N,
            "is_first_N": time_N == 0,
            "source_NK": sources.position_NK[order_N],
            "weight_NK": sources.weight_NK[order_N],
        }.items():
            self.register_buffer(name, values.to(self.query.device), persistent=False)
        self.context_length = self.num_tokens - self.groups.sizes[-1] if self.has_two_streams else 0
        with torch.device("cpu"):
            self.visible = self.make_visible()
        self._visible_there: dict[torch.device, Visible] = {}

    @staticmethod
    def make_groups(settings: SarSettings, spec: TokenSpec) -> Groups:
        """The groups of the grid."""
        return gridlib.GROUPINGS[settings.grouping](spec.grid, spec.grid)

    @staticmethod
    def make_sources(settings: SarSettings, groups: Groups) -> Sources:
        """Which tokens make up every element; for `shared` none."""
        if settings.injection == "shift":
            return gridlib.shifted_sources(groups)
        if settings.injection == "nearest":
            return gridlib.nearest_sources(groups)
        sources = gridlib.average_sources(groups)
        if settings.injection == "shared":
            return Sources(sources.position_NK[:, :1], torch.zeros(len(groups.order_N), 1))
        return sources

    def make_visible(self) -> Visible:
        """Who sees whom in training."""
        sizes_of_groups = list(self.groups.sizes)
        if self.has_two_streams:
            return two_stream_mask(sizes_of_groups, prefix=1, has_last_context=False)
        if max(sizes_of_groups) == 1:
            return CAUSAL
        return group_mask(sizes_of_groups)

    def visible_on(self, device: torch.device) -> Visible:
        """`visible` with its tables on a device."""
        if not isinstance(self.visible, AttentionMask):
            return self.visible
        if device not in self._visible_there:
            self._visible_there[device] = self.visible.to(device)
        return self._visible_there[device]

    def times(self) -> int:
        """Rows of the table of times: a group each."""
        with torch.device("cpu"):
            return len(self.make_groups(self.settings, self.spec).sizes)

    def units(self) -> list[nn.Module]:
        """See System.units."""
        return list(self.backbone.blocks)

    # ------------------------------------------------------------------------------------ training

    def forward(self, batch: Batch, rng: Rng, phase: Phase | None = None) -> Loss:
        """Sum of the token loss over all tokens of every sequence; see System.forward."""
        rows = gridlib.rows_of_all_steps(self.order_N.expand(len(batch), -1))
        z_RD = self.vectors(batch, rows, rng)
        total, _ = self.token_losses(z_RD, batch, rows, rng)
        return Loss(total, rows.total_weight())

    def vectors(self, batch: Batch, rows: Rows, rng: Rng) -> Tensor:
        """The backbone's vector of every token, in the order of the groups: (B * N, D)."""
        label_B = self.dropped_labels(batch.labels, batch.index, rng)
        x_BMD = self.embed(label_B, batch.tokens)
        length = x_BMD.shape[1]
        dropout = NO_DROPOUT
        if self.training:
            sites = self.backbone.dropout_sites
            dropout = Dropout.draw(
                self.settings.dropout, "backbone", batch.index, 0, sites, length, rng
            )
        generation_R = length - self.num_tokens + rows.step_R
        packing = Packing(rows.sequence_R, generation_R)
        visible = self.visible_on(x_BMD.device)
        z_RD = self.backbone(x_BMD, dropout, visible=visible, packing=packing)
        return self.dropped_vectors(z_RD, batch.index[rows.sequence_R], rows.slot_R, rng)

    def dropped_labels(self, label_B: Tensor, index_B: Tensor, rng: Rng) -> Tensor:
        """Labels; in training the share `label_dropout` of them is the null class."""
        rate = self.settings.label_dropout
        if rate == 0 or not self.training:
            return label_B
        is_dropped_B = rng.uniform("label", index_B, 1)[:, 0] < rate
        return torch.where(is_dropped_B, self.num_classes, label_B)

    def dropped_vectors(self, z_RD: Tensor, index_R: Tensor, slot_R: Tensor, rng: Rng) -> Tensor:
        """z; in training the share `z_dropout` of the rows is zero."""
        rate = self.settings.z_dropout
        if rate == 0 or not self.training:
            return z_RD
        is_kept_R = rng.uniform("z", index_R, 1, slot_R)[:, 0] >= rate
        return torch.where(is_kept_R[:, None], z_RD, z_RD.new_zeros(()))

    def embed(self, label_B: Tensor, tokens_BN: Tensor) -> Tensor:
        """The elements of a forward pass: class, context and generation, or generation alone.
        (B, M, D) in the dtype of the activations."""
        token_BND = self.backbone.token(tokens_BN)
        everything = slice(0, self.num_tokens)
        generation_BND = self.generation(label_B, token_BND, everything)
        if not self.has_two_streams:
            return generation_BND
        context_BMD = self.context(token_BND, slice(0, self.context_length))
        return torch.cat((self.prefix(label_B), context_BMD, generation_BND), dim=1)

    def prefix(self, label_B: Tensor) -> Tensor:
        """The class as the first element of the context: (B, 1, D)."""
        return self.backbone.label(label_B)[:, None].to(self.backbone.dtype)

    def context(self, token_BND: Tensor, part: slice) -> Tensor:
        """Elements of true tokens, embedded in raster order; part: which of the order."""
        x_BGD = token_BND[:, self.order_N[part]] + self.place(part)
        return x_BGD.to(self.backbone.dtype)

    def generation(self, label_B: Tensor, token_BND: Tensor, part: slice) -> Tensor:
        """Elements that are scored: h of earlier tokens, the class in the first group; part: which
        of the order. Tokens of `part` itself and later ones are not used."""
        weight_GK = self.weight_NK[part]
        source_GK = self.source_NK[part]
        if weight_GK.shape[1] == 1:
            x_BGD = token_BND[:, source_GK[:, 0]] * weight_GK
        else:
            # A product with a matrix that is mostly zeros: cheaper than K gathered copies.
            share_GN = weight_GK.new_zeros(len(weight_GK), self.num_tokens)
            share_GN = share_GN.scatter_add(1, source_GK, weight_GK)
            x_BGD = share_GN @ token_BND
        label_B1D = self.backbone.label(label_B)[:, None]
        x_BGD = torch.where(self.is_first_N[part, None], label_B1D, x_BGD)
        return (x_BGD + self.query + self.place(part)).to(self.backbone.dtype)

    def place(self, part: slice) -> Tensor:
        """(G, D): embeddings of position and group."""
        position = self.backbone.position(self.order_N[part])
        return position + self.backbone.time(self.time_N[part])

    # ------------------------------------------------------------------------------------ counting

    def expected_count(self, batch: int, phase: Phase | None = None) -> float:
        """Every token of every sequence."""
        return float(batch * self.num_tokens)

    @property
    def elements(self) -> int:
        """Elements of a forward pass."""
        return self.num_tokens + (1 + self.context_length if self.has_two_streams else 0)

    def keys_seen(self) -> float:
        """How many elements one sees, on average."""
        if isinstance(self.visible, AttentionMask):
            return float(self.visible.dense_NM.sum()) / self.elements
        return (self.elements + 1) / 2

    def flops_per_image(self, phase: Phase | None = None) -> dict[str, float]:
        """See System.flops_per_image."""
        settings = self.settings
        width = settings.width
        tokens = self.num_tokens
        whole = block_flops(width, self.elements, self.keys_seen())
        last = block_flops(width, self.elements, self.keys_seen(), rows=tokens)
        return {
            "embedding": 2 * width * self.spec.channels * tokens,
            "backbone": (settings.depth - 1) * whole + last,
            "token loss": self.token_loss.flops(tokens),
        }

    def saved_values(self, phase: Phase | None = None) -> float:
        """See System.saved_values."""
        settings = self.settings
        elements = self.elements
        block = block_values(settings.width, settings.heads, elements, elements)
        return settings.depth * block + self.token_loss.saved_values(self.num_tokens)

    # ------------------------------------------------------------------------------------ sampling

    @torch.no_grad()
    def sample(
        self,
        classes: Tensor,
        rng: Rng,
        options: SampleOptions | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """One group per step with a KV cache; where there are two streams, the tokens of a group
        then go through the context. See System.sample."""
        chosen = self.own_options(options, SarOptions)
        self.check_sampling(classes, chosen)
        guidance = self.guidance_of(chosen)
        label_B, index_B = self.place_sampling(classes, index)
        batch = len(label_B)
        # With a guided backbone every image is two rows: of its class and of none.
        label_R = label_B
        if guidance.guides_backbone:
            label_R = torch.cat((label_B, torch.full_like(label_B, self.num_classes)))
        tokens_BN = self.empty_tokens(batch, label_B.device)
        cache = KVCache(len(self.backbone.blocks), self.num_tokens + self.has_two_streams)
        token_RND = self.backbone.label.weight.new_zeros(
            len(label_R), self.num_tokens, self.settings.width
        )
        if self.has_two_streams:
            self.backbone(self.prefix(label_R), cache=cache, visible=FULL)
            cache.advance(1)
        starts = self.groups.starts
        for step, (start, size) in enumerate(zip(starts, self.groups.sizes, strict=True)):
            part = slice(start, start + size)
            x_RGD = self.generation(label_R, token_RND, part)
            z_RGD = self.backbone(x_RGD, cache=cache, visible=FULL)
            if not self.has_two_streams:
                cache.advance(size)
            z_TD, contrast = guidance.of_head(z_RGD.flatten(0, 1))
            position_BG = self.order_N[part].expand(batch, -1)
            index_T = index_B.repeat_interleave(size)
            token_T, _ = self.token_loss.draw(
                z_TD, rng.at(step), index_T, position_BG.flatten(), chosen, contrast
            )
            token_BG = token_T.unflatten(0, (batch, size))
            put(tokens_BN, position_BG, token_BG)
            if step + 1 == len(starts):
                break
            embedded_BGD = self.backbone.token(token_BG)
            token_RND[:, self.order_N[part]] = embedded_BGD.repeat(len(label_R) // batch, 1, 1)
            if self.has_two_streams:
                self.backbone(self.context(token_RND, part), cache=cache, visible=FULL)
                cache.advance(size)
        return tokens_BN

    def settled(self, options: SampleOptions) -> SampleOptions:
        """See System.settled."""
        chosen = self.own_options(options, SarOptions)
        scales = self.guidance_of(chosen)
        return replace(chosen, guidance=scales.cfg, guidance_x=scales.x, guidance_z=scales.z)

    def guidance_of(self, options: SarOptions) -> Guidance:
        """The scales to draw with; ValueError where training left nothing to guide against."""
        settings = self.settings
        asked = (options.guidance_x, options.guidance_z)
        if options.guidance not in (None, 1.0) and any(s not in (None, 1.0) for s in asked):
            raise ValueError(
                f"--guidance {options.guidance:g} beside --guidance-x or --guidance-z: it is both "
                "of them with one scale, give it alone"
            )
        no_class = options.guidance, options.guidance_z
        if settings.label_dropout == 0 and any(s not in (None, 1.0) for s in no_class):
            raise ValueError(
                "--guidance and --guidance-z guide away from no class, which this run, trained "
                "with --label-dropout 0, never saw"
            )
        if settings.z_dropout == 0 and options.guidance_x not in (None, 1.0):
            raise ValueError(
                "--guidance-x guides away from no vector of the backbone, which this run, trained "
                "with --z-dropout 0, never saw"
            )
        if options.guidance not in (None, 1.0):
            return Guidance(cfg=options.guidance)
        # --guidance 1 turns the run's own scales off; those that are given act beside it.
        has_defaults = options.guidance is None
        own_x = settings.guidance_x if has_defaults and settings.z_dropout > 0 else 1.0
        own_z = settings.guidance_z if has_defaults and settings.label_dropout > 0 else 1.0
        return Guidance(
            x=own_x if options.guidance_x is None else options.guidance_x,
            z=own_z if options.guidance_z is None else options.guidance_z,
        )


@dataclass(frozen=True)
class Guidance:
    """Scales of guidance, 1 is off. cfg: of classifier-free guidance at the head. z: of the
    backbone's vectors. x: of the head against no vector."""

    cfg: float = 1.0
    z: float = 1.0
    x: float = 1.0

    @property
    def guides_backbone(self) -> bool:
        """Whether the backbone runs without the class too."""
        return self.cfg != 1 or self.z != 1

    def of_head(self, z_RD: Tensor) -> tuple[Tensor, Contrast | None]:
        """(vectors for the head, what it is guided away from), of the backbone's: where it is
        guided, rows of classes and, behind them, as many of none."""
        contrast = None
        if self.guides_backbone:
            z_RD, none_RD = z_RD.chunk(2)
            if self.cfg != 1:
                return z_RD, Contrast(none_RD, self.cfg)
            z_RD = none_RD + self.z * (z_RD - none_RD)
        if self.x != 1:
            contrast = Contrast(torch.zeros_like(z_RD), self.x)
        return z_RD, contrast
