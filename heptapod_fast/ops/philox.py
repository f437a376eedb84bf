"""philox: counter-based random bits, the same ones wherever they are made.

    words(i, b) = Philox4x32-10(counter = (b, slot_i, low(index_i), high(index_i)), key)

The generator of cuRAND and of `triton.language.philox` (Salmon, Moraes, Dror, Shaw, "Parallel
random numbers: as easy as 1, 2, 3", SC 2011). Integers only, so every implementation agrees bit
for bit. What draws make of the words is here too, once, for `heptapod_fast.rng` and for the
references of operations whose kernels make their draws again:

    uniform  u = ((w >> 8) + 1/2) 2**-24, at most 1 - 2**-24
    normal   words 2p, 2p + 1 -> r cos(2 pi u'), r sin(2 pi u'), r = sqrt(-2 log u)   (Box-Muller)
    integer  (w * high) >> 32
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from heptapod_fast.ops import dispatch, library

_M0 = 0xD2511F53
_M1 = 0xCD9E8D57
_W0 = 0x9E3779B9
_W1 = 0xBB67AE85
_MASK = 0xFFFFFFFF

# Two integers below 2**32; for `reference` also two int64 tensors without dimensions.
Key = tuple[int, int] | tuple[Tensor, Tensor]


def philox4x32(counter: tuple[Tensor, ...], key: Key) -> tuple[Tensor, ...]:
    """Philox4x32-10 in int64 arithmetic.

    counter: four int64 tensors with values in [0, 2**32), broadcastable to one shape.
    Returns four int64 tensors of that shape with values in [0, 2**32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        # The product wraps modulo 2**64; the arithmetic shift plus the mask give its upper word.
        p0 = c0 * _M0
        p1 = c2 * _M1
        c0 = ((p1 >> 32) & _MASK) ^ c1 ^ k0
        c1 = p1 & _MASK
        c2 = ((p0 >> 32) & _MASK) ^ c3 ^ k1
        c3 = p0 & _MASK
        k0 = (k0 + _W0) & _MASK
        k1 = (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def philox(
    index: Tensor, slot: Tensor, blocks: int, key: tuple[int, int], *, implementation: str = "auto"
) -> Tensor:
    """index: (...) int64; slot: int64 of the same shape, its low 32 bits count; key: two integers
    below 2**32. Returns (..., 4 * blocks) int64 in [0, 2**32): block b of an item in places
    4b..4b+3. Raises ValueError on other dtypes or unequal shapes or devices."""
    if index.dtype != torch.int64 or slot.dtype != torch.int64:
        raise ValueError(f"philox takes int64 index and slot, got {index.dtype} and {slot.dtype}")
    if index.shape != slot.shape or index.device != slot.device:
        raise ValueError(
            f"philox takes index and slot of one shape and device, got "
            f"{tuple(index.shape)} on {index.device} and {tuple(slot.shape)} on "
            f"{slot.device}"
        )
    if not 0 <= blocks < 2**32:
        raise ValueError(f"philox counts blocks in 32 bits, got {blocks}")
    chosen = dispatch.select("philox", index.device, index.dtype, implementation)
    if chosen == "reference":
        return reference(index, slot, blocks, key)
    return torch.ops.heptapod_fast.philox.default(
        index.contiguous(), slot.contiguous(), blocks, key[0], key[1]
    )


def reference(index: Tensor, slot: Tensor, blocks: int, key: Key) -> Tensor:
    """`philox` in plain PyTorch, on any device."""
    block = torch.arange(blocks, device=index.device)
    words = philox4x32(
        (
            block,
            (slot & _MASK)[..., None],
            (index & _MASK)[..., None],
            ((index >> 32) & _MASK)[..., None],
        ),
        key,
    )
    return torch.stack(words, dim=-1).flatten(-2)


def to_uniform(words: Tensor) -> Tensor:
    """Words (...) -> (...) float32, uniform on the open interval (0, 1)."""
    high_bits = (words >> 8).float()
    # The largest value, 1 - 2**-25, would round to 1.
    return ((high_bits + 0.5) * 2.0**-24).clamp_(max=1.0 - 2.0**-24)


def to_normal(words: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Words (..., even count) -> the same shape, standard normal; dtype: what it is computed in."""
    pairs = to_uniform(words).to(dtype).unflatten(-1, (-1, 2))
    radius = (-2.0 * pairs[..., 0].log()).sqrt()
    angle = (2.0 * math.pi) * pairs[..., 1]
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(-2)


def to_integer(words: Tensor, high: int) -> Tensor:
    """Words (...) -> (...) int64, uniform on 0..high-1 (bias below high / 2**32)."""
    return (words * high) >> 32


class Draws(NamedTuple):
    """Where `repeat` (time, noise) pairs for each of M tokens come from.

    index_M: int64, global sample index of each token. slot_M: int64, tells apart the tokens of one
    sample. Row m * repeat + k is drawn with index index_m and slot slot_m * repeat + k, whatever
    the other rows are. time_key, noise_key: Philox keys (`Rng.key`) of the two streams.
    """

    index_M: Tensor
    slot_M: Tensor
    repeat: int
    time_key: tuple[int, int]
    noise_key: tuple[int, int]

    def rows(self) -> tuple[Tensor, Tensor]:
        """Index and slot of the M * repeat rows, int64."""
        repeats = torch.arange(self.repeat, device=self.slot_M.device)
        index = self.index_M[:, None].expand(-1, self.repeat)
        return index.flatten(), (self.slot_M[:, None] * self.repeat + repeats).flatten()

    def times(self) -> Tensor:
        """(M * repeat,) int64: the word that each row's time is made of."""
        return philox(*self.rows(), 1, self.time_key)[:, 0]

    def noise(self, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(M * repeat, channels) standard normal."""
        words = philox(*self.rows(), (channels + 3) // 4, self.noise_key)
        return to_normal(words[:, : channels + channels % 2], dtype)[:, :channels]

    def check(self, operation: str, x0_MC: Tensor) -> None:
        """ValueError unless these are draws for the tokens x0_MC."""
        index = self.index_M
        slot = self.slot_M
        if x0_MC.dim() != 2 or not x0_MC.shape[1]:
            raise ValueError(
                f"{operation} takes x0 of shape (M, C), C > 0, got {tuple(x0_MC.shape)}"
            )
        if (
            index.dtype != torch.int64
            or slot.dtype != torch.int64
            or index.dim() != 1
            or index.shape != slot.shape
            or len(index) != len(x0_MC)
        ):
            raise ValueError(
                f"{operation} takes int64 index and slot of shape ({len(x0_MC)},), "
                f"got {index.dtype} {tuple(index.shape)} and {slot.dtype} "
                f"{tuple(slot.shape)}"
            )
        if self.repeat < 1:
            raise ValueError(
                f"{operation} draws at least once per token, got repeat = {self.repeat}"
            )

    def arrays(self) -> tuple[Tensor, Tensor]:
        """Index and slot as kernels read them."""
        return self.index_M.contiguous(), self.slot_M.contiguous()


dispatch.register("philox", "cuda", library.check("cuda"))
dispatch.register("philox", "cpu", library.check("cpu"))
dispatch.register("philox", "reference", lambda device, dtype: None)

if library.available("cpu"):

    @torch.library.register_fake("heptapod_fast::philox")
    def _fake(index: Tensor, slot: Tensor, blocks: int, key0: int, key1: int) -> Tensor:
        return index.new_empty((*index.shape, 4 * blocks))
