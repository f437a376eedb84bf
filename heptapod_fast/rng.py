"""Counter-based randomness: every draw is a pure function of (seed, stream, index, slot, step).

There is no state to save and nothing to advance: a draw depends on the *global sample index* of the
sequence it belongs to, never on the rank, the micro-batch or the order in which draws are made. The
generator is Philox4x32-10 (Salmon et al., SC 2011), the one of cuRAND and `triton.language.philox`,
so that a kernel can make the same numbers again instead of storing them.

    key     = first 64 bits of blake2b("seed/stream/step")
    counter = (block, slot, index low, index high), four 32-bit outputs per block
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from heptapod_fast.ops.philox import (
    philox,
    philox4x32,
    reference,
    to_integer,
    to_normal,
    to_uniform,
)

__all__ = ["Rng", "SteppedRng", "philox4x32"]

_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Rng:
    """Source of random numbers made of (seed, stream, step); see the module's docstring.

    Training leaves `step` at 0: the global sample index already differs for every sequence ever
    seen. Samplers use `at(step)` to get fresh numbers at every step of a sequence.
    """

    seed: int
    step: int = 0

    def at(self, step: int) -> Rng:
        """The source for another step of the same seed."""
        return Rng(self.seed, step)

    def key(self, stream: str) -> tuple[int, int]:
        """The two 32-bit words of Philox's key for one stream."""
        digest = hashlib.blake2b(f"{self.seed}/{stream}/{self.step}".encode(), digest_size=8)
        word = int.from_bytes(digest.digest(), "little")
        return word & _MASK, word >> 32

    def bits(self, stream: str, index: Tensor, count: int, slot: Tensor | int = 0) -> Tensor:
        """index: (...) int64 global sample indices; slot: (...) int64 below 2**32, telling apart
        several draws of one sample. Returns (..., count) int64 in [0, 2**32)."""
        slots = slot if isinstance(slot, Tensor) else torch.full_like(index, slot)
        index, slots = torch.broadcast_tensors(index, slots.to(index.dtype))
        return self._words(stream, index, slots, (count + 3) // 4)[..., :count]

    def _words(self, stream: str, index: Tensor, slot: Tensor, blocks: int) -> Tensor:
        return philox(index, slot, blocks, self.key(stream))

    def uniform(self, stream: str, index: Tensor, count: int, slot: Tensor | int = 0) -> Tensor:
        """(..., count) float32, uniform on the open interval (0, 1); arguments as `bits`."""
        return to_uniform(self.bits(stream, index, count, slot))

    def normal(self, stream: str, index: Tensor, count: int, slot: Tensor | int = 0) -> Tensor:
        """(..., count) float32, standard normal by Box-Muller; arguments as `bits`."""
        return to_normal(self.bits(stream, index, count + count % 2, slot))[..., :count]

    def integers(
        self, stream: str, index: Tensor, count: int, high: int, slot: Tensor | int = 0
    ) -> Tensor:
        """(..., count) int64, uniform on 0..high-1 (bias below high / 2**32)."""
        return to_integer(self.bits(stream, index, count, slot), high)

    def permutation(self, stream: str, index: Tensor, length: int) -> Tensor:
        """index (B,) -> (B, length) int64: one uniformly random permutation per sequence."""
        return self.bits(stream, index, length).argsort(dim=-1, stable=True)


@dataclass(frozen=True, kw_only=True)
class SteppedRng(Rng):
    """The sources of all steps, `Rng.at(0)` and on, of which a tensor says which one draws.

    So that draws can be recorded once and replayed at other steps: keys are looked up on the
    device, in a table for each stream, which is made when the stream is first used.

    Attributes:
        step_1: (1,) int64 on the device where draws are made; whoever holds it sets it.
        steps: how many there are.
    """

    step_1: Tensor
    steps: int
    _tables: dict[str, Tensor] = field(default_factory=dict)

    def key(self, stream: str) -> tuple[int, int]:
        """None that the host could know."""
        raise TypeError(f"{stream}: which step draws is known on the device alone")

    def _words(self, stream: str, index: Tensor, slot: Tensor, blocks: int) -> Tensor:
        if stream not in self._tables:
            keys = [self.at(step).key(stream) for step in range(self.steps)]
            self._tables[stream] = torch.tensor(keys, device=self.step_1.device)
        first, second = self._tables[stream].index_select(0, self.step_1)[0].unbind()
        return reference(index, slot, blocks, (first, second))
