"""Losses of images that a model was not trained on: by step, and by degree of noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from heptapod_fast.evaluation.context import MetricContext
from heptapod_fast.evaluation.likelihood import images_of
from heptapod_fast.evaluation.observing import batches_of
from heptapod_fast.rng import Rng
from heptapod_fast.systems.base import System

NOISES = [0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98]


class HeldOutLoss:
    """The loss of the next token: see `Metric`. Images are those of `likelihood`.

    `compute` returns:
        held_out_loss: mean over tokens, in nats of codes; of continuous tokens the token loss, each
            at random degrees of noise.
        held_out_loss_by_step: {step: loss}, the step at which a token comes, 0 for the first.
        held_out_loss_by_noise: of continuous tokens, {share of the time from data to noise: error
            of the predicted noise, or velocity}, of positions that training would supervise.

    Raises:
        ValueError: a system that does not say, or images without classes.
    """

    needs_samples = False

    def __init__(self, context: MetricContext, names: Sequence[str] = ("loss",)) -> None:
        if context.system is None or context.tokenizer is None:
            raise ValueError("--metrics loss needs a run and its tokenizer")
        context.system.check_answers("next_token_losses", "--metrics loss")
        self._system = context.system
        self._tokenizer = context.tokenizer
        self._context = context
        self._images = images_of(context, "loss")

    def update(self, pixels: Tensor, labels: Tensor) -> None:
        """See `Metric.update`: samples are not what is looked at."""

    def restart(self, system: System) -> None:
        """See `Metric.restart`."""
        self._system = system

    @torch.no_grad()
    def compute(self) -> dict[str, Any]:
        """See `Metric.compute`."""
        system = self._system
        progress = self._context.progress("held-out loss")
        by_token = []
        by_noise = []
        is_denoised = self._tokenizer.spec.kind == "continuous"
        for _, _, batch in batches_of(self._images, system, self._tokenizer, progress):
            by_token.append(system.next_token_losses(batch, Rng(0)).double().cpu())
            if is_denoised:
                losses = system.losses_by_noise(batch, Rng(0), NOISES)
                by_noise.append(len(batch.index) * losses.double().cpu())
        loss_BN = torch.cat(by_token)
        found: dict[str, Any] = {"held_out_loss": float(loss_BN.mean())}
        found["held_out_loss_by_step"] = by_step(loss_BN.mean(0), system.step_of_tokens())
        if is_denoised:
            means = torch.stack(by_noise).sum(0) / len(loss_BN)
            found["held_out_loss_by_noise"] = dict(zip(map(str, NOISES), means.tolist()))
        found["held_out_of"] = self._images.name
        found["held_out_images"] = len(loss_BN)
        return found


def by_step(loss_N: Tensor, step_N: Tensor) -> dict[str, float]:
    """{step: mean loss of the tokens that come then}, of (N,) losses and steps."""
    return {str(step): float(loss_N[step_N == step].mean()) for step in step_N.unique().tolist()}
