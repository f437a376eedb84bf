"""The contract of a system: what the trainer, the samplers and the reports ask of one.

A system is a module that builds its own network and answers for everything that depends on which
system it is. Nothing outside of this folder asks which one it has. A system reads no files, no
environment and no clock. `docs/add-a-system.md` adds one step by step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from heptapod_fast.config import DataSettings, RunSettings, SystemSettings, flag
from heptapod_fast.data.tokens import Batch
from heptapod_fast.model.layers import Linear
from heptapod_fast.ops.dispatch import AUTO, Operators
from heptapod_fast.rng import Rng
from heptapod_fast.sampling import Given, SampleOptions
from heptapod_fast.tokenizers import TokenSpec

NOWHERE = -1  # the position of an element that stands for no token, as that of the class

AnyOptions = TypeVar("AnyOptions", bound=SampleOptions)
AnySettings = TypeVar("AnySettings", bound=SystemSettings)

# What size tiny trains on, whatever the system: nothing has to be downloaded.
TINY_DATA = DataSettings(data="logograms", tokenizer="patch-vq", image_size=24, flip=False)
TINY_RUN = RunSettings(sample_every=30_000, checkpoint_every=30_000, log_every=1_600)


class Loss(NamedTuple):
    """What a micro-batch contributes to the loss of the global batch.

    total: the weighted sum over its supervised positions, which gradients flow from. count: the sum
    of the weights. The gradient of a step is that of sum(total) / sum(count) over all micro-batches
    of all ranks, so that neither changes it (train/step.py).
    """

    total: Tensor
    count: Tensor | float  # type: ignore[assignment]  # nobody counts the elements of this tuple

    @property
    def mean(self) -> Tensor:
        """The loss of this micro-batch alone."""
        return self.total / self.count


class Elements(NamedTuple):
    """Where on the grid the elements of one unit stand, in raster order; `NOWHERE` for none.

    place_BM: (B, M) of the elements that it lets out: of the token that each has taken in.
    attention: for every attention within it, in the order they run, (B, N) of the queries, of the
        token that each works on or is about to predict, and (B, K) of the keys.
    """

    place_BM: Tensor
    attention: tuple[tuple[Tensor, Tensor], ...]


def with_possible_scale(
    settings: AnySettings, given: AnySettings, scale: str, dropout: str
) -> AnySettings:
    """Settings whose scale of guidance is 1 where nothing is dropped that it could guide away from.

    Args:
        settings: filled in.
        given: what was asked for.
        scale, dropout: names of two settings.

    Raises:
        ValueError: another scale was asked for.
    """
    if getattr(settings, dropout) > 0:
        return settings
    asked = getattr(given, scale)
    if asked not in (None, 1.0):
        raise ValueError(
            f"{flag(scale)} {asked:g} guides away from what {flag(dropout)} 0 never trains: give "
            f"{flag(dropout)} a share above 0, or leave {flag(scale)} away"
        )
    return settings.changed({scale: 1.0})


@dataclass(frozen=True)
class Phase:
    """A stretch of training in which every step does the same kind of work.

    Shapes, FLOPs and the schedule of the learning rate hold within a phase; when the next one
    begins, the trainer reads anew what depends on it.

    Attributes:
        first: images that were trained on when it begins.
        end: images that were trained on when it is over.
        name: as progress lines call it; "" where there is but one.
        level: what the system tells its phases apart by.
    """

    first: int
    end: int
    name: str = ""
    level: int = 0


class System(nn.Module, ABC):
    """Base class of the systems; `systems.build_system` makes one and fills its parameters.

    Class attributes:
        Settings: the class of its settings, with its sizes.
        Options: the class of the options that its `sample` understands.
        REFUSED_OPTIONS: {option of other systems: why it means nothing here}.

    Args:
        settings: resolved.
        spec: shape and kind of the tokens.
        num_classes: labels are 0..num_classes-1.
        operators: which implementation each operation is called with.
    """

    Settings: ClassVar[type[SystemSettings]]
    Options: ClassVar[type[SampleOptions]] = SampleOptions
    REFUSED_OPTIONS: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        settings: SystemSettings,
        spec: TokenSpec,
        num_classes: int,
        operators: Operators = AUTO,
    ):
        super().__init__()
        self.settings = settings
        self.spec = spec
        self.num_classes = num_classes
        self.num_tokens = spec.num_tokens
        self.operators = operators

    # ------------------------------------------------------------------------------------ training

    @abstractmethod
    def forward(self, batch: Batch, rng: Rng, phase: Phase | None = None) -> Loss:
        """Loss of one micro-batch; every draw is keyed by batch.index. phase: None for the last
        one of training."""

    def loss(self, batch: Batch, rng: Rng, phase: Phase | None = None) -> Loss:
        """`forward`, through the call that hooks of this module fire at. Training calls what
        `train/parallelize.py` made of the system."""
        return self(batch, rng, phase)

    def phase(self, images: int, total: int) -> Phase:
        """The phase of the step that begins after `images` of `total` images. Host arithmetic."""
        return Phase(0, total)

    def phases(self, total: int) -> Iterator[Phase]:
        """All phases of a run over `total` images, in order."""
        images = 0
        while images < total:
            phase = self.phase(images, total)
            if not phase.first <= images < phase.end:
                raise ValueError(
                    f"{type(self).__name__}.phase: {phase} does not hold image {images}, for which "
                    "it was asked"
                )
            yield phase
            images = phase.end

    @abstractmethod
    def expected_count(self, batch: int, phase: Phase | None = None) -> float:
        """Expected `Loss.count` of `batch` sequences."""

    @abstractmethod
    def set_dtype(self, dtype: torch.dtype) -> None:
        """The dtype of activations; parameters stay float32."""

    def settle_dtype(self, dtype: torch.dtype) -> None:
        """`set_dtype` of a system that is not trained any more: the units' products, the most of
        its parameters, are kept in that dtype, where training casts its float32 masters for every
        product. The same values are multiplied."""
        self.set_dtype(dtype)
        for unit in self.units():
            for module in unit.modules():
                if isinstance(module, Linear):
                    module.weight.data = module.weight.data.to(dtype)

    # ---------------------------------------------------------------------------------- parameters

    @abstractmethod
    def initial_value(
        self, module: nn.Module, leaf: str, parameter: Tensor, name: str, rng: Rng
    ) -> Tensor | None:
        """What a parameter starts as: a pure function of (rng, name). None for one that the system
        does not know, which is an error.

        module, leaf: the module that owns it and its name there; name: its full name.
        """

    def initialise(self, seed: int) -> None:
        """Fill every parameter.

        Raises:
            TypeError: nobody says how a parameter starts.
        """
        rng = Rng(seed)
        with torch.no_grad():
            for path, module in self.named_modules():
                for leaf, parameter in module.named_parameters(recurse=False):
                    name = f"{path}.{leaf}" if path else leaf
                    if parameter.device.type != "meta":
                        self._fill(module, leaf, parameter, name, rng)

    def _fill(self, module: nn.Module, leaf: str, parameter: Tensor, name: str, rng: Rng) -> None:
        value = self.initial_value(module, leaf, parameter, name, rng)
        if value is None:
            raise TypeError(
                f"{type(self).__name__}.initial_value does not say how {name} of a "
                f"{type(module).__name__} starts"
            )
        parameter.copy_(value)

    @abstractmethod
    def decays(self, name: str, parameter: Tensor) -> bool:
        """Whether weight decay acts on a parameter."""

    def class_table(self) -> str | None:
        """Name of the parameter that has a row for each class, row r for class r; None where there
        is none. --init-from takes its rows by the classes' names."""
        return None

    @abstractmethod
    def units(self) -> list[nn.Module]:
        """The modules that may be wrapped, compiled or recomputed one by one, in the order they
        run: the blocks of the network."""

    # ------------------------------------------------------------------------------------ counting

    @abstractmethod
    def flops_per_image(self, phase: Phase | None = None) -> dict[str, float]:
        """FLOPs (2 per multiply-add) of one forward pass, by part: products only, causal attention
        by half, supervised rows only."""

    # ---------------------------------------------------------------------------------- looking in

    def check_answers(self, method: str, asked_by: str) -> None:
        """Refuse one of the methods below where this system has none.

        Raises:
            ValueError: says who asked.
        """
        if getattr(type(self), method) is getattr(System, method):
            raise ValueError(
                f"{asked_by}: {type(self).__name__} does not say this; it would be its method "
                f"{method}, see systems/base.py"
            )

    @property
    def null_class(self) -> int | None:
        """The label of no class, where training has shown it; else None."""
        return None

    def look(self, batch: Batch, rng: Rng, seen: int) -> list[Elements]:
        """Run the network over whole images as training does, but without a loss, for those who
        watch its units and its attention (evaluation/observing.py).

        Args:
            seen: tokens that what comes behind the backbone is shown, 0 to N - 1, where there is
                such a thing.

        Returns:
            For every one of `units`, where its elements stand.
        """
        raise ValueError(f"{type(self).__name__} does not say where its elements stand")

    def next_token_losses(self, batch: Batch, rng: Rng) -> Tensor:
        """(B, N) float32 losses of every token in the order that they come, given those before it
        and the class; the order is drawn as in training, where there are several."""
        raise ValueError(f"{type(self).__name__} does not say what single tokens cost")

    def step_of_tokens(self) -> Tensor:
        """(N,) int64 on the CPU: the step, from 0, at which each of `next_token_losses` comes."""
        return torch.arange(self.num_tokens)

    def losses_by_noise(self, batch: Batch, rng: Rng, shares: list[float]) -> Tensor:
        """(len(shares),) float32 mean losses of continuous tokens that are noisy to these degrees,
        0 to 1 of the time from data to noise."""
        raise ValueError(f"{type(self).__name__} does not say what denoising costs")

    @torch.no_grad()
    def log_likelihood(
        self, tokens: Tensor, classes: Tensor, rng: Rng, index: Tensor | None = None
    ) -> Tensor:
        """What the model gives images in one order each: (B,) log p(tokens | class, order), in
        nats, of codes (B, N). The order is drawn as in training, where there are several.

        Raises:
            ValueError: as `check_likelihood`, and in training mode, where dropout would act.
        """
        self.check_likelihood()
        if self.training:
            raise ValueError("log_likelihood of a system in training mode: dropout would act")
        classes, index_B = self.place_sampling(classes, index)
        batch = Batch(tokens.to(classes.device), classes, index_B)
        return -self.next_token_losses(batch, rng).double().sum(1)

    def check_likelihood(self) -> None:
        """Refuse `log_likelihood` where the model has none: there are probabilities of codes."""
        self.check_answers("next_token_losses", "--metrics likelihood")
        if self.spec.kind != "discrete":
            raise ValueError("a likelihood is that of codes; the tokens are continuous")

    # ------------------------------------------------------------------------------------ sampling

    @classmethod
    def options(cls, **given: Any) -> SampleOptions:
        """The options of `sample` by name, the others at their defaults.

        Raises:
            ValueError: an option that this system does not understand; says why where it can.
        """
        for name, value in given.items():
            if name in cls.REFUSED_OPTIONS:
                raise ValueError(f"{flag(name)} {value}: {cls.REFUSED_OPTIONS[name]}")
            if name not in cls.Options.names():
                known = ", ".join(flag(option) for option in cls.Options.names())
                raise ValueError(f"{flag(name)}: this system samples with {known}")
        return cls.Options(**given)

    @abstractmethod
    def sample(
        self,
        classes: Tensor,
        rng: Rng,
        options: SampleOptions | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """Tokens of new images.

        Args:
            classes: (B,) int64.
            rng: source of all draws.
            options: of the class `Options`; None for the defaults.
            index: (B,) keys of the draws, default 0..B-1: the same (class, index, rng, options)
                gives the same image in any batch.

        Returns:
            In raster order, (B, N) int64 or (B, N, C) float32.

        Raises:
            ValueError: classes out of range, or options that cannot be.
        """

    def complete(
        self,
        given: Given,
        classes: Tensor,
        rng: Rng,
        options: SampleOptions | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """Tokens of images of which a part is given: see `sample`. Given tokens come back bit for
        bit.

        Raises:
            ValueError: as `sample`, and as `check_given`.
        """
        self.check_given(given, len(classes))
        raise NotImplementedError(f"{type(self).__name__} lets tokens be given and has no complete")

    def check_given(self, given: Given, batch: int) -> None:
        """Refuse given tokens that do not fit so many sequences, or that this system's order does
        not let come first."""
        raise ValueError(
            "an image is completed by a system that draws tokens in random orders, as heptapod "
            "and 1d-random do; the order of this one is fixed"
        )

    @staticmethod
    def own_options(options: SampleOptions | None, kind: type[AnyOptions]) -> AnyOptions:
        """The options given to `sample`, or the defaults for None.

        Raises:
            TypeError: options of another system, some of which would be passed over in silence.
        """
        if options is None:
            return kind()
        if type(options) is not kind:
            raise TypeError(
                f"options are {type(options).__name__}, expected {kind.__name__}: make them with "
                "system.options(...)"
            )
        return options

    def settled(self, options: SampleOptions) -> SampleOptions:
        """Options as `sample` takes them: with what the run decides where nothing was said."""
        return options

    def place_sampling(self, classes: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """Classes and keys of the draws (default 0..B-1) on the device of the parameters."""
        device = next(self.parameters()).device
        index = torch.arange(len(classes)) if index is None else index
        return classes.to(device), index.to(device)

    def check_sampling(self, classes: Tensor, options: SampleOptions) -> None:
        """Refuse classes out of range and options that cannot be with these tokens."""
        options.check_tokens(self.spec)
        bad = classes[(classes < 0) | (classes >= self.num_classes)]
        if len(bad):
            raise ValueError(
                f"--classes {bad.tolist()}: this run has {self.num_classes} classes, 0 to "
                f"{self.num_classes - 1}"
            )
