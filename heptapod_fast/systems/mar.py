"""What Heptapod, the 1D baselines and SAR share: MAR's Transformer, its settings and its recipe."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from heptapod_fast.config import (
    DataSettings,
    RecipeSettings,
    RunSettings,
    Size,
    SystemSettings,
)
from heptapod_fast.config.settings import between, more_than, setting, share
from heptapod_fast.data.tokens import Batch
from heptapod_fast.grid import Rows, given_first, take_tokens
from heptapod_fast.model import initial
from heptapod_fast.model.token_losses import (
    Categorical,
    Denoising,
    Diffusion,
    Flow,
    TokenLoss,
)
from heptapod_fast.model.transformer import Backbone
from heptapod_fast.ops.dispatch import AUTO, Operators
from heptapod_fast.rng import Rng
from heptapod_fast.sampling import Given, SampleOptions
from heptapod_fast.systems.base import TINY_DATA, TINY_RUN, Loss, Phase, System
from heptapod_fast.tokenizers import TokenSpec

DIFFUSION_REPEAT = 4  # MAR's diffusion_batch_mul
DIFFUSION_SETTINGS = (
    "diffusion_blocks",
    "diffusion_width",
    "diffusion_repeat",
    "diffusion_loss",
    "token_loss",
)


@dataclass(frozen=True, kw_only=True)
class MarSettings(SystemSettings):
    """The Transformer and the diffusion MLP."""

    depth: int = setting(
        "Blocks of the backbone; default: the size's, and for the 1D baselines those of "
        "Heptapod's head too.",
        rule=between(1, 2**10),
    )
    width: int = setting("Hidden size.", rule=between(1, 2**16))
    heads: int = setting("Attention heads.", rule=between(1, 2**16))
    diffusion_blocks: int | None = setting(
        "Residual blocks of the diffusion MLP (continuous tokens).", rule=between(1, 2**10)
    )
    diffusion_width: int | None = setting("Width of the diffusion MLP.", rule=between(1, 2**16))
    diffusion_repeat: int | None = setting(
        "Fresh timesteps and noises per supervised token (MAR's diffusion_batch_mul).",
        rule=between(1, 2**10),
    )
    token_loss: Literal["ddpm", "flow"] | None = setting(
        "How continuous tokens are denoised: MAR's diffusion (ddpm, the default but for sar), or "
        "flow matching.",
        before=None,
    )
    diffusion_loss: Literal["mse+vb", "mse"] | None = setting(
        "MAR's MSE plus variational bound of the learned variance, or the plain MSE."
    )
    dropout: float = setting(
        "After the attention projection and both layers of the MLP.", rule=share()
    )
    embedding_std: float = setting(
        "Deviation of embeddings and learned tokens at the start: MAR's 0.02, and 1 for tiny, "
        "where it halves the images that are needed.",
        rule=more_than(0),
    )

    def resolve(self, defaults: Self, spec: TokenSpec) -> Self:
        """See SystemSettings.resolve; `depth` is left to systems that share it with a head."""
        self.check()
        continuous = spec.kind == "continuous"
        if not continuous:
            self.refuse(DIFFUSION_SETTINGS, f"needs continuous tokens; {spec.name} is discrete")
            defaults = defaults.without(*DIFFUSION_SETTINGS)
        settings = self
        if self.token_loss == "ddpm" and defaults.token_loss is None:
            settings = self.without("token_loss")  # it is what None means there
        elif (self.token_loss or defaults.token_loss) == "flow":
            self.refuse(("diffusion_loss",), "needs --token-loss ddpm")
            defaults = defaults.without("diffusion_loss")
        settings = settings.filled(defaults)
        if settings.width % settings.heads:
            raise ValueError(
                f"--width {settings.width} is not a multiple of --heads {settings.heads}"
            )
        return settings

    @property
    def head_width(self) -> int:
        """Width of an attention head."""
        return self.width // self.heads


# Heptapod section 5.1 and MAR's defaults (main_mar.py): 800 epochs of 1,281,167 images, batch 2048,
# AdamW 0.9/0.95, weight decay 0.02, constant rate after a warm-up of 12.5%, clip 3, EMA 0.9999.
PAPER_DATA = DataSettings(tokenizer="kl16", image_size=256, flip=True)
PAPER_RECIPE = RecipeSettings(
    images=1_024_933_600,
    batch=2048,
    lr_per_256=1e-4,
    lr_schedule="constant",
    warmup=0.125,
    weight_decay=0.02,
    beta1=0.9,
    beta2=0.95,
    clip=3.0,
    ema=(0.9999,),
)
PAPER_RUN = RunSettings(sample_every=10_000_000, checkpoint_every=1_281_167, log_every=102_400)
TINY_RECIPE = replace(
    PAPER_RECIPE, images=150_000, batch=64, lr_per_256=8e-3, lr_schedule="cosine", warmup=0.02
)


@dataclass(frozen=True)
class NetworkSize:
    """What makes a size, for Heptapod a row of the paper's Table 3. depth: of the backbone;
    Heptapod's head has the same."""

    depth: int
    width: int
    heads: int
    diffusion_blocks: int
    diffusion_width: int
    micro_batch: int
    dropout: float = 0.1
    embedding_std: float = 0.02


