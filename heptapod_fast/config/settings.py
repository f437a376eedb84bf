"""What a group of settings is made of: a field with its help and its rule beside it.

    @dataclass(frozen=True, kw_only=True)
    class Recipe(Settings):
        batch: int = setting("Global batch size.", rule=at_least(1))

The field's name is its flag (`--batch`) and its key in config.json. While a configuration is being
put together, a setting that nobody gave is None; `Config.resolve` fills it in from the size, or
derives it, so that an annotation says what a resolved setting is.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

Value = TypeVar("Value")


@dataclass(frozen=True)
class Rule:
    """What a value has to be. expected: as errors say it, "at least 1"."""

    expected: str
    holds: Callable[[Any], bool]


def at_least(least: float) -> Rule:
    """least or more."""
    return Rule(f"at least {least:g}", lambda value: value >= least)


def between(least: int, most: int) -> Rule:
    """Both ends included. An upper end keeps typing errors from hanging before they fail."""
    return Rule(f"{least:,} to {most:,}", lambda value: least <= value <= most)


def more_than(bound: float) -> Rule:
    """bound itself not included."""
    return Rule(f"more than {bound:g}", lambda value: value > bound)


def share() -> Rule:
    """0 <= value < 1."""
    return Rule("0 or more, and less than 1", lambda value: 0.0 <= value < 1.0)


def distinct_shares() -> Rule:
    """A tuple of different numbers 0 <= value < 1; words, of which there may be some as well, are
    the annotation's concern."""

    def holds(values: tuple[float | str, ...]) -> bool:
        numbers = [value for value in values if not isinstance(value, str)]
        return all(0.0 <= v < 1.0 for v in numbers) and len(set(values)) == len(values)

    return Rule("different numbers of 0 or more, and less than 1", holds)


def names_among(known: tuple[str, ...]) -> Rule:
    """A text of different names separated by commas; the empty text is none of them."""

    def holds(text: str) -> bool:
        names = text.split(",") if text else []
        is_known = all(name in known for name in names)
        return is_known and len(set(names)) == len(names)

    return Rule(f"different names separated by commas, among {', '.join(known)}", holds)


def setting(
    help: str,
    *,
    default: Any = None,
    rule: Rule | None = None,
    may_change: bool = False,
    before: Any = dataclasses.MISSING,
) -> Any:
    """A field of a group of settings.

    Args:
        help: one or two sentences for `--help`.
        default: None for what follows from the size or from other settings.
        rule: what a value that is there has to be; beyond it, floats are finite, and a Literal
            annotation lists the choices.
        may_change: whether a run may be continued with another value. Changing such a setting does
            not make another model out of a run.
        before: for a setting that came later than runs which still exist: what these have, which
            their config.json does not say. With this value a run keeps the directory's name that it
            had before there was the setting.
    """
    return dataclasses.field(
        default=default,
        metadata={"help": help, "rule": rule, "may_change": may_change, "before": before},
    )


def decided(value: Value | None, name: str) -> Value:
    """A setting that `resolve` fills, for those who need it there; ValueError names its flag where
    nobody has resolved the configuration."""
    if value is None:
        raise ValueError(f"{flag(name)} is not decided: resolve the configuration first")
    return value


def flag(name: str) -> str:
    """The command-line form of a setting's name."""
    return "--" + name.replace("_", "-")


def last_part(path: str | None) -> str | None:
    """What a path names, without where it is; None for None."""
    return None if path is None else Path(os.path.abspath(path)).name


def as_typed(value: Any) -> str:
    """The command-line form of a setting's value: (0.9, 0.99) is typed as 0.9 0.99."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return str(value)


# Values come from flags, from config.json and from Python; only flags are converted on the way.
_IN_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is what an annotation says. A whole number is a number too; the choices of a
    Literal are left to `choices_of`."""
    parts = get_args(kind)
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple) or (parts[-1] is not Ellipsis and len(value) != len(parts)):
            return False
        return all(fits(part, parts[0]) for part in value)
    if NoneType in parts:
        return value is None or fits(value, _without_none(kind))
    if get_origin(kind) in (Union, UnionType):
        return any(_fits_part(value, part) for part in parts)
    if kind not in _IN_WORDS:
        return True
    if isinstance(value, bool):
        # Python counts True as 1.
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _fits_part(value: Any, part: Any) -> bool:
    """Whether a value is one of the words of a Literal, or what another annotation says."""
    return value in get_args(part) if get_origin(part) is Literal else fits(value, part)


