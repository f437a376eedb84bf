"""The configuration of one training run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from heptapod_fast.config.data import EMBEDDED, DataSettings
from heptapod_fast.config.recipe import RecipeSettings
from heptapod_fast.config.run import RunSettings
from heptapod_fast.config.settings import Settings, flag
from heptapod_fast.config.system import SystemSettings
from heptapod_fast.tokenizers import TokenSpec

# Of config.json. 1: all settings in one flat object. 2: in groups.
VERSION = 2
GROUPS: dict[str, type[Settings]] = {
    "data": DataSettings,
    "recipe": RecipeSettings,
    "run": RunSettings,
}


class BatchSplit(NamedTuple):
    """How the global batch is divided.

    share: sequences of a rank. micro_batch: sequences of one forward pass. micro_batches: forward
    passes of a rank in a step; share = micro_batch * micro_batches.
    """

    share: int
    micro_batch: int
    micro_batches: int


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is trained, on what, how, and where it is kept.

    Put together by `systems.configure` from flags, or from groups by hand; `resolve` completes it.

    Attributes:
        size: one of the sizes of the system.
        system: its name.
        data, recipe, run: groups of settings that all systems have.
        model: the system's own settings.
    """

    size: str
    system: str
    data: DataSettings
    recipe: RecipeSettings
    run: RunSettings
    model: SystemSettings

    @property
    def groups(self) -> dict[str, Settings]:
        """The groups of settings by name."""
        return {"data": self.data, "recipe": self.recipe, "run": self.run, "model": self.model}

    @property
    def spec(self) -> TokenSpec:
        """Shape and kind of the tokens, of a resolved configuration."""
        return self.data.spec

    def resolve(self) -> Config:
        """The same with every setting filled in. Resolving again changes nothing.

        Raises:
            ValueError: a setting that cannot be, or that contradicts another; names the flag.
        """
        size = self.model.size(self.size)
        data = self.data.resolve(size.data)
        recipe = self.recipe.resolve(size.recipe)
        run = self.run.resolve(size.run)
        model = self.model.resolve(size.model, data.spec)
        model.check_images(recipe.images, recipe.batch)
        return dataclasses.replace(self, data=data, recipe=recipe, run=run, model=model)

    def replace(self, **settings: Any) -> Config:
        """A copy with other values of some settings, each given by its own name.

        Raises:
            ValueError: no group has a setting of that name.
        """
        groups: dict[str, Any] = dict(self.groups)
        for name, value in settings.items():
            group = self.group_of(name)
            groups[group] = groups[group].changed({name: value})
        return dataclasses.replace(self, **groups)

    def portable(self) -> Config:
        """A copy that says nothing of the machine that it was made on, for others to read: data by
        their name, no directories."""
        groups: dict[str, Any] = {name: group.portable() for name, group in self.groups.items()}
        return dataclasses.replace(self, **groups)

    def group_of(self, name: str) -> str:
        """The group that a setting belongs to; ValueError if there is none."""
        for group, settings in self.groups.items():
            if name in settings.names():
                return group
        raise ValueError(f"{flag(name)}: there is no such setting for --system {self.system}")

    def split_batch(self, world_size: int) -> BatchSplit:
        """The batch over `world_size` ranks and into micro-batches.

        Raises:
            ValueError: it does not divide, or not into micro-batches as the system needs them;
                names --batch or --micro-batch.
        """
        batch = self.recipe.batch
        micro = self.recipe.micro_batch
        if batch % world_size:
            below = batch // world_size * world_size
            nearest = [n for n in (below, below + world_size) if n]
            raise ValueError(
                f"--batch {batch} does not divide over {world_size} ranks: the nearest are "
                f"{' and '.join(map(str, nearest))}"
            )
        share = batch // world_size
        multiple, reason = self.model.micro_batch_multiple()
        divisors = [d for d in range(1, share + 1) if share % d == 0]
        if micro is None:
            most = self.model.size(self.size).micro_batch
            fitting = [d for d in divisors if d <= most and d % multiple == 0]
            micro = max(fitting, default=share)
        if share % micro:
            by_distance = sorted(divisors, key=lambda d: abs(d - micro))
            nearest = sorted(by_distance[:2])
            raise ValueError(
                f"--micro-batch {micro} does not divide the {share} sequences of a rank: the "
                f"nearest are {' and '.join(map(str, nearest))}"
            )
        if micro % multiple:
            raise ValueError(f"a micro-batch of {micro} {reason}")
        return BatchSplit(share, micro, share // micro)

    # ---------------------------------------------------------------------------- identity, JSON

    def identity(self) -> dict[str, Any]:
        """The settings that make two runs the same run; the others may change on resuming."""
        groups = {name: group.identity() for name, group in self.groups.items()}
        return {"size": self.size, "system": self.system, **groups}

    def name(self) -> str:
        """What the run is about, in a few words, for its directory."""
        data = self.data.data if self.data.data in EMBEDDED else str(self.data.data).rstrip("/")
        words = (
            self.system,
            self.size,
            data.split("/")[-1],
            self.data.tokenizer,
            f"{self.data.image_size}px",
        )
        return "-".join(words)

    def run_dir(self) -> str:
        """--out, or a name derived from the settings."""
        if self.run.out is not None:
            return self.run.out
        text = json.dumps(self.identity(), sort_keys=True)
        return f"runs/{self.name()}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def to_json(self) -> str:
        """The settings as JSON, one a line."""
        groups = {name: dataclasses.asdict(group) for name, group in self.groups.items()}
        plain = {"version": VERSION, "size": self.size, "system": self.system, **groups}
        return json.dumps(plain, indent=1) + "\n"

    def differences(self, before: Config) -> Iterator[tuple[str, Any, Any, bool]]:
        """(setting, value now, value before, whether it may change) of settings that differ."""
        for name in ("size", "system"):
            now = getattr(self, name)
            then = getattr(before, name)
            if now != then:
                yield name, now, then, False
        if type(self.model) is not type(before.model):
            return
        for name, group in self.groups.items():
            yield from group.differences(before.groups[name])
