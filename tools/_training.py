"""The flags of training, which depend on --system and --size: for train.py and profile.py."""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated, Any, Literal, get_type_hints

from _cli import given, group_of_flags, parse, peek, tyro

from heptapod_fast.config import Config, DataSettings, RecipeSettings, RunSettings, Size, flag
from heptapod_fast.config.reading import foreign, settings_class
from heptapod_fast.systems import DEFAULT, draft, settings_registry


def parse_training(
    own: type, description: str, argv: list[str] | None = None
) -> tuple[Any, Config]:
    """The flags of a tool and a configuration.

    Args:
        own: a dataclass of the flags that only this tool has.
        description: for --help.

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
    parsed = parse(_arguments(own, description, system, size), argv)
    groups = (parsed.data, parsed.recipe, parsed.run, parsed.model)
    flags = {name: value for group in groups for name, value in given(group).items()}
    return parsed, draft(parsed.size, parsed.system, **flags)


def _arguments(own: type, description: str, system: str, size: Size | None) -> type:
    """A dataclass of everything that can be on the command line, in groups."""
    model = settings_registry()[system]
    groups = {
        "data": (DataSettings, size and size.data),
        "recipe": (RecipeSettings, size and size.recipe),
        "run": (RunSettings, size and size.run),
        "model": (model, size and size.model),
    }
    sizes: Any = Literal[tuple(model.SIZES)]
    systems: Any = Literal[tuple(settings_registry())]
    about_size = tyro.conf.arg(help="Preset: model, tokenizer, data and recipe follow from it.")
    about_system = tyro.conf.arg(help="What is trained; its own flags are listed below.")
    fields: list[Any] = [
        ("size", Annotated[sizes, about_size]),
        ("system", Annotated[systems, about_system], dataclasses.field(default=system)),
    ]
    for field in dataclasses.fields(own):
        about = tyro.conf.arg(help=field.metadata["help"])
        kind = get_type_hints(own)[field.name]
        fields.append(
            (field.name, Annotated[kind, about], dataclasses.field(default=field.default))
        )
    for name, (group, defaults) in groups.items():
        made = group_of_flags(group, _static_defaults(group, defaults))
        # The group's title in --help.
        title = tyro.conf.arg(name=system if name == "model" else name)
        fields.append((name, Annotated[made, title], dataclasses.field(default_factory=made)))
    made = dataclasses.make_dataclass("Arguments", fields, kw_only=True)
    made.__doc__ = description
    return made


def _static_defaults(group: type, defaults: Any) -> Any:
    """The size's defaults, completed by those that hold for all sizes."""
    return group() if defaults is None else defaults.filled(group())


def _refuse_foreign(argv: list[str], system: str) -> None:
    """A flag that only other systems have, with the reason rather than as unknown."""
    registry = settings_registry()
    ours = {flag(name) for name in registry[system].names()}
    others = {flag(name): name for other in registry.values() for name in other.names()}
    for i, word in enumerate(argv):
        spelt, _, value = word.replace("_", "-").partition("=")
        if spelt in others and spelt not in ours:
            shown = value or (argv[i + 1] if i + 1 < len(argv) else "")
            raise ValueError(foreign(registry, system, others[spelt], shown))
