"""What the configuration asks of a system's own settings; the systems define them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

from heptapod_fast import ops
from heptapod_fast.config.data import DataSettings
from heptapod_fast.config.recipe import RecipeSettings
from heptapod_fast.config.run import RunSettings
from heptapod_fast.config.settings import Settings
from heptapod_fast.tokenizers import TokenSpec


@dataclass(frozen=True)
class Size:
    """A size of a system: the settings that nobody has to give.

    micro_batch: the most sequences that a rank takes at once unless told otherwise (a card of 80
    GiB by the estimate of --dry-run).
    """

    model: SystemSettings
    data: DataSettings
    recipe: RecipeSettings
    run: RunSettings
    micro_batch: int


class AttentionUse(NamedTuple):
    """One kind of attention in a system, for choosing its implementation.

    visible: FULL, CAUSAL, or the type of what they are (`ops.Ends`, `ops.AttentionMask`).
    """

    head_width: int
    keys: int
    visible: ops.Visible | type


@dataclass(frozen=True, kw_only=True)
class SystemSettings(Settings):
    """A system's own settings: its network, its supervision, its dropout.

    A system derives its class from this one and lists its sizes there.
    """

    SIZES: ClassVar[dict[str, Size]] = {}

    @classmethod
    def size(cls, name: str) -> Size:
        """ValueError lists the sizes there are."""
        if name not in cls.SIZES:
            raise ValueError(f"--size {name}: expected one of {', '.join(cls.SIZES)}")
        return cls.SIZES[name]

    def resolve(self, defaults: Self, spec: TokenSpec) -> Self:
        """Every setting that was not given, from the size's defaults, the tokens, or the others.

        Raises:
            ValueError: a setting that contradicts another; names the flag.
        """
        self.check()
        return self.filled(defaults)

    def check_images(self, total: int, batch: int) -> None:
        """Whether the phases of training fit into `total` images in steps of `batch`.

        Raises:
            ValueError: one of them would have no step.
        """

    def micro_batch_multiple(self) -> tuple[int, str]:
        """What a micro-batch is a multiple of, and the reason where it is not 1."""
        return 1, ""

    def attention_uses(self, spec: TokenSpec) -> list[AttentionUse]:
        """The kinds of attention that a step runs."""
        return []

    def derived(self, spec: TokenSpec) -> Iterator[tuple[str, str]]:
        """(name, value with its formula): what follows from the settings, for --dry-run."""
        yield from ()