TINY = NetworkSize(
    depth=3,
    width=128,
    heads=4,
    diffusion_blocks=3,
    diffusion_width=128,
    micro_batch=256,
    dropout=0.0,
    embedding_std=1.0,
)
TABLE_3 = {
    "B": NetworkSize(
        depth=12, width=768, heads=12, diffusion_blocks=6, diffusion_width=1024, micro_batch=128
    ),
    "L": NetworkSize(
        depth=16, width=1024, heads=16, diffusion_blocks=8, diffusion_width=1280, micro_batch=128
    ),
    "H": NetworkSize(
        depth=20, width=1280, heads=16, diffusion_blocks=12, diffusion_width=1536, micro_batch=64
    ),
}


AnySettings = TypeVar("AnySettings", bound=MarSettings)


def sizes(
    settings_of: Callable[[str, NetworkSize], AnySettings],
    networks: Mapping[str, NetworkSize] = MappingProxyType({"tiny": TINY, **TABLE_3}),
    tiny_data: DataSettings = TINY_DATA,
) -> dict[str, Size]:
    """tiny with a recipe of its own, the other sizes with the paper's.

    settings_of: what a system adds to a size, given its name and its network: its depths, and
        settings of its own.
    """

    def with_network(name: str, network: NetworkSize) -> AnySettings:
        return replace(
            settings_of(name, network),
            width=network.width,
            heads=network.heads,
            diffusion_blocks=network.diffusion_blocks,
            diffusion_width=network.diffusion_width,
            diffusion_repeat=DIFFUSION_REPEAT,
            diffusion_loss="mse+vb",
            dropout=network.dropout,
            embedding_std=network.embedding_std,
        )

    found = {}
    for name, network in networks.items():
        rest = (PAPER_DATA, PAPER_RECIPE, PAPER_RUN)
        if name == "tiny":
            rest = (tiny_data, TINY_RECIPE, TINY_RUN)
        found[name] = Size(with_network(name, network), *rest, network.micro_batch)
    return found


class MarSystem(System):
    """A causal backbone and a token loss; what stands between them is the system's."""

    settings: MarSettings
    # Rows of the table of classes behind those of the classes: 1 where there is a null class.
    null_classes = 0

    def __init__(
        self,
        settings: MarSettings,
        spec: TokenSpec,
        num_classes: int,
        operators: Operators = AUTO,
    ):
        super().__init__(settings, spec, num_classes, operators)
        self.backbone = Backbone(
            depth=settings.depth,
            width=settings.width,
            heads=settings.heads,
            num_classes=num_classes + self.null_classes,
            num_tokens=spec.num_tokens,
            channels=spec.channels,
            vocabulary=spec.vocabulary,
            times=self.times(),
            operators=operators,
        )
        self.token_loss = token_loss_of(settings, spec, operators)

    def times(self) -> int:
        """Rows of the table of times."""
        return self.num_tokens

    def check_sampling(self, classes: Tensor, options: SampleOptions) -> None:
        """See System.check_sampling."""
        super().check_sampling(classes, options)
        self.token_loss.check_options(options)

    def set_dtype(self, dtype: torch.dtype) -> None:
        """See System.set_dtype."""
        self.backbone.dtype = dtype

    def class_table(self) -> str:
        """See System.class_table."""
        return "backbone.label.weight"

    @abstractmethod
    def predicted(self, batch: Batch, rng: Rng) -> tuple[Rows, Tensor]:
        """The supervised positions of a micro-batch, and what the token loss is given for each:
        (R, D)."""

    def forward(self, batch: Batch, rng: Rng, phase: Phase | None = None) -> Loss:
        """Sum of the token loss over the supervised positions; see System.forward."""
        rows, z_RD = self.predicted(batch, rng)
        total, _ = self.token_losses(z_RD, batch, rows, rng)
        return Loss(total, rows.total_weight())

    def token_losses(
        self, z_RD: Tensor, batch: Batch, rows: Rows, rng: Rng
    ) -> tuple[Tensor, Tensor]:
        """Vectors against the tokens at the rows' positions: the weighted sum, and (R,) losses."""
        index_R = batch.index[rows.sequence_R]
        target = self.targets(batch, rows)
        return self.token_loss.loss(z_RD, target, rng, index_R, rows.slot_R, rows.weight_R)

    def targets(self, batch: Batch, rows: Rows) -> Tensor:
        """The tokens at the rows' positions: (R,) codes, or (R, C)."""
        token_R = rows.sequence_R * self.num_tokens + rows.position_R
        return batch.tokens.flatten(0, 1)[token_R]

    def losses_by_noise(self, batch: Batch, rng: Rng, shares: list[float]) -> Tensor:
        """See System.losses_by_noise; of the positions that training would supervise."""
        rows, z_RD = self.predicted(batch, rng)
        target_RC = self.targets(batch, rows)
        index_R = batch.index[rows.sequence_R]
        weight_R = target_RC.new_ones(len(target_RC)) if rows.weight_R is None else rows.weight_R
        means = []
        for noise in shares:
            loss_R = self.token_loss.loss_at(z_RD, target_RC, rng, index_R, rows.slot_R, noise)
            means.append((loss_R * weight_R).sum() / weight_R.sum())
        return torch.stack(means)

    def decays(self, name: str, parameter: Tensor) -> bool:
        """MAR's decay group (mar:util/misc.py:291-303): all but vectors, biases and the diffusion
        MLP. Embeddings, position tables and the mask token are decayed, as upstream."""
        if parameter.dim() < 2 or name.endswith(".bias"):
            return False
        is_diffusion = isinstance(self.token_loss, Denoising) and name.startswith("token_loss.")
        return not is_diffusion

    def initial_value(
        self, module: nn.Module, leaf: str, parameter: Tensor, name: str, rng: Rng
    ) -> Tensor | None:
        """MAR's start; see `model.initial.of_mar`."""
        return initial.of_mar(
            module,
            leaf,
            parameter,
            name,
            rng,
            embedding_std=self.settings.embedding_std,
            learned_tokens=frozenset({"mask_token", "query"}),
        )

    def empty_tokens(self, batch: int, device: torch.device) -> Tensor:
        """A buffer for generated tokens, in raster order."""
        if self.spec.kind == "continuous":
            return torch.zeros(batch, self.num_tokens, self.spec.channels, device=device)
        return torch.zeros(batch, self.num_tokens, dtype=torch.int64, device=device)


