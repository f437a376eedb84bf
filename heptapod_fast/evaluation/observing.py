"""Watching a network at work: what its units let out, and who looks where in its attention.

Works on every system that answers `System.look`. Suffixes as in docs/legend.md; M elements that a
unit lets out, N queries and K keys of an attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from heptapod_fast import ops
from heptapod_fast.data.tokens import Batch
from heptapod_fast.evaluation.image_sets import ImageSet
from heptapod_fast.model.transformer import Stream
from heptapod_fast.ops import Visible
from heptapod_fast.rng import Rng
from heptapod_fast.systems.base import NOWHERE, System
from heptapod_fast.tokenizers.base import Tokenizer, to_unit

BATCH = 64  # even: antithetic steps are drawn for pairs


@dataclass
class Attended:
    """One attention of a pass over B sequences.

    Attributes:
        q, k: (B, N, H, E) and (B, K, H, E).
        visible: who sees whom.
        query_BN, key_BK: where they stand; see `systems.base.Elements`.
    """

    q: Tensor
    k: Tensor
    visible: Visible
    query_BN: Tensor
    key_BK: Tensor

    def shares(self) -> Tensor:
        """(B, H, N, K) float32: what each query takes of each key; rows add up to 1."""
        return ops.attention_shares(self.q, self.k, self.visible)

    def even_shares(self) -> Tensor:
        """(B, H, N, K): the same of queries that do not tell the keys they see apart."""
        return ops.attention_shares(torch.zeros_like(self.q), self.k, self.visible)


@dataclass
class Layer:
    """One unit of a network, after a pass.

    Attributes:
        name: of its module, as "head.blocks.0".
        hidden_BMD: what it lets out, float32.
        place_BM: where these elements stand.
        attended: its attentions, in the order they ran.
    """

    name: str
    hidden_BMD: Tensor
    place_BM: Tensor
    attended: list[Attended]

    @property
    def part(self) -> str:
        """The part of the network that it belongs to, as "head"."""
        return self.name.split(".")[0]

    def pooled(self) -> Tensor:
        """(B, D): the mean over elements that stand for a token."""
        is_placed_BM1 = (self.place_BM != NOWHERE)[..., None]
        total_BD = (self.hidden_BMD * is_placed_BM1).sum(1)
        return total_BD / is_placed_BM1.sum(1)

    def on_grid(self, num_tokens: int) -> Tensor:
        """(B, N, D) by position, NaN where no element stands; the last one where several do."""
        batch, _, width = self.hidden_BMD.shape
        # One place more, for elements that stand nowhere: -1 is the last.
        grid = self.hidden_BMD.new_full((batch, num_tokens + 1, width), torch.nan)
        sequence_B1 = torch.arange(batch, device=grid.device)[:, None]
        for element in range(self.place_BM.shape[1]):
            position_B1 = self.place_BM[:, element : element + 1]
            grid[sequence_B1, position_B1] = self.hidden_BMD[:, element : element + 1]
        return grid[:, :num_tokens]


@dataclass
class _Seen:
    """What a unit did while a pass ran."""

    hidden: Any = None
    attention: list[tuple[Tensor, Tensor, Visible]] = field(default_factory=list)


@torch.no_grad()
def observe(system: System, batch: Batch, rng: Rng, seen: int) -> list[Layer]:
    """All units of a system in one pass over whole images.

    Args:
        system: in evaluation mode.
        batch: on its device.
        seen: as `System.look` takes it.

    Raises:
        ValueError: the system does not answer `look`, or says other numbers of things than ran.
    """
    units = system.units()
    records = [_Seen() for _ in units]
    running: list[_Seen] = []

    def watch(q: Tensor, k: Tensor, visible: Visible) -> None:
        if running:
            running[-1].attention.append((q, k, visible))

    with ExitStack() as stack:
        for unit, record in zip(units, records, strict=True):
            for handle in _hooks(unit, record, running):
                stack.callback(handle.remove)
        stack.enter_context(ops.watched_attention(watch))
        elements = system.look(batch, rng, seen)
    names = {module: name for name, module in system.named_modules()}
    if len(elements) != len(units):
        raise ValueError(f"{type(system).__name__}.look: {len(elements)} of {len(units)} units")
    layers = []
    for unit, record, (place_BM, attention) in zip(units, records, elements, strict=True):
        if len(record.attention) != len(attention):
            raise ValueError(
                f"{type(system).__name__}.look tells of {len(attention)} attentions in "
                f"{names[unit]}, in which {len(record.attention)} ran"
            )
        attended = [
            Attended(*ran, query_BN, key_BK)
            for ran, (query_BN, key_BK) in zip(record.attention, attention, strict=True)
        ]
        hidden = record.hidden
        if isinstance(hidden, Stream):
            hidden = hidden.value()
        layers.append(Layer(names[unit], hidden.float(), place_BM, attended))
    return layers


def _hooks(unit: nn.Module, record: _Seen, running: list[_Seen]) -> list[Any]:
    """What fills in the record while the unit runs."""

    def before(*_: object) -> None:
        running.append(record)

    def after(_module: nn.Module, _inputs: object, output: object) -> None:
        running.pop()
        record.hidden = output

    return [unit.register_forward_pre_hook(before), unit.register_forward_hook(after)]


def without_class(system: System, index_B: Tensor) -> Tensor:
    """(B,) labels that say nothing of the images: that of no class where the system knows it, else
    a random class for each image."""
    if system.null_class is not None:
        return torch.full_like(index_B, system.null_class)
    return Rng(0).integers("without class", index_B, 1, system.num_classes)[:, 0]


def batches_of(
    images: ImageSet,
    system: System,
    tokenizer: Tokenizer,
    progress: Callable[[int, int], None],
    has_class: bool = True,
) -> Iterator[tuple[Tensor, Tensor, Batch]]:
    """(pixels, labels, batch), an even number at a time: of an odd number of images the last one is
    left out.

    Args:
        images: with labels.
        has_class: whether the batch says the classes; else see `without_class`.
    """
    assert images.labels is not None  # `likelihood.images_of` sees to it
    device = next(system.parameters()).device
    first = 0
    for whole in images.batches():
        for pixels in whole.split(BATCH):
            pixels = pixels[: len(pixels) // 2 * 2]
            index_B = torch.arange(first, first + len(pixels), device=device)
            label_B = images.labels[first : first + len(pixels)]
            tokens = tokenizer.encode(to_unit(pixels).to(tokenizer.device)).to(device)
            told_B = label_B.to(device) if has_class else without_class(system, index_B)
            first += len(pixels)
            progress(first, len(images))
            yield pixels, label_B, Batch(tokens, told_B, index_B)
