"""AdamW with MAR's decay groups, gradient clipping, moving averages, and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from heptapod_fast import ops
from heptapod_fast.config import Config


def learning_rate(config: Config, images: int) -> float:
    """Rate of the step that ends at `images`: linear from 0, then constant or half a cosine."""
    warmup = config.warmup_images
    if images < warmup:
        return config.learning_rate * images / warmup
    if config.lr_schedule == "constant":
        return config.learning_rate
    progress = min(1.0, (images - warmup) / max(config.images - warmup, 1))
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def ema_decay(decay: float, step: int) -> float:
    """min(decay, (1 + step) / (10 + step)): short runs sample well, long ones are not touched."""
    return min(decay, (1 + step) / (10 + step))


def decays(name: str, parameter: Tensor, continuous: bool) -> bool:
    """MAR's decay group (mar:util/misc.py:291-303): all but vectors, biases and the diffusion MLP.

    Embeddings, position tables and the mask token are decayed, as upstream.
    """
    if parameter.dim() < 2 or name.endswith(".bias"):
        return False
    return not (continuous and name.startswith("token_loss."))


def ema_name(decay: float) -> str:
    """Name of a moving average on disk and on the command line."""
    return f"ema-{decay}"


class Optimizer:
    """State and step of the optimizer. All tensors are float32 and ordered as `names`.

    A step with a non-finite gradient norm changes no parameter, moment or average and is counted,
    without the host waiting for the device: its gradient scale is 0.
    """

    def __init__(self, system: nn.Module, config: Config, implementation: str):
        named = list(system.named_parameters())
        self.config, self.implementation = config, implementation
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.weight_decays = [
            config.weight_decay if decays(n, p, config.continuous) else 0.0 for n, p in named
        ]
        data = [p.detach() for p in self.parameters]
        self.exp_avgs = [torch.zeros_like(p) for p in data]
        self.exp_avg_sqs = [torch.zeros_like(p) for p in data]
        self.emas = {ema_name(d): [p.clone() for p in data] for d in config.ema}
        self.step_count = 0
        self.skipped = torch.zeros((), device=data[0].device)

    def step(self, lr: float, correction: Tensor | float = 1.0) -> Tensor:
        """One update from the parameters' gradients, which are then dropped.

        correction: factor on the gradients before clipping. Returns the gradient norm (0-dim).
        """
        self.step_count += 1
        data, grads = [p.detach() for p in self.parameters], [p.grad for p in self.parameters]
        norm = ops.global_norm(grads, self.implementation) * correction
        limit = self.config.clip / (norm + 1e-6) if self.config.clip else torch.inf
        scale = correction * torch.clamp(torch.as_tensor(limit, device=norm.device), max=1.0)
        good = norm.isfinite()
        scale = torch.where(good, scale, torch.zeros_like(norm))
        self.skipped += (~good).float()
        # One small copy that the host does not wait for.
        host = torch.tensor(
            [lr, self.step_count, *(ema_decay(d, self.step_count) for d in self.config.ema)]
        )
        scalars = host.to(norm.device, torch.float32, non_blocking=True)
        ops.adamw_ema(
            data,
            grads,
            self.exp_avgs,
            self.exp_avg_sqs,
            list(self.emas.values()),
            lr=scalars[0],
            step=scalars[1],
            grad_scale=scale.float(),
            ema_decays=scalars[2:],
            weight_decays=self.weight_decays,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            eps=1e-8,
            implementation=self.implementation,
        )
        for parameter in self.parameters:
            parameter.grad = None
        return norm

    @contextmanager
    def averaged(self, name: str | None) -> Iterator[None]:
        """In this context the system's parameters are those of a moving average (None: live)."""
        if name is None:
            yield
            return
        live = [p.data for p in self.parameters]
        for parameter, average in zip(self.parameters, self.emas[name], strict=True):
            parameter.data = average
        try:
            yield
        finally:
            for parameter, data in zip(self.parameters, live, strict=True):
                parameter.data = data

    # ------------------------------------------------------------------------------- checkpointing

    def files(self) -> dict[str, dict[str, Tensor]]:
        """Everything a checkpoint has to hold, by file and tensor name."""

        def named(tensors: list[Tensor], prefix: str = "") -> dict[str, Tensor]:
            return {prefix + n: t.detach() for n, t in zip(self.names, tensors, strict=True)}

        return {
            "model": named(self.parameters),
            **{name: named(tensors) for name, tensors in self.emas.items()},
            "optimizer": {
                **named(self.exp_avgs, "exp_avg."),
                **named(self.exp_avg_sqs, "exp_avg_sq."),
                "skipped": self.skipped,
            },
        }

    def load(self, read, step_count: int) -> None:
        """Inverse of `files`: read(file name) gives its tensors. ValueError on a mismatch."""
        for file, ours in self.files().items():
            theirs = read(file)
            if theirs.keys() != ours.keys():
                missing, extra = ours.keys() - theirs.keys(), theirs.keys() - ours.keys()
                raise ValueError(
                    f"{file} of the checkpoint does not fit this model: missing "
                    f"{sorted(missing)[:5]}, unknown {sorted(extra)[:5]}"
                )
            for name, tensor in ours.items():
                if tensor.shape != theirs[name].shape or tensor.dtype != theirs[name].dtype:
                    raise ValueError(
                        f"{file}: {name} is {tuple(theirs[name].shape)} "
                        f"{theirs[name].dtype}, expected {tuple(tensor.shape)}"
                    )
                tensor.copy_(theirs[name])
        self.step_count = step_count
