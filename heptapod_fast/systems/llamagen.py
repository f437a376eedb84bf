"""LlamaGen, and Next Patch Prediction, which trains the same model cheaper.

LlamaGen (Sun et al.) is a LLaMA over the codes of an image in raster order: the class, then
every code, each predicting the next. NPP (Pang et al.) starts with coarse sequences: the
embeddings of a patch of p x p codes are averaged into one element, which predicts the next patch,
one set of logits scored against all of its codes,

    loss = mean over patches i of [logsumexp_i - mean_k logit_i[y_ik]].

p falls from phase to phase and ends at 1, plain next-code prediction, so that a run that has
finished is a LlamaGen run. Positions are those of the patches, not rescaled. Suffixes as in
docs/legend.md; M elements of a sequence, K codes of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from heptapod_fast import ops
from heptapod_fast.config import (
    AttentionUse,
    DataSettings,
    RecipeSettings,
    RunSettings,
    Size,
    SystemSettings,
)
from heptapod_fast.config.settings import Rule, at_least, between, more_than, setting, share
from heptapod_fast.data.tokens import Batch
from heptapod_fast.model import initial
from heptapod_fast.model.dropout import NO_DROPOUT, Dropout, drop_labels
from heptapod_fast.model.layers import Embedding, Linear, Modules, RMSNorm
from heptapod_fast.model.llama import LlamaBlock, block_flops, mlp_width
from heptapod_fast.model.transformer import Stream
from heptapod_fast.ops.dispatch import AUTO, Operators
from heptapod_fast.ops.linear_cross_entropy import MOST_TARGETS
from heptapod_fast.rng import Rng
from heptapod_fast.sampling import KVCache, SampleOptions, sample_codes
from heptapod_fast.sampling.replay import steps_for
from heptapod_fast.systems.base import (
    TINY_DATA,
    TINY_RUN,
    Elements,
    Loss,
    Phase,
    System,
    with_possible_scale,
)
from heptapod_fast.tokenizers import TokenSpec

_ONE_AT_A_TIME = (
    "this system predicts one next token in raster order; a 2D distribution is what allows more"
)


@dataclass(frozen=True, kw_only=True)
class LlamaSettings(SystemSettings):
    """The Transformer and its regularisation."""

    depth: int = setting("Blocks.", rule=between(1, 2**10))
    width: int = setting("Hidden size.", rule=between(1, 2**16))
    heads: int = setting("Attention heads.", rule=between(1, 2**16))
    dropout: float = setting(
        "Of the embedded sequence, and behind attention and MLP of every block.", rule=share()
    )
    label_dropout: float = setting(
        "Share of the samples that are trained without their class, which guidance needs.",
        rule=share(),
    )
    embedding_std: float = setting(
        "Deviation of embeddings at the start: upstream's 0.02, and 1 for tiny.", rule=more_than(0)
    )
    guidance: float = setting(
        "Scale of the guidance that samples are drawn with unless told otherwise.",
        rule=at_least(1),
        may_change=True,
    )

    def resolve(self, defaults: Any, spec: TokenSpec) -> Any:
        """See SystemSettings.resolve."""
        self.check()
        if spec.kind != "discrete":
            raise ValueError(
                f"--tokenizer {spec.name}: this system predicts codes, take a discrete tokenizer "
                "(vq16, patch-vq)"
            )
        settings = with_possible_scale(self.filled(defaults), self, "guidance", "label_dropout")
        if settings.width % (4 * settings.heads):
            raise ValueError(
                f"--width {settings.width} with --heads {settings.heads}: the width of a head has "
                "to be a multiple of 4, for positions turn by row and by column"
            )
        side = math.isqrt(spec.num_tokens)
        if side**2 != spec.num_tokens:
            raise ValueError(f"{spec.num_tokens} tokens are no square grid")
        return settings

    @property
    def head_width(self) -> int:
        """Width of an attention head."""
        return self.width // self.heads

    def attention_uses(self, spec: TokenSpec) -> list[AttentionUse]:
        """See SystemSettings.attention_uses."""
        return [AttentionUse(self.head_width, spec.num_tokens, ops.CAUSAL)]

    def derived(self, spec: TokenSpec) -> Iterator[tuple[str, str]]:
        """See SystemSettings.derived."""
        yield "head dim", f"{self.head_width} = {self.width} / {self.heads}"
        yield "MLP width", f"{mlp_width(self.width)} = 2/3 x 4 x {self.width}, up to 256s"


@dataclass(frozen=True, kw_only=True)
class NppSettings(LlamaSettings):
    """The Transformer, its regularisation, and the patches that it begins with."""

    levels: int | None = setting(
        "Sizes of patches that are trained on, each half of the one before: 2 is 2 x 2, then 1.",
        rule=between(1, 8),
    )
    segment_factor: float | None = setting(
        "Level l (patches 2^l x 2^l) is trained on until this to the power of l of the images.",
        rule=Rule("between 0 and 1, neither of them", lambda value: 0 < value < 1),
    )
    patches: tuple[int, ...] | None = setting(
        "Sides of the patches, one phase each, instead of --levels: 4 1.",
        rule=Rule("numbers of 1 or more", lambda values: all(v >= 1 for v in values)),
    )
    shares: tuple[float, ...] | None = setting(
        "Shares of the images of the phases of --patches, which add up to 1: 0.5 0.5.",
        rule=Rule("numbers above 0", lambda values: all(v > 0 for v in values)),
    )

    def resolve(self, defaults: Any, spec: TokenSpec) -> Any:
        """See SystemSettings.resolve."""
        if self.patches is not None:
            self.refuse(("levels", "segment_factor"), "and --patches: give one of them")
            defaults = defaults.without("levels", "segment_factor")
        settings = super().resolve(defaults, spec)
        if settings.patches is None:
            settings.refuse(("shares",), "needs --patches")
        elif settings.shares is None:
            raise ValueError("--patches needs --shares, the share of the images of each")
        settings._check_phases(math.isqrt(spec.num_tokens))
        return settings

    def segments(self) -> list[tuple[int, float]]:
        """(side of the patches, share of the images at which they end), phase after phase."""
        if self.patches is not None and self.shares is not None:
            ends = [sum(self.shares[: k + 1]) for k in range(len(self.shares) - 1)]
            sides = self.patches
        else:
            assert self.levels is not None and self.segment_factor is not None  # resolved
            levels = range(self.levels - 1, -1, -1)
            ends = [self.segment_factor**level for level in levels if level > 0]
            sides = tuple(2**level for level in levels)
        return list(zip(sides, [*ends, 1.0], strict=True))

    def bounds(self, total: int) -> list[tuple[int, int, int]]:
        """(side of the patches, first image, image behind the last) of a run of `total` images."""
        found = []
        first = 0
        for patch, share_of_all in self.segments():
            # 0.7 + 0.1 and 100 * 0.29 are a little less than 0.8 and 29 in binary.
            end = math.floor(total * share_of_all * (1 + 1e-12))
            found.append((patch, first, end))
            first = end
        return found

    def check_images(self, total: int, batch: int) -> None:
        """See SystemSettings.check_images."""
        for patch, first, end in self.bounds(total):
            first_step = -(-first // batch) * batch
            if first_step >= end:
                raise ValueError(
                    f"--images {total} leave no step of {batch} to patches of {patch} x {patch}, "
                    f"which have images {first} to {end}: fewer --levels, other --shares, a "
                    "smaller --batch, or more images"
                )

    def _check_phases(self, side: int) -> None:
        """ValueError unless all patches divide the grid and fall to 1."""
        if self.patches is not None and self.shares is not None:
            if len(self.patches) != len(self.shares) or not self.patches:
                raise ValueError(
                    f"--patches {len(self.patches)} sides, --shares {len(self.shares)} numbers: "
                    "one share for each"
                )
            if abs(sum(self.shares) - 1) > 1e-6:
                raise ValueError(
                    f"--shares {' '.join(map(str, self.shares))}: expected numbers that add up to "
                    f"1, these make {sum(self.shares):g}"
                )
        sides = [patch for patch, _ in self.segments()]
        listed = " ".join(map(str, sides))
        if sides[-1] != 1:
            raise ValueError(f"--patches {listed}: the last phase has patches of 1, single codes")
        if any(later >= earlier for earlier, later in pairwise(sides)):
            raise ValueError(f"--patches {listed}: expected sides that fall from phase to phase")
        if sides[0] ** 2 > MOST_TARGETS:
            raise ValueError(
                f"patches of {sides[0]} x {sides[0]} ({listed}): at most {MOST_TARGETS} codes are "
                "scored together"
            )
        for patch in sides:
            if side % patch or patch >= side > 1:
                raise ValueError(
                    f"patches of {patch} x {patch} ({listed}): expected sides that divide the grid "
                    f"of {side} x {side} tokens into several"
                )

    def derived(self, spec: TokenSpec) -> Iterator[tuple[str, str]]:
        """See SystemSettings.derived."""
        yield from super().derived(spec)
        before = 0.0
        elements = 0.0
        for patch, end in self.segments():
            elements += (end - before) * spec.num_tokens / patch**2
            before = end
        yield "elements a step", f"{elements:g} of {spec.num_tokens} on average over the phases"


@dataclass(frozen=True, kw_only=True)
class LlamaOptions(SampleOptions):
    """How tokens are drawn."""

    guidance: float | None = setting(
        "Scale s of classifier-free guidance: logits are u + s (c - u), of the null class and the "
        "class; 1 is none. Default: the run's.",
        rule=at_least(1),
    )
    guidance_schedule: Literal["constant", "linear"] = setting(
        "s for every token, or rising from 1 to s over the tokens of an image.",
        default="constant",
    )


# llamagen:autoregressive/train/train_c2i.py:35-50, 166-203: 300 epochs, batch 256, AdamW 0.9/0.95,
# weight decay 0.05, constant rate, clip 1, no average.
PAPER_IMAGES = 300 * 1_281_167
PAPER_DATA = DataSettings(tokenizer="vq16", image_size=256, flip=True)
PAPER_RECIPE = RecipeSettings(
    images=PAPER_IMAGES,
    batch=256,
    lr_per_256=1e-4,
    lr_schedule="constant",
    warmup=0.0,
    weight_decay=0.05,
    beta1=0.9,
    beta2=0.95,
    clip=1.0,
    ema=(),
)
# npp: train_c2i.py:60-101: in every phase one epoch of warm-up, and down to 1e-5 at its end.
NPP_RECIPE = replace(PAPER_RECIPE, lr_schedule="trapezoid", warmup_images=1_281_167)
PAPER_RUN = RunSettings(sample_every=5_000_000, checkpoint_every=1_281_167, log_every=25_600)
TINY_RECIPE = replace(
    PAPER_RECIPE,
    images=150_000,
    batch=64,
    lr_per_256=8e-3,
    lr_schedule="trapezoid",
    warmup=0.02,
    ema=(0.9999,),
)


@dataclass(frozen=True)
class _Network:
    """A row of LlamaGen's table. guidance: of its samples (NPP's section 4, LlamaGen's README)."""

    depth: int
    width: int
    heads: int
    micro_batch: int
    guidance: float
    npp_guidance: float


