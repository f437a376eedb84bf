"""AdamW, gradient clipping and moving averages, in one operation over all parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from heptapod_fast import ops
from heptapod_fast.averages import averages_of
from heptapod_fast.config import RecipeSettings
from heptapod_fast.ops import sharded
from heptapod_fast.ops.dispatch import AUTO, Operators
from heptapod_fast.systems import System
from heptapod_fast.train.guard import Guard
from heptapod_fast.train.parallelize import gradients_of
from heptapod_fast.world import ALONE, World

EPS = 1e-8


class Optimizer:
    """State and step of the optimizer. All tensors are float32 and ordered as `names`.

    A step that `guard` finds bad changes no parameter, moment or average and is counted, without
    the host waiting for the device: its gradient scale is 0.

    Attributes:
        step_count: optimizer steps so far, skipped ones among them.
        skipped: how many were skipped, 0-dim float32 on the device.
        guard: judges the steps.
        averages: which moving averages there are.
        emas: {name: tensors of a moving average}.
    """

    def __init__(self, system: System, recipe: RecipeSettings, operators: Operators = AUTO):
        self.recipe = recipe
        self.operators = operators
        named = list(system.named_parameters())
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.weight_decays = [
            recipe.weight_decay if system.decays(name, parameter) else 0.0
            for name, parameter in named
        ]
        data = [parameter.detach() for parameter in self.parameters]
        self.exp_avgs = [torch.zeros_like(p) for p in data]
        self.exp_avg_sqs = [torch.zeros_like(p) for p in data]
        self.averages = averages_of(recipe.ema)
        self.emas = {average.name: [p.clone() for p in data] for average in self.averages}
        self.step_count = 0
        # Learning rate, step and decays of the next update, where the device reads them: at one
        # address, so that a captured update can be replayed.
        self.scalars = torch.zeros(2 + len(self.averages), device=data[0].device)
        self.skipped = torch.zeros((), device=data[0].device)
        self.guard = Guard(data[0].device, recipe.skip_spikes)
        self._keeps_gradients = False

    def keep_gradients(self) -> None:
        """From now on gradients stay where they are, and an update sets them to zero instead of
        dropping them: a captured graph adds to them at the same addresses."""
        self._keeps_gradients = True
        gradients_of(self.parameters)

    def step(self, lr: float, correction: Tensor | float = 1.0) -> Tensor:
        """`begin` and `update` in one."""
        self.begin(lr)
        return self.update(correction)

    def begin(self, lr: float) -> None:
        """The host's part of a step: count it, and say what it needs. One small copy that the host
        does not wait for."""
        self.step_count += 1
        decays = [average.decay_at(self.step_count) for average in self.averages]
        # Pinned, or the copy to a GPU could wait for all before it. New memory for every step: the
        # host runs ahead, and PyTorch gives pinned memory away again only when its copy is done.
        is_pinned = self.scalars.is_cuda
        host = torch.tensor([lr, self.step_count, *decays], pin_memory=is_pinned)
        self.scalars.copy_(host, non_blocking=True)

    def update(self, correction: Tensor | float = 1.0, world: World = ALONE) -> Tensor:
        """The device's part: new weights from the gradients, which are then dropped, or zero
        (`keep_gradients`). Collective call.

        Args:
            correction: factor on the gradients, before clipping.
            world: ranks that take the step together: it is a bad one for all of them or for none.

        Returns:
            The norm of the corrected gradient, 0-dim.
        """
        data = [parameter.detach() for parameter in self.parameters]
        grads = gradients_of(self.parameters)
        norm = ops.global_norm(grads, self.operators["global_norm"]) * correction
        is_good = world.every(self.guard.judge(norm))
        self.guard.note(is_good)
        self.skipped += (~is_good).float()
        scale = self._gradient_scale(norm, correction, is_good)
        ops.adamw_ema(
            data,
            grads,
            self.exp_avgs,
            self.exp_avg_sqs,
            list(self.emas.values()),
            lr=self.scalars[0],
            step=self.scalars[1],
            grad_scale=scale,
            ema_decays=self.scalars[2:],
            weight_decays=self.weight_decays,
            beta1=self.recipe.beta1,
            beta2=self.recipe.beta2,
            eps=EPS,
            implementation=self.operators["adamw_ema"],
        )
        if self._keeps_gradients:
            torch._foreach_zero_(grads)
        else:
            for parameter in self.parameters:
                parameter.grad = None
        return norm

    def _gradient_scale(self, norm: Tensor, correction: Tensor | float, is_good: Tensor) -> Tensor:
        """Correction and clipping in one factor, 0-dim float32; 0 for a bad step, which makes
        `adamw_ema` leave everything as it was."""
        scale = correction
        if self.recipe.clip:
            scale = correction * torch.clamp(self.recipe.clip / (norm + 1e-6), max=1.0)
        return torch.where(is_good, scale, torch.zeros_like(norm)).float()

    # ------------------------------------------------------------------------------- checkpointing

    def files(self) -> dict[str, dict[str, Tensor]]:
        """Everything a checkpoint has to hold, by file and tensor name."""

        def named(tensors: Sequence[Tensor], prefix: str = "") -> dict[str, Tensor]:
            return {prefix + n: t.detach() for n, t in zip(self.names, tensors, strict=True)}

        moments = {
            **named(self.exp_avgs, "exp_avg."),
            **named(self.exp_avg_sqs, "exp_avg_sq."),
        }
        return {
            "model": named(self.parameters),
            **{name: named(tensors) for name, tensors in self.emas.items()},
            "optimizer": {**moments, "skipped": self.skipped},
        }

    def snapshot(self) -> dict[str, dict[str, Tensor]]:
        """The power-function averages by file and tensor name, in half precision: 11 bits are
        enough for what they are combined into (float32 where a value is too large). Collective call
        where tensors are sharded."""
        found: dict[str, dict[str, Tensor]] = {}
        for average in self.averages:
            if average.gamma is None:
                continue
            tensors = dict(zip(self.names, self.emas[average.name], strict=True))
            found[average.name] = {name: _in_half(value) for name, value in tensors.items()}
        return found

    def load(self, read_into: Callable[[str, dict[str, Tensor]], None], step_count: int) -> None:
        """Inverse of `files`.

        Args:
            read_into: fills tensors from the file of a name; `Checkpoint.read_into`.
            step_count: optimizer steps of the checkpoint.

        Raises:
            ValueError: names or shapes that do not fit this model.
        """
        for file, tensors in self.files().items():
            read_into(file, tensors)
        self.step_count = step_count


def _in_half(value: Tensor) -> Tensor:
    """In half precision, or a copy as it is where that cannot hold it; DTensors stay what they are.
    Collective call for these."""
    half = value.half()
    is_small = bool(sharded.whole(half.isfinite().all()))
    return half if is_small else value.clone()
