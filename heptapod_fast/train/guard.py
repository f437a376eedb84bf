"""Which steps are skipped, and when a run has to go back: judged on the device, without the host
waiting for it.

A step is bad if the norm of its gradient is not finite, or, where that is asked for, far above
those of the steps before it. A bad step changes nothing. `strain` rises by 1 with each and falls
slowly with every good one: a bad step now and then is nothing, many of them close together mean
that the run has diverged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WINDOW = 128  # norms that a new one is compared with
FIRST_JUDGED = 64  # so many have to be there before one can be too large
FORGIVEN_AFTER = 50  # good steps that make up for a bad one


class Guard:
    """Judges steps by the norms of their gradients.

    Args:
        device: of the norms.
        sigmas: a norm more than so many standard deviations above the mean of those before it makes
            a bad step; 0: none is too large.

    Attributes:
        strain: bad steps that are not made up for, 0-dim float32.
        norms: (WINDOW,) float32, the last norms in a ring.
        seen: norms that were put there so far, 0-dim int64.
    """

    def __init__(self, device: torch.device, sigmas: float = 0.0):
        self.sigmas = sigmas
        self.strain = torch.zeros((), device=device)
        self.norms = torch.zeros(WINDOW, device=device)
        self.seen = torch.zeros((), dtype=torch.int64, device=device)
        self._places = torch.arange(WINDOW, device=device)

    def judge(self, norm: Tensor) -> Tensor:
        """Whether a step is good as far as this rank can tell, 0-dim bool. norm: of its gradient,
        0-dim float32."""
        is_finite = norm.isfinite()
        if self.sigmas <= 0:
            return is_finite
        limit = self._limit()
        # What is too large counts as just large enough: a level that stays is followed, and a few
        # steps in a row are not.
        self._take(torch.minimum(norm, limit), is_finite)
        return is_finite & (norm <= limit)

    def note(self, is_good: Tensor) -> None:
        """What the ranks agreed on."""
        relief = (self.strain - 1 / FORGIVEN_AFTER).clamp(min=0.0)
        self.strain.copy_(torch.where(is_good, relief, self.strain + 1))

    def _limit(self) -> Tensor:
        """The largest norm of a good step; infinite until enough are known."""
        is_there = self._places < self.seen
        count = is_there.sum()
        mean = (self.norms * is_there).sum() / count
        squares = ((self.norms - mean).square() * is_there).sum() / count
        limit = mean + self.sigmas * squares.sqrt()
        is_known = self.seen >= FIRST_JUDGED
        return torch.where(is_known, limit, torch.full_like(limit, torch.inf))

    def _take(self, norm: Tensor, is_finite: Tensor) -> None:
        """Put a norm in the place of the oldest; one that is not finite is passed over."""
        is_place = self._places == self.seen % WINDOW
        self.norms.copy_(torch.where(is_place & is_finite, norm, self.norms))
        self.seen.add_(is_finite.long())

    def state(self) -> dict[str, Any]:
        """For a checkpoint's state. Waits for the device."""
        return {
            "strain": float(self.strain),
            "norms": self.norms[: int(self.seen)].tolist(),
            "seen": int(self.seen),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Inverse of `state`."""
        norms = state["norms"]
        self.strain.fill_(state["strain"])
        self.norms.zero_()
        self.norms[: len(norms)] = torch.tensor(norms)
        self.seen.fill_(state["seen"])
