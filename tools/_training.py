"""The flags of training, which depend on --system and --size: for train.py and profile.py."""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated, Any, Literal

from _cli import find_flag, given, group_of_flags, parse, peek, switches, tyro

from heptapod_fast.config import Config, DataSettings, RecipeSettings, RunSettings, Settings, Size
from heptapod_fast.config.reading import foreign, settings_class
from heptapod_fast.systems import DEFAULT, draft, settings_registry


def parse_training(own: type, argv: list[str] | None = None) -> tuple[Any, Config]:
    """The flags of a tool and a configuration.

    Args:
        own: a dataclass of the flags that only this tool has; its docstring is for --help.

    Returns:
        (an object with the fields of `own`, the configuration, not resolved).

    Raises:
        ValueError: a system that there is not, or a flag of another system.
    """
    argv = sys.argv[1:] if argv is None else argv
    system = peek(argv, "system", DEFAULT)
    model = settings_class(system, settings_registry())
    size = model.SIZES.get(peek(argv, "size", ""))
    _refuse_foreign(argv, system)
    parsed = parse(_arguments(own, system, size), argv)
    groups = (parsed.data, parsed.recipe, parsed.run, parsed.model)
    flags = {name: value for group in groups for name, value in given(group).items()}
    return parsed, draft(parsed.size, parsed.system, **flags)


def _arguments(own: type, system: str, size: Size | None) -> type:
    """A dataclass of everything that can be on the command line, in groups.

    For train.py and --system heptapod it is as if this had been written:

        @dataclass(kw_only=True)
        class Arguments(own):                          # --dry-run
            size: Literal["tiny", "B", "L", "H"]
            system: Literal["heptapod", "1d-raster", ...] = "heptapod"
            data: DataSettings                         # --data, --tokenizer, ...
            recipe: RecipeSettings                     # --images, --batch, ...
            run: RunSettings                           # --out, --minutes, ...
            model: HeptapodSettings                    # --width, --head, ...

    where DataSettings stands for what `group_of_flags` makes of that class, and so on. size: whose
    defaults --help shows; None where --size is missing or there is no such size.
    """
    model = settings_registry()[system]
    sizes: Any = Literal[tuple(model.SIZES)]
    systems: Any = Literal[tuple(settings_registry())]
    about_size = tyro.conf.arg(help="Preset: model, tokenizer, data and recipe follow from it.")
    about_system = tyro.conf.arg(help="What is trained; its own flags are listed below.")
    fields: list[Any] = [
        ("size", Annotated[sizes, about_size]),
        ("system", Annotated[systems, about_system], dataclasses.field(default=system)),
        _group("data", DataSettings, size.data if size else None),
        _group("recipe", RecipeSettings, size.recipe if size else None),
        _group("run", RunSettings, size.run if size else None),
        _group("model", model, size.model if size else None, title=system),
    ]
    made = dataclasses.make_dataclass("Arguments", fields, bases=(own,), kw_only=True)
    made.__doc__ = own.__doc__
    return made


def _group(
    name: str, group: type[Settings], defaults: Settings | None, title: str | None = None
) -> tuple[str, Any, Any]:
    """A field of `_arguments`: (name, annotation, field).

    defaults: the size's; None for those that hold for all sizes alone. title: of the group in
    --help, default its name.
    """
    for_all_sizes = group()
    shown = for_all_sizes if defaults is None else defaults.filled(for_all_sizes)
    flags = group_of_flags(group, shown)
    about = tyro.conf.arg(name=title or name)
    return name, Annotated[flags, about], dataclasses.field(default_factory=flags)


def _refuse_foreign(argv: list[str], system: str) -> None:
    """ValueError for a flag that only other systems have: with the reason, not as unknown."""
    registry = settings_registry()
    ours = registry[system].names()
    names = {name for other in registry.values() for name in other.names() if name not in ours}
    switch_names = {name for other in registry.values() for name in switches(other)}
    found = find_flag(argv, names, switch_names)
    if found is not None:
        raise ValueError(foreign(registry, system, *found))