_TINY = _Network(depth=6, width=128, heads=4, micro_batch=256, guidance=1.0, npp_guidance=1.0)
_NETWORKS = {
    "B": _Network(12, 768, 12, micro_batch=128, guidance=2.0, npp_guidance=2.0),
    "L": _Network(24, 1024, 16, micro_batch=64, guidance=2.0, npp_guidance=1.75),
    "XL": _Network(36, 1280, 20, micro_batch=32, guidance=1.75, npp_guidance=1.7),
    "XXL": _Network(48, 1536, 24, micro_batch=16, guidance=1.75, npp_guidance=1.65),
}


def _sizes(kind: type[LlamaSettings], recipe: RecipeSettings, **more: Any) -> dict[str, Size]:
    """tiny with a recipe of its own, then the sizes of the paper with the paper's."""

    def model(network: _Network, dropout: float, std: float) -> LlamaSettings:
        is_npp = issubclass(kind, NppSettings)
        return kind(
            depth=network.depth,
            width=network.width,
            heads=network.heads,
            dropout=dropout,
            label_dropout=0.1,
            embedding_std=std,
            guidance=network.npp_guidance if is_npp else network.guidance,
            **more,
        )

    found = {"tiny": Size(model(_TINY, 0.0, 1.0), TINY_DATA, TINY_RECIPE, TINY_RUN, 256)}
    for name, network in _NETWORKS.items():
        settings = model(network, 0.1, initial.STD)
        found[name] = Size(settings, PAPER_DATA, recipe, PAPER_RUN, network.micro_batch)
    return found


