"""What every system of the papers is: a module that answers `loss` and `sample`.

The loop knows nothing else of it. A system reads no files, no environment and no clock.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from heptapod_fast.config import Config
from heptapod_fast.data.tokens import Batch
from heptapod_fast.model.token_losses import Categorical, Diffusion
from heptapod_fast.model.transformer import NO_DROP, Backbone, Drop
from heptapod_fast.rng import Rng
from heptapod_fast.sampling import SampleOptions, sample_codes, sample_vectors
from heptapod_fast.tokenizers.base import TokenSpec


class Loss(NamedTuple):
    """Sum over supervised positions and their number (weights included), of one micro-batch.

    The gradient of a step is that of sum(total) / sum(count) over the whole global batch, so that
    neither ranks nor micro-batches change it.
    """

    total: Tensor
    count: Tensor | float
    metrics: dict[str, Tensor]

    @property
    def mean(self) -> Tensor:
        """The loss of this micro-batch alone."""
        return self.total / self.count


class System(nn.Module):
    """Base class; `systems.build_system` makes one and fills its parameters."""

    def __init__(self, config: Config, spec: TokenSpec, num_classes: int, attention: str):
        super().__init__()
        self.config, self.spec, self.num_classes = config, spec, num_classes
        self.num_tokens = spec.num_tokens
        self.backbone = Backbone(
            depth=config.depth,
            width=config.width,
            heads=config.heads,
            num_classes=num_classes,
            num_tokens=spec.num_tokens,
            channels=spec.channels,
            vocabulary=spec.vocabulary,
            attention=attention,
        )
        if spec.kind == "continuous":
            self.token_loss = Diffusion(
                config.width,
                spec.channels,
                config.diffusion_blocks,
                config.diffusion_width,
                config.diffusion_repeat,
                bound=config.diffusion_loss == "mse+vb",
            )
        else:
            self.token_loss = Categorical(config.width, spec.vocabulary)

    @abstractmethod
    def loss(self, batch: Batch, rng: Rng) -> Loss:
        """Loss of one micro-batch; every draw is keyed by batch.index."""

    @abstractmethod
    def sample(
        self,
        classes: Tensor,
        rng: Rng,
        options: SampleOptions | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """classes (B,) int64 -> tokens in raster order, (B, N) int64 or (B, N, C) float32.

        index: (B,) keys of the draws (default 0..B-1): the same (class, index, rng, options) gives
        the same image in any batch. Raises ValueError on classes out of range or bad options.
        """

    @abstractmethod
    def expected_count(self, batch: int) -> float:
        """Expected `Loss.count` of `batch` sequences (exact for antithetic steps)."""

    @abstractmethod
    def flops_per_image(self) -> dict[str, float]:
        """Multiply-add FLOPs (2 per product) of one forward pass, by part: products only, causal
        attention by half, supervised rows only."""

    # ------------------------------------------------------------------------------ for subclasses

    def set_dtype(self, dtype: torch.dtype) -> None:
        """The dtype of activations; parameters stay what they are."""
        self.backbone.dtype = dtype

    def drop(
        self, stream: str, index_P: Tensor, slot_P: Tensor | int, sites: int, length: int, rng: Rng
    ):
        """Dropout masks of one forward pass over P sequences of `length` elements."""
        if self.config.dropout == 0.0 or not self.training:
            return NO_DROP
        key_PS2 = rng.bits(f"dropout.{stream}", index_P, 2 * sites, slot_P).unflatten(-1, (-1, 2))
        counter = torch.arange(length, device=index_P.device)
        return Drop(key_PS2, counter, self.config.dropout)

    def token_losses(
        self,
        z_RD: Tensor,
        batch: Batch,
        sequence_R: Tensor,
        position_R: Tensor,
        slot_R: Tensor,
        rng: Rng,
        weight_R: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Against the token at each row's position: the weighted sum, and (R,) losses for logs."""
        target = batch.tokens.flatten(0, 1)[sequence_R * self.num_tokens + position_R]
        return self.token_loss.loss(z_RD, target, rng, batch.index[sequence_R], slot_R, weight_R)

    def draw_tokens(
        self, z_RD: Tensor, rng: Rng, index_R: Tensor, slot_R: Tensor, options: SampleOptions
    ) -> tuple[Tensor, Tensor | None]:
        """One token per row, and its probability where tokens are discrete."""
        if self.spec.kind == "continuous":
            return sample_vectors(
                self.token_loss, z_RD, rng, index_R, slot_R, options, self.spec.limit
            ), None
        uniform_R = rng.uniform("sample.token", index_R, 1, slot_R)[:, 0]
        return sample_codes(self.token_loss.logits(z_RD), uniform_R, options)

    def place_sampling(self, classes: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """Classes and keys of the draws (default 0..B-1) on the device of the parameters."""
        device = self.backbone.label.weight.device
        index = torch.arange(len(classes)) if index is None else index
        return classes.to(device), index.to(device)

    def check_sampling(self, classes: Tensor, options: SampleOptions) -> None:
        """Refuse classes out of range and options that this system does not know."""
        options.check(self.num_tokens, self.spec.vocabulary)
        bad = classes[(classes < 0) | (classes >= self.num_classes)]
        if len(bad):
            raise ValueError(
                f"--classes {bad.tolist()}: this run has {self.num_classes} classes, "
                f"0 to {self.num_classes - 1}"
            )

    def empty_tokens(self, batch: int, device: torch.device) -> Tensor:
        """A buffer for generated tokens, in raster order."""
        if self.spec.kind == "continuous":
            return torch.zeros(batch, self.num_tokens, self.spec.channels, device=device)
        return torch.zeros(batch, self.num_tokens, dtype=torch.int64, device=device)

    def initialise(self, seed: int) -> None:
        """Fill every parameter as a pure function of (seed, its name); see `initial_value`."""
        rng = Rng(seed)
        with torch.no_grad():
            for path, module in self.named_modules():
                for leaf, parameter in module.named_parameters(recurse=False):
                    if parameter.device.type != "meta":
                        value = initial_value(
                            module,
                            leaf,
                            parameter,
                            f"{path}.{leaf}",
                            rng,
                            self.config.embedding_std,
                        )
                        parameter.copy_(value)

    def token_loss_flops(self, rows: float) -> float:
        """Forward FLOPs of the token loss for `rows` supervised rows."""
        if isinstance(self.token_loss, Categorical):
            return 2 * rows * self.token_loss.output.weight.numel()
        loss = self.token_loss
        per_repeat = sum(
            m.weight.numel()
            for m in loss.modules()
            if isinstance(m, nn.Linear) and m not in (loss.condition, loss.time1, loss.time2)
        )
        return 2 * rows * (loss.repeat * per_repeat + loss.condition.weight.numel())


def initial_value(
    module: nn.Module, leaf: str, parameter: Tensor, name: str, rng: Rng, embedding_std: float
) -> Tensor:
    """MAR's initialisation (mar:models/mar.py:107-129, models/diffloss.py:194-215).

    Linear weights as their `init` says (xavier: uniform on +-sqrt(6 / (in + out))), biases 0,
    LayerNorm 1 and 0, embeddings and learned tokens N(0, embedding_std), upstream 0.02.
    """
    kind = getattr(module, "init", "embedding")
    if leaf == "bias" or kind == "zero":
        return torch.zeros_like(parameter)
    if isinstance(module, nn.LayerNorm):
        return torch.ones_like(parameter)
    columns = parameter.shape[-1]
    rows = torch.arange(parameter.numel() // columns, device=parameter.device)
    if kind != "xavier":
        std = embedding_std if kind == "embedding" else 0.02
        return std * rng.normal(f"init.{name}", rows, columns).view_as(parameter)
    bound = math.sqrt(6 / (len(rows) + columns))
    return bound * (2 * rng.uniform(f"init.{name}", rows, columns) - 1)


def block_flops(width: int, queries: float, keys: float, rows: float | None = None) -> float:
    """Forward FLOPs of one block over `queries` elements that each see `keys` on average.

    rows: how many elements reach projection and MLP (default: all).
    """
    rows = queries if rows is None else rows
    return 2 * (3 * width**2 * queries + 2 * width * queries * keys + 9 * width**2 * rows)
