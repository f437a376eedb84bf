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
forward pass, G tokens of a group, P sequences that are sampled: one for every image, or two where
the backbone is guided.
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
from heptapod_fast.grid import Groups, Rows
from heptapod_fast.model.dropout import NO_DROPOUT, Dropout, drop_labels
from heptapod_fast.model.token_losses import Contrast
from heptapod_fast.model.transformer import Packing, block_flops
from heptapod_fast.ops import CAUSAL, FULL, AttentionMask, Ends
from heptapod_fast.ops.dispatch import AUTO, Operators
from heptapod_fast.ops.masks import (
    BLOCK,
    EMPTY_BLOCK,
    MAX_LENGTH,
    Visible,
    group_mask,
    two_stream_mask,
)
from heptapod_fast.rng import Rng
from heptapod_fast.sampling import KVCache, SampleOptions
from heptapod_fast.systems.base import (
    NOWHERE,
    TINY_DATA,
    Elements,
    Phase,
    with_possible_scale,
)
from heptapod_fast.systems.mar import (
    TINY,
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
        "closest earlier token, one learned vector, the mean of earlier neighbours. Left out: "
        "shift where groups are of one size, else average."
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
        settings = with_possible_scale(settings, self, "guidance_x", "z_dropout")
        settings = with_possible_scale(settings, self, "guidance_z", "label_dropout")
        sizes_of_groups = settings.groups(spec).sizes
        can_shift = len(set(sizes_of_groups)) == 1
        if settings.injection is None:
            settings = replace(settings, injection="shift" if can_shift else "average")
        if settings.injection == "shift" and not can_shift:
            few, many = min(sizes_of_groups), max(sizes_of_groups)
            raise ValueError(
                f"--injection shift takes every group from the one before, of the same size, but "
                f"the groups of --grouping {settings.grouping} have {few} to {many} tokens: use "
                "--grouping next-token or next-row, or another --injection"
            )
        elements = settings.elements(spec)
        if settings.has_mask and elements > MAX_LENGTH:
            raise ValueError(
                f"--grouping {settings.grouping} --injection {settings.injection} makes {elements} "
                f"elements of {spec.num_tokens} tokens, where masks have {MAX_LENGTH} at most: use "
                "fewer tokens (a smaller --image-size), or --grouping next-token --injection shift"
            )
        return settings

    def groups(self, spec: TokenSpec) -> Groups:
        """The groups of the grid, on the CPU wherever a system is built."""
        with torch.device("cpu"):
            return gridlib.GROUPINGS[self.grouping](spec.grid, spec.grid)

    @property
    def has_two_streams(self) -> bool:
        """Whether context and generation are apart."""
        return self.injection != "shift"

    @property
    def has_mask(self) -> bool:
        """Whether who sees whom is more than causal."""
        return self.has_two_streams or self.grouping != "next-token"

    def elements(self, spec: TokenSpec) -> int:
        """Elements of a forward pass: of the context all but the last group's, which nothing
        sees."""
        if not self.has_two_streams:
            return spec.num_tokens
        return 1 + 2 * spec.num_tokens - self.groups(spec).sizes[-1]

    def visible(self, spec: TokenSpec) -> Visible:
        """Who sees whom in training; of a mask the tables are on the CPU."""
        sizes_of_groups = list(self.groups(spec).sizes)
        if self.has_two_streams:
            return two_stream_mask(sizes_of_groups, prefix=1, has_last_context=False)
        return group_mask(sizes_of_groups) if self.has_mask else CAUSAL

    def attention_uses(self, spec: TokenSpec) -> list[AttentionUse]:
        """See SystemSettings.attention_uses."""
        visible = AttentionMask if self.has_mask else CAUSAL
        return [
            AttentionUse(self.head_width, self.elements(spec), visible),
            AttentionUse(self.head_width, spec.num_tokens + 1, FULL),
        ]

    def derived(self, spec: TokenSpec) -> Iterator[tuple[str, str]]:
        """See SystemSettings.derived."""
        sizes_of_groups = self.groups(spec).sizes
        few, many = min(sizes_of_groups), max(sizes_of_groups)
        streams = "two" if self.has_two_streams else "one"
        yield "head dim", f"{self.head_width} = {self.width} / {self.heads}"
        yield "steps", f"{len(sizes_of_groups)} groups of {few} to {many}"
        yield "streams", f"{streams}, {self.elements(spec)} elements"
        with torch.device("cpu"):
            visible = self.visible(spec)
        if isinstance(visible, AttentionMask):
            count = visible.blocks.numel()
            empty = int((visible.blocks == EMPTY_BLOCK).sum())
            shape = f"{BLOCK} x {BLOCK}"
            yield (
                "skipped",
                f"{empty / count:.0%} = {empty} / {count} blocks of {shape} in attention",
            )


@dataclass(frozen=True, kw_only=True)
class SarOptions(SampleOptions):
    """How tokens are drawn, and what is guided: at most one pass more of backbone and head each."""

    guidance: float | None = setting(
        "Scale s of classifier-free guidance at the head: v_u + s (v - v_u), of vectors without "
        "and with the class; two passes of backbone and head. 1 is none, and turns the run's own "
        "scales off.",
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
_GUIDANCE = {"tiny": (1.0, 1.0), "B": (1.35, 3.0), "L": (1.25, 2.7), "H": (1.2, 2.5)}
_NETWORKS = {
    # As many blocks as the other systems' tiny has in backbone and head.
    "tiny": replace(TINY, depth=2 * TINY.depth),
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


def _defaults(name: str, network: NetworkSize) -> SarSettings:
    guidance_x, guidance_z = _GUIDANCE[name]
    return SarSettings(
        depth=network.depth,
        grouping="next-neighbor",
        injection="average",
        token_loss="flow",
        label_dropout=0.1,
        z_dropout=0.1,
        guidance_x=guidance_x,
        guidance_z=guidance_z,
    )


SarSettings.SIZES = sizes(_defaults, _NETWORKS, tiny_data=replace(TINY_DATA, tokenizer="patch"))


class Sar(MarSystem):
    """Groups of tokens, each predicted at once."""

    Settings = SarSettings
    Options = SarOptions
    REFUSED_OPTIONS = {
        "positions_per_step": _BY_GROUPS,
        "position_schedule": _BY_GROUPS,
        "position_order": _BY_GROUPS,
        "cuda_graph": "no step of this system is like another, so that none is replayed",
    }
    settings: SarSettings
    null_classes = 1
    order_N: Tensor
    time_N: Tensor
    is_first_N: Tensor
    source_N: Tensor
    share_NN: Tensor

    def __init__(
        self,
        settings: SarSettings,
        spec: TokenSpec,
        num_classes: int,
        operators: Operators = AUTO,
    ):
        super().__init__(settings, spec, num_classes, operators)
        self.query = nn.Parameter(torch.empty(1, settings.width))

        self.groups = settings.groups(spec)
        with torch.device("cpu"):  # where masks are made
            self.visible = settings.visible(spec)
            tables = self.tables()
        for name, values in tables.items():
            self.register_buffer(name, values.to(self.query.device), persistent=False)
        self._visible_there: dict[torch.device, Visible] = {}

    def tables(self) -> dict[str, Tensor]:
        """What elements are made of, in the order of the groups as all elements and tokens are:
        positions, numbers of groups, which elements are the first group's, and earlier tokens: one
        for each (`source_N`), or shares of all (`share_NN`)."""
        order_N = self.groups.order_N
        time_N = self.groups.group_N[order_N]
        found = {"order_N": order_N, "time_N": time_N, "is_first_N": time_N == 0}
        if self.settings.injection == "nearest":
            rank_N = order_N.argsort()
            found["source_N"] = rank_N[gridlib.nearest_sources(self.groups)[order_N]]
        elif self.settings.injection == "average":
            found["share_NN"] = gridlib.average_shares(self.groups)[order_N][:, order_N]
        return found

    def visible_on(self, device: torch.device) -> Visible:
        """`visible` with its tables on a device."""
        if not isinstance(self.visible, AttentionMask):
            return self.visible
        if device not in self._visible_there:
            self._visible_there[device] = self.visible.to(device)
        return self._visible_there[device]

    def times(self) -> int:
        """Rows of the table of times: a group each."""
        return len(self.settings.groups(self.spec).sizes)

    def units(self) -> list[nn.Module]:
        """See System.units."""
        return list(self.backbone.blocks)

    # ------------------------------------------------------------------------------------ training

    def predicted(self, batch: Batch, rng: Rng) -> tuple[Rows, Tensor]:
        """See MarSystem.predicted: all tokens, in the order of the groups."""
        rows = gridlib.rows_of_all_steps(self.order_N.expand(len(batch), -1))
        return rows, self.vectors(batch, rows, rng)

    def vectors(self, batch: Batch, rows: Rows, rng: Rng) -> Tensor:
        """The backbone's vector of every token, in the order of the groups: (B * N, D)."""
        label_B = batch.labels
        if self.training:
            rate = self.settings.label_dropout
            label_B = drop_labels(label_B, batch.index, rate, self.num_classes, rng)
        x_BMD = self.embed(label_B, batch.tokens)
        length = x_BMD.shape[1]
        dropout = NO_DROPOUT
        if self.training:
            sites = self.backbone.dropout_sites
            dropout = Dropout.draw(
                self.settings.dropout, "backbone", batch.index, 0, sites, length, rng
            )
        packing = None
        if self.settings.has_two_streams:
            packing = Packing(rows.sequence_R, length - self.num_tokens + rows.step_R)
        visible = self.visible_on(x_BMD.device)
        z_RD = self.backbone(x_BMD, dropout, visible=visible, packing=packing)
        z_RD = z_RD.view(-1, z_RD.shape[-1])  # of one stream nothing was packed
        return self.dropped_vectors(z_RD, batch.index[rows.sequence_R], rows.slot_R, rng)

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
        token_BND = self.backbone.token(tokens_BN[:, self.order_N])
        everything = slice(0, self.num_tokens)
        generation_BND = self.generation(label_B, token_BND, everything)
        if not self.settings.has_two_streams:
            return generation_BND
        context_BMD = self.context(token_BND, slice(0, self.num_tokens - self.groups.sizes[-1]))
        return torch.cat((self.prefix(label_B), context_BMD, generation_BND), dim=1)

    def prefix(self, label_B: Tensor) -> Tensor:
        """The class as the first element of the context: (B, 1, D)."""
        return self.backbone.label(label_B)[:, None].to(self.backbone.dtype)

    def context(self, token_BND: Tensor, part: slice) -> Tensor:
        """Elements of true tokens; part: which of the order."""
        return (token_BND[:, part] + self.place(part)).to(self.backbone.dtype)

    def generation(self, label_B: Tensor, token_BND: Tensor, part: slice) -> Tensor:
        """Elements that are scored: h of earlier tokens, the class in the first group; part: which
        of the order. Tokens of `part` itself and later ones are not used."""
        label_B1D = self.backbone.label(label_B)[:, None]
        is_first_G1 = self.is_first_N[part, None]
        x_BGD = torch.where(is_first_G1, label_B1D, self.injected(token_BND, part))
        place_GD = self.place(part) + self.query
        return (x_BGD + place_GD).to(self.backbone.dtype)

    def injected(self, token_BND: Tensor, part: slice) -> Tensor:
        """h: (B, G, D), of the first group anything finite; (1, 1, 1) for `shared`, where `query`
        is all there is."""
        injection = self.settings.injection
        if injection == "shared":
            return token_BND.new_zeros(1, 1, 1)
        if injection == "average":
            # A product with a matrix that is mostly zeros: cheaper than 8 gathered copies.
            return self.share_NN[part] @ token_BND
        if injection == "nearest":
            return token_BND[:, self.source_N[part]]
        return token_BND.roll(self.groups.sizes[0], dims=1)[:, part]

    def place(self, part: slice) -> Tensor:
        """(G, D): embeddings of position and group."""
        position = self.backbone.position(self.order_N[part])
        return position + self.backbone.time(self.time_N[part])

    # ---------------------------------------------------------------------------------- looking in

    @property
    def null_class(self) -> int | None:
        """See System.null_class."""
        return self.num_classes if self.settings.label_dropout else None

    def look(self, batch: Batch, rng: Rng, seen: int) -> list[Elements]:
        """See System.look. Elements of the context stand where their tokens do, those of the
        generation where they predict; in one stream an element carries the token that it was made
        of."""
        x_BMD = self.embed(batch.labels, batch.tokens)
        self.backbone(x_BMD, visible=self.visible_on(x_BMD.device))
        start_1 = torch.full_like(self.order_N[:1], NOWHERE)
        if self.settings.has_two_streams:
            context_M = self.order_N[: self.num_tokens - self.groups.sizes[-1]]
            place_M = torch.cat((start_1, context_M, self.order_N))
            predicted_M = place_M
        else:
            first = self.groups.sizes[0]
            place_M = torch.cat((start_1.expand(first), self.order_N[:-first]))
            predicted_M = self.order_N
        place_BM = place_M.expand(len(batch), -1)
        predicted_BM = predicted_M.expand(len(batch), -1)
        found = Elements(place_BM, ((predicted_BM, place_BM),))
        return [found] * len(self.backbone.blocks)

    def next_token_losses(self, batch: Batch, rng: Rng) -> Tensor:
        """See System.next_token_losses; tokens of a group do not see each other."""
        rows, z_RD = self.predicted(batch, rng)
        _, loss_R = self.token_losses(z_RD, batch, rows, rng)
        return loss_R.view(-1, self.num_tokens)

    def step_of_tokens(self) -> Tensor:
        """See System.step_of_tokens: a group is a step."""
        return self.time_N.cpu()

    # ------------------------------------------------------------------------------------ counting

    def expected_count(self, batch: int, phase: Phase | None = None) -> float:
        """Every token of every sequence."""
        return float(batch * self.num_tokens)

    def keys_seen(self) -> float:
        """How many elements one sees, on average."""
        elements = self.settings.elements(self.spec)
        if isinstance(self.visible, AttentionMask):
            return float(self.visible.dense_NM.sum()) / elements
        return (elements + 1) / 2

    def flops_per_image(self, phase: Phase | None = None) -> dict[str, float]:
        """See System.flops_per_image."""
        settings = self.settings
        width = settings.width
        tokens = self.num_tokens
        elements = settings.elements(self.spec)
        whole = block_flops(width, elements, self.keys_seen())
        last = block_flops(width, elements, self.keys_seen(), rows=tokens)
        injected = 2 * width * tokens**2 if settings.injection == "average" else 0
        return {
            "embedding": 2 * width * self.spec.channels * tokens + injected,
            "backbone": (settings.depth - 1) * whole + last,
            "token loss": self.token_loss.flops(tokens),
        }

    # ------------------------------------------------------------------------------------ sampling

    @torch.no_grad()
    def sample(
        self,
        classes: Tensor,
        rng: Rng,
        options: SampleOptions | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """One group per step, and one pass of the backbone, with a KV cache. See System.sample."""
        chosen = self.own_options(options, SarOptions)
        self.check_sampling(classes, chosen)
        guidance = self.guidance_of(chosen)
        label_B, index_B = self.place_sampling(classes, index)
        batch = len(label_B)
        has_two_streams = self.settings.has_two_streams
        # With a guided backbone every image is two rows: of its class and of none.
        label_P = label_B
        copies = 1
        if guidance.guides_backbone:
            label_P = torch.cat((label_B, torch.full_like(label_B, self.num_classes)))
            copies = 2
        tokens_BN = self.empty_tokens(batch, label_B.device)
        token_PND = self.backbone.label.weight.new_zeros(
            len(label_P), self.num_tokens, self.settings.width
        )
        length = self.num_tokens + has_two_streams
        cache = KVCache(len(self.backbone.blocks), length, label_B.device)
        for step, part in enumerate(self.groups.parts):
            z_RD = self.vectors_of_group(step, label_P, token_PND, cache)
            z_RD, contrast = guidance.of_head(z_RD)
            position_BG = self.order_N[part].expand(batch, -1)
            index_BG = index_B[:, None].expand_as(position_BG)
            now = chosen.at(part.start / self.num_tokens)
            token_RC, _ = self.token_loss.draw(
                z_RD, rng.at(step), index_BG.flatten(), position_BG.flatten(), now, contrast
            )
            token_BG = token_RC.unflatten(0, position_BG.shape)
            put(tokens_BN, position_BG, token_BG)
            embedded_BGD = self.backbone.token(token_BG)
            token_PND[:, part] = embedded_BGD.repeat(copies, 1, 1)
        return tokens_BN

    def vectors_of_group(
        self, step: int, label_P: Tensor, token_PND: Tensor, cache: KVCache
    ) -> Tensor:
        """The backbone's vectors of the elements of a group: (P * G, D).

        token_PND: embedded tokens, those of all groups before this one. cache: what earlier steps
        left there. Of one stream the elements stay in it. Of two, the context of the
        group before, for the first group the class, goes through the backbone in the same pass and
        stays; elements of the context do not see the generation, which is dropped.
        """
        part = self.groups.parts[step]
        generation_PGD = self.generation(label_P, token_PND, part)
        if not self.settings.has_two_streams:
            visible = cache.all_seen(*generation_PGD.shape[:2])
            z_PGD = self.backbone(generation_PGD, cache=cache, visible=visible)
            cache.advance(z_PGD.shape[1])
            return z_PGD.flatten(0, 1)
        if step == 0:
            context_PMD = self.prefix(label_P)
        else:
            context_PMD = self.context(token_PND, self.groups.parts[step - 1])
        x_PMD = torch.cat((context_PMD, generation_PGD), dim=1)
        sequences, elements, _ = x_PMD.shape
        entering = context_PMD.shape[1]
        of_context = cache.all_seen(sequences, entering).ends_BN
        of_generation = cache.all_seen(sequences, elements - entering, elements).ends_BN
        drawn_M = torch.arange(entering, elements, device=x_PMD.device)
        sequence_R = torch.arange(sequences, device=x_PMD.device).repeat_interleave(len(drawn_M))
        z_RD = self.backbone(
            x_PMD,
            cache=cache,
            visible=Ends(torch.cat((of_context, of_generation), dim=1)),
            packing=Packing(sequence_R, drawn_M.repeat(sequences)),
        )
        cache.advance(entering)
        return z_RD

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
        own_x = settings.guidance_x if has_defaults else 1.0
        own_z = settings.guidance_z if has_defaults else 1.0
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
            # float32 as the head is: a scale multiplies roundings too.
            z_RD, none_RD = z_RD.float().chunk(2)
            if self.cfg != 1:
                return z_RD, Contrast(none_RD, self.cfg)
            z_RD = none_RD + self.z * (z_RD - none_RD)
        if self.x != 1:
            contrast = Contrast(torch.zeros_like(z_RD), self.x)
        return z_RD, contrast