LlamaSettings.SIZES = _sizes(LlamaSettings, PAPER_RECIPE)
NppSettings.SIZES = _sizes(NppSettings, NPP_RECIPE, levels=2, segment_factor=0.5)


@dataclass
class Canvas:
    """Images that are being drawn.

    Attributes:
        index_B: keys of their draws.
        tokens_BN: codes that are there.
        x_R1D: what enters the network next.
        scale_1: (1,) float32, the scale of the guidance.
        cache: keys and values.
        copies: rows of each image: of its class, and with guidance of none.
    """

    index_B: Tensor
    tokens_BN: Tensor
    x_R1D: Tensor
    scale_1: Tensor
    cache: KVCache
    copies: int


class ClassEmbedding(nn.Module):
    """A row for every class, and one behind them for none."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = Embedding(num_classes + 1, width)


class LlamaGen(System):
    """The next code of an image, in raster order."""

    Settings = LlamaSettings
    Options = LlamaOptions
    REFUSED_OPTIONS = {
        "positions_per_step": _ONE_AT_A_TIME,
        "position_schedule": _ONE_AT_A_TIME,
        "position_order": _ONE_AT_A_TIME,
    }
    settings: LlamaSettings
    # Tables of positions and the missing bias: computed, not saved.
    no_bias: Tensor

    def __init__(
        self,
        settings: LlamaSettings,
        spec: TokenSpec,
        num_classes: int,
        operators: Operators = AUTO,
    ):
        super().__init__(settings, spec, num_classes, operators)
        width = settings.width
        self.side = math.isqrt(spec.num_tokens)
        self.dtype = torch.float32
        self.cls_embedding = ClassEmbedding(num_classes, width)
        self.tok_embeddings = Embedding(spec.vocabulary, width)
        self.layers = Modules[LlamaBlock](
            LlamaBlock(width, settings.heads, operators) for _ in range(settings.depth)
        )
        self.norm = RMSNorm(width, operators=operators)
        self.output = Linear(width, spec.vocabulary, init="zero", bias=False)
        for patch in self.patch_sides():
            table = ops.grid_table(self.side // patch, settings.head_width)
            self.register_buffer(f"table_{patch}", table, persistent=False)
        self.register_buffer("no_bias", torch.zeros(spec.vocabulary), persistent=False)

    def patch_sides(self) -> tuple[int, ...]:
        """Sides of all patches that training meets."""
        return (1,)

    # ------------------------------------------------------------------------------------ training

    def forward(self, batch: Batch, rng: Rng, phase: Phase | None = None) -> Loss:
        """Sum over the elements of all sequences; see System.forward. `phase.level` is the side of
        the patches."""
        patch = self.patch_of(phase)
        elements = self.num_tokens // patch**2
        label_B = batch.labels
        dropout = NO_DROPOUT
        if self.training:
            rate = self.settings.label_dropout
            label_B = drop_labels(label_B, batch.index, rate, self.num_classes, rng)
            dropout = Dropout.draw(
                self.settings.dropout, "llama", batch.index, 0, self.sites, elements, rng
            )
        y_BMD = self.vectors(label_B, batch.tokens, patch, dropout)
        targets = self.targets(batch.tokens, patch)
        total, _ = ops.linear_cross_entropy(
            y_BMD.flatten(0, 1),
            self.output.weight,
            self.no_bias,
            targets,
            implementation=self.operators["linear_cross_entropy"],
        )
        return Loss(total, float(len(batch) * elements))

    @staticmethod
    def patch_of(phase: Phase | None) -> int:
        """Side of the patches of a phase; None is the last one, of single codes."""
        return 1 if phase is None else max(1, phase.level)

    def vectors(
        self, label_B: Tensor, tokens_BN: Tensor, patch: int = 1, dropout: Dropout = NO_DROPOUT
    ) -> Tensor:
        """What the output layer makes logits of: (B, M, D), element i predicts patch i."""
        x_BMD = self.embed(label_B, tokens_BN, patch)
        table = self.table(patch)[: x_BMD.shape[1]]
        (of_tokens,) = dropout.sites(0, 1)
        stream = Stream(ops.dropout(x_BMD, of_tokens, self.operators["dropout"]))
        for number, block in enumerate(self.layers):
            masks = dropout.sites(1 + LlamaBlock.SITES * number, LlamaBlock.SITES)
            stream = block(stream, table, masks)
        return stream.normed(self.norm)[1]

    def logits(self, label_B: Tensor, tokens_BN: Tensor, patch: int = 1) -> Tensor:
        """Of a teacher-forced pass without dropout: (B, M, V) float32. Training never makes all of
        them at once."""
        return self.output(self.vectors(label_B, tokens_BN, patch)).float()

    def embed(self, label_B: Tensor, tokens_BN: Tensor, patch: int) -> Tensor:
        """The class, then all patches but the last, each the mean of its codes' embeddings:
        (B, M, D) in the dtype of the activations."""
        start_B1D = self.cls_embedding.embedding_table(label_B)[:, None]
        if patch == 1:
            x_BMD = self.tok_embeddings(tokens_BN[:, :-1])
        else:
            codes_BMK = self.in_patches(tokens_BN, patch)[:, :-1]
            x_BMD = self.tok_embeddings(codes_BMK).mean(2)
        return torch.cat((start_B1D, x_BMD), dim=1).to(self.dtype)

    def in_patches(self, tokens_BN: Tensor, patch: int) -> Tensor:
        """(B, N) codes -> (B, N / p^2, p^2): patches in raster order, row by row inside."""
        count = self.side // patch
        grid = tokens_BN.unflatten(1, (count, patch, count, patch))
        return grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def targets(self, tokens_BN: Tensor, patch: int) -> Tensor:
        """What every element predicts: (R,) codes, or (R, p^2)."""
        if patch == 1:
            return tokens_BN.flatten()
        return self.in_patches(tokens_BN, patch).flatten(0, 1)

    def table(self, patch: int) -> Tensor:
        """cos and sin of every position of the class slot and the patches."""
        return getattr(self, f"table_{patch}")

    @property
    def null_class(self) -> int | None:
        """See System.null_class."""
        return self.num_classes if self.settings.label_dropout else None

    def look(self, batch: Batch, rng: Rng, seen: int) -> list[Elements]:
        """See System.look: an element carries the token before the one that it predicts."""
        self.vectors(batch.labels, batch.tokens)
        predicted_N = torch.arange(self.num_tokens, device=batch.tokens.device)
        predicted_BN = predicted_N.expand(len(batch), -1)
        carried_BN = predicted_BN - 1  # of the class, in front, NOWHERE
        return [Elements(carried_BN, ((predicted_BN, carried_BN),))] * len(self.layers)

    def next_token_losses(self, batch: Batch, rng: Rng) -> Tensor:
        """See System.next_token_losses."""
        y_BND = self.vectors(batch.labels, batch.tokens)
        _, loss_R = ops.linear_cross_entropy(
            y_BND.flatten(0, 1),
            self.output.weight,
            self.no_bias,
            batch.tokens.flatten(),
            implementation=self.operators["linear_cross_entropy"],
        )
        return loss_R.view(-1, self.num_tokens)

    @property
    def sites(self) -> int:
        """Sites of dropout in a forward pass."""
        return 1 + LlamaBlock.SITES * len(self.layers)

    def expected_count(self, batch: int, phase: Phase | None = None) -> float:
        """Every element of every sequence."""
        return float(batch * self.num_tokens // self.patch_of(phase) ** 2)

    def set_dtype(self, dtype: torch.dtype) -> None:
        """See System.set_dtype."""
        self.dtype = dtype

    # ---------------------------------------------------------------------------------- parameters

    def initial_value(
        self, module: nn.Module, leaf: str, parameter: Tensor, name: str, rng: Rng
    ) -> Tensor | None:
        """Linear layers and embeddings N(0, 0.02), norms 1, the output 0 (gpt.py:296-314)."""
        if isinstance(module, RMSNorm):
            return torch.ones_like(parameter)
        return initial.of_mar(
            module,
            leaf,
            parameter,
            name,
            rng,
            embedding_std=self.settings.embedding_std,
            learned_tokens=frozenset(),
        )

    def decays(self, name: str, parameter: Tensor) -> bool:
        """Everything with two dimensions or more, embeddings too (train_c2i.py:35-50)."""
        return parameter.dim() >= 2

    def class_table(self) -> str:
        """See System.class_table."""
        return "cls_embedding.embedding_table.weight"

    def units(self) -> list[nn.Module]:
        """See System.units."""
        return list(self.layers)

    # ------------------------------------------------------------------------------------ counting

    def flops_per_image(self, phase: Phase | None = None) -> dict[str, float]:
        """See System.flops_per_image."""
        elements = self.expected_count(1, phase)
        width = self.settings.width
        return {
            "blocks": self.settings.depth * block_flops(width, elements, (elements + 1) / 2),
            "output": 2 * elements * width * self.spec.vocabulary,
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
        """One code per step with a KV cache; guided, every image is two rows, of its class and of
        none. See System.sample."""
        chosen = self.own_options(options, LlamaOptions)
        self.check_sampling(classes, chosen)
        scale = self._scale(chosen)
        label_B, index_B = self.place_sampling(classes, index)
        tokens_BN = label_B.new_zeros(len(label_B), self.num_tokens)
        label_R = label_B
        copies = 1
        if scale > 1:
            label_R = torch.cat((label_B, torch.full_like(label_B, self.num_classes)))
            copies = 2
        device = label_B.device
        canvas = Canvas(
            index_B=index_B,
            tokens_BN=tokens_BN,
            x_R1D=self.cls_embedding.embedding_table(label_R)[:, None].to(self.dtype),
            scale_1=torch.ones(1, device=device),
            cache=KVCache(len(self.layers), self.num_tokens, device),
            copies=copies,
        )
        steps = steps_for(chosen, rng, self.num_tokens, device)
        for step in range(self.num_tokens):
            canvas.cache.place(step)
            canvas.scale_1.fill_(self._scale_at(step, scale, chosen))
            steps.run(step, "code", partial(self.draw_code, canvas, chosen))
        return tokens_BN

    def draw_code(self, canvas: Canvas, options: LlamaOptions, rng: Rng) -> None:
        """One step: the newest element enters, a code is drawn and becomes one."""
        step_1 = canvas.cache.slots(1)
        logits_RV = self._next_logits(canvas.x_R1D, canvas.cache)
        logits_BV = logits_RV
        if canvas.copies == 2:
            of_class, of_none = logits_RV.chunk(2)
            logits_BV = of_none + canvas.scale_1 * (of_class - of_none)
        slot_B = step_1.expand_as(canvas.index_B)
        uniform_B = rng.uniform("sample.token", canvas.index_B, 1, slot_B)[:, 0]
        code_B, _ = sample_codes(logits_BV, uniform_B, options)
        canvas.tokens_BN.index_copy_(1, step_1, code_B[:, None])
        code_R = code_B.repeat(canvas.copies)
        canvas.x_R1D.copy_(self.tok_embeddings(code_R)[:, None])

    def _scale(self, options: LlamaOptions) -> float:
        """Of the guidance; ValueError where the run has nothing to guide against."""
        if options.guidance is None:
            return self.settings.guidance
        if self.settings.label_dropout == 0 and options.guidance != 1:
            raise ValueError(
                f"--guidance {options.guidance:g}: this run was trained with --label-dropout 0, it "
                "never saw the null class that guidance needs"
            )
        return options.guidance

    def settled(self, options: SampleOptions) -> SampleOptions:
        """See System.settled."""
        chosen = self.own_options(options, LlamaOptions)
        return replace(chosen, guidance=self._scale(chosen))

    def _next_logits(self, x_R1D: Tensor, cache: KVCache) -> Tensor:
        """(R, V) float32 of the code behind the newest element."""
        table = self.table(1).index_select(0, cache.slots(1))
        visible = cache.causal(len(x_R1D), 1)
        stream = Stream(x_R1D)
        for number, block in enumerate(self.layers):
            stream = block(stream, table, cache=cache.layer(number), visible=visible)
        _, y_R1D = stream.normed(self.norm)
        return self.output(y_R1D[:, 0]).float()

    def _scale_at(self, step: int, scale: float, options: LlamaOptions) -> float:
        """s of u + s (c - u) at a step."""
        if options.guidance_schedule == "linear":
            return 1 + (scale - 1) * step / max(1, self.num_tokens - 1)
        return scale


class NextPatch(LlamaGen):
    """NPP: LlamaGen that begins with patches."""

    Settings = NppSettings
    settings: NppSettings

    def patch_sides(self) -> tuple[int, ...]:
        """See LlamaGen.patch_sides."""
        return tuple(dict.fromkeys([*(patch for patch, _ in self.settings.segments()), 1]))

    def phase(self, images: int, total: int) -> Phase:
        """The segment that a step begins in. Host arithmetic."""
        for patch, first, end in self.settings.bounds(total):
            if images < end:
                return Phase(first, end, f"patch {patch}", patch)
        raise ValueError(f"image {images} lies behind the end of training, {total}")