def in_words(kind: Any) -> str:
    """What an annotation asks for, as errors say it."""
    kind = _without_none(kind)
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(in_words(part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    if get_origin(kind) is tuple:
        return f"a tuple, each part {in_words(get_args(kind)[0])}"
    return _IN_WORDS[kind]


def _without_none(kind: Any) -> Any:
    """int for `int | None`, and for int."""
    if NoneType not in get_args(kind):
        return kind
    return next(part for part in get_args(kind) if part is not NoneType)


def _is_tuple(kind: Any) -> bool:
    """Whether an annotation is of tuples, with or without None."""
    return get_origin(_without_none(kind)) is tuple


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A group of settings."""

    def check(self) -> None:
        """Every value against its annotation, its choices and its rule.

        Raises:
            ValueError: names the flag, what was found and what is expected.
        """
        kinds = type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                self._check_value(field, kinds[field.name], value)

    def _check_value(self, field: dataclasses.Field, kind: Any, value: Any) -> None:
        if not fits(value, kind):
            raise ValueError(f"{flag(field.name)} {value!r}: expected {in_words(kind)}")
        what = f"{flag(field.name)} {as_typed(value)}"
        choices = choices_of(type(self), field.name)
        if choices and value not in choices:
            raise ValueError(f"{what}: expected one of {', '.join(choices)}")
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise ValueError(f"{what}: expected a finite number")
        rule: Rule | None = field.metadata["rule"]
        if rule is not None and not rule.holds(value):
            raise ValueError(f"{what}: expected {rule.expected}")

    def refuse(self, names: tuple[str, ...], why: str) -> None:
        """ValueError if one of these settings was given; why: the end of the sentence."""
        for name in names:
            value = getattr(self, name)
            if value is not None:
                raise ValueError(f"{flag(name)} {value} {why}")

    def filled(self, defaults: Self) -> Self:
        """Settings that were not given are those of `defaults`."""
        missing = {
            field.name: getattr(defaults, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) is None
        }
        return self.changed(missing)

    def without(self, *names: str) -> Self:
        """A copy in which these settings were not given."""
        return self.changed(dict.fromkeys(names))

    def changed(self, values: Mapping[str, Any]) -> Self:
        """A copy with other values of the settings named."""
        return dataclasses.replace(self, **values)

    def portable(self) -> Self:
        """A copy that says nothing of the machine: of paths it has the last part, or nothing."""
        return self

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of the settings."""
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> Self:
        """From what JSON made of the settings.

        Raises:
            ValueError: names that are not known, or settings that are missing.
        """
        unknown = sorted(set(values) - set(cls.names()))
        if unknown:
            raise ValueError(f"settings that this version does not know: {', '.join(unknown)}")
        kinds = type_hints(cls)
        values = cls._earlier() | values
        missing = [
            name
            for name in cls.names()
            if values.get(name) is None and type(None) not in get_args(kinds[name])
        ]
        if missing:
            raise ValueError(f"it does not say {', '.join(missing)}: restore it from a copy")
        # JSON has lists alone.
        restored = {
            name: tuple(value) if isinstance(value, list) and _is_tuple(kinds[name]) else value
            for name, value in values.items()
        }
        return cls(**restored)

    @classmethod
    def _earlier(cls) -> dict[str, Any]:
        """What settings are that a config.json may lack: its version did not know them, or they
        have a default."""
        found = {}
        for field in dataclasses.fields(cls):
            before = field.metadata["before"]
            found[field.name] = field.default if before is dataclasses.MISSING else before
        return found

    def differences(self, before: Self) -> Iterator[tuple[str, Any, Any, bool]]:
        """(name, value now, value before, whether it may change) of settings that differ."""
        for field in dataclasses.fields(self):
            now = getattr(self, field.name)
            then = getattr(before, field.name)
            if now != then:
                yield field.name, now, then, field.metadata["may_change"]

    def identity(self) -> dict[str, Any]:
        """The settings that make two runs the same run; those that came later are left out where
        they are as before."""
        found = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not field.metadata["may_change"] and value != field.metadata["before"]:
                found[field.name] = value
        return found


def type_hints(group: type[Settings]) -> dict[str, Any]:
    """Annotations of a group, resolved."""
    return get_type_hints(group)


def choices_of(group: type[Settings], name: str) -> tuple[str, ...]:
    """The names that a setting may take; () where it is not one of a few."""
    kind = type_hints(group)[name]
    for part in (kind, *get_args(kind)):
        if get_origin(part) is Literal:
            return get_args(part)
    return ()
