"""Drawing vectors by following a velocity from noise to data: Euler's and Heun's methods. Suffixes:
R rows, C channels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from heptapod_fast.rng import Rng
from heptapod_fast.sampling.options import FLOW_STEPS, SampleOptions


@dataclass(frozen=True)
class Path:
    """The way of each row from noise (time 1) to data (time 0), in equal steps.

    rng, index_R, slot_R: the noise is keyed by them.
    limit: the data that a velocity points at is clipped to [-limit, limit] (0: never), as in
        `Denoiser`; guidance may point far away.
    """

    rng: Rng
    index_R: Tensor
    slot_R: Tensor
    options: SampleOptions
    limit: float = 0.0

    @property
    def steps(self) -> int:
        """Number of steps; Heun's method evaluates the network twice in each."""
        return self.options.diffusion_steps or FLOW_STEPS

    def times(self) -> Tensor:
        """(steps + 1,) float32: from 1 down to 0."""
        return torch.linspace(1.0, 0.0, self.steps + 1)

    def times_on(self, device: torch.device) -> Tensor:
        """`times` on a device, once: a copy to it cannot be recorded (sampling/replay.py)."""
        return _times_on(self.steps, device)

    def sample(self, predict: Callable[[Tensor, int], Tensor], channels: int) -> Tensor:
        """(R, C) float32.

        euler: x' = x - dt v(x, t). heun: with the mean of the velocities at both ends of the step.
        temperature scales the noise at the start.

        predict: (x_t (R, C), which of `times`) -> velocity (R, C) float32.
        """
        times = self.times().tolist()
        x_RC = self.rng.normal("sample.start", self.index_R, channels, self.slot_R)
        x_RC = x_RC * self.options.temperature
        for step in range(self.steps):
            length = times[step] - times[step + 1]
            first_RC = self._velocity(predict, x_RC, step, times[step])
            end_RC = x_RC - length * first_RC
            if self.options.diffusion_sampler == "heun":
                second_RC = self._velocity(predict, end_RC, step + 1, times[step + 1])
                end_RC = x_RC - length * (first_RC + second_RC) / 2
            x_RC = end_RC
        return x_RC.clamp(-self.limit, self.limit) if self.limit else x_RC

    def _velocity(
        self, predict: Callable[[Tensor, int], Tensor], x_RC: Tensor, step: int, time: float
    ) -> Tensor:
        """The network's, or the one that points at what it means within the limit."""
        v_RC = predict(x_RC, step)
        if not self.limit or time == 0.0:
            return v_RC
        data_RC = (x_RC - time * v_RC).clamp(-self.limit, self.limit)
        return (x_RC - data_RC) / time


@lru_cache
def _times_on(steps: int, device: torch.device) -> Tensor:
    return torch.linspace(1.0, 0.0, steps + 1).to(device)