class Completing(MarSystem):
    """One that draws tokens one after the other, in an order in which given ones may come first."""

    @abstractmethod
    def draw(
        self,
        classes: Tensor,
        rng: Rng,
        options: SampleOptions | None,
        index: Tensor | None,
        given: Given | None,
    ) -> Tensor:
        """`sample`, or with given tokens `complete`: every token that is not given, behind those
        that are. Without gradients."""

    @torch.no_grad()
    def sample(
        self,
        classes: Tensor,
        rng: Rng,
        options: SampleOptions | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """See System.sample."""
        return self.draw(classes, rng, options, index, None)

    @torch.no_grad()
    def complete(
        self,
        given: Given,
        classes: Tensor,
        rng: Rng,
        options: SampleOptions | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """See System.complete."""
        self.check_given(given, len(classes))
        return self.draw(classes, rng, options, index, given)

    def check_given(self, given: Given, batch: int) -> None:
        """See System.check_given: any tokens may come first."""
        given.check(self.spec, batch)


def put_given(given: Given, order_BN: Tensor, tokens_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Put K given tokens into tokens (B, N[, C]), in place.

    Returns:
        The orders (B, N) with the given positions first, and the given tokens (B, K[, C]) in them.
    """
    order_BN = given_first(order_BN, given.known_N.to(order_BN.device))
    position_BK = order_BN[:, : given.num_known]
    token_BK = take_tokens(given.tokens_BN.to(order_BN.device), position_BK)
    put(tokens_BN, position_BK, token_BK)
    return order_BN, token_BK


def token_loss_of(settings: MarSettings, spec: TokenSpec, operators: Operators) -> TokenLoss:
    """Diffusion or flow matching for continuous tokens, a categorical distribution for discrete
    ones."""
    if spec.kind == "discrete":
        return Categorical(settings.width, spec.vocabulary, operators)
    # Not None where tokens are continuous: `MarSettings.resolve` has filled them in.
    network: dict[str, Any] = dict(
        blocks=settings.diffusion_blocks,
        mlp_width=settings.diffusion_width,
        repeat=settings.diffusion_repeat,
        limit=spec.limit,
        operators=operators,
    )
    if settings.token_loss == "flow":
        return Flow(settings.width, spec.channels, **network)
    has_bound = settings.diffusion_loss == "mse+vb"
    return Diffusion(settings.width, spec.channels, bound=has_bound, **network)


def put(tokens_BN: Tensor, position_Bk: Tensor, token_Bk: Tensor) -> None:
    """tokens[b, position[b, i]] = token[b, i], in place."""
    sequence_B1 = torch.arange(len(tokens_BN), device=tokens_BN.device)[:, None]
    tokens_BN[sequence_B1, position_Bk] = token_Bk.to(tokens_BN.dtype)
