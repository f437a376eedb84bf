"""What the command lines share: flags from groups of settings, and errors without a traceback."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

# The folder of a script comes first in sys.path, where profile.py would stand in for the standard
# library's module of that name (which torch imports): it goes to the end.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != _HERE] + [str(_HERE)]


def need(module: str, package: str = "") -> Any:
    """Import a package that a command line cannot do without; ends with what to do otherwise."""
    try:
        return __import__(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        sys.exit(
            f"error: {package or module} is not installed for {sys.executable}.\n"
            "After `make demo` or `make venv`: source .venv/bin/activate   (or call "
            ".venv/bin/python instead of python)\n"
            f"Otherwise: pip install {package or module}, or all of it: pip install -e ."
        )


need("torch")
tyro = need("tyro")

from heptapod_fast.config import Settings, flag  # noqa: E402
from heptapod_fast.config.settings import type_hints  # noqa: E402


def parse(target: Callable[..., Any], argv: list[str] | None = None, **options: Any) -> Any:
    """tyro's command line for a dataclass, with bare `--flag` and `--no-flag` for switches."""
    argv = sys.argv[1:] if argv is None else argv
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff)
    argv = spell_out_switches(argv, set(switches(target)))
    return tyro.cli(target, args=argv, config=config, **options)


def switches(target: Any) -> Iterable[str]:
    """Names of the settings of a dataclass, and of the groups in it, that are on or off."""
    for field in dataclasses.fields(target):
        kind = field.type
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        if dataclasses.is_dataclass(kind):
            yield from switches(kind)
        elif kind in (bool, "bool") or set(get_args(kind)) == {bool, NoneType}:
            yield field.name.replace("_", "-")


def spell_out_switches(argv: list[str], names: set[str]) -> list[str]:
    """Rewrite bare switches as `--flag True` and `--no-flag` as `--flag False`."""
    words = []
    for i, word in enumerate(argv):
        name = word.removeprefix("--").removeprefix("no-").replace("_", "-")
        is_bare = i + 1 == len(argv) or argv[i + 1] not in ("True", "False", "None")
        if word.startswith("--") and name in names and is_bare:
            is_on = not word.startswith("--no-")
            words += [f"--{name}", str(is_on)]
        else:
            words.append(word)
    return words


# -------------------------------------------------------------------------- groups of settings


def group_of_flags(
    group: type[Settings], defaults: Settings | None = None, name: str | None = None
) -> Any:
    """A dataclass of the settings of a group in which none is given by default: what comes back
    not None was on the command line. defaults: what `--help` shows as such."""
    fields = []
    for field in dataclasses.fields(group):
        kind = type_hints(group)[field.name]
        default = field.default if defaults is None else getattr(defaults, field.name)
        shown = "" if default is None else f"(default: {_shown(default)})"
        about = tyro.conf.arg(
            help=field.metadata["help"], help_behavior_hint=shown, metavar=_metavar(kind)
        )
        fields.append((field.name, Annotated[kind | None, about], dataclasses.field(default=None)))
    made = dataclasses.make_dataclass(name or group.__name__, fields, kw_only=True)
    made.__doc__ = (group.__doc__ or "").split("\n")[0]
    return made


def _shown(default: Any) -> str:
    """A default as it would be typed."""
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    return str(default) if default != "" else "none"


def _metavar(kind: Any) -> str | None:
    """What stands for a value in --help; None for tyro's own words."""
    for part in (kind, *get_args(kind)):
        if get_origin(part) is Literal:
            return f"{{{','.join(get_args(part))}}}"
        if part is bool:
            return "(or --no-...)"
        if get_origin(part) is tuple:
            return f"{get_args(part)[0].__name__.upper()}..."
        if part in (int, float, str):
            return part.__name__.upper()
    return None


def given(parsed: Any) -> dict[str, Any]:
    """{setting: value} of all groups in what was parsed, without those that were not given."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(parsed):
        value = getattr(parsed, field.name)
        if dataclasses.is_dataclass(value):
            values |= given(value)
        elif value is not None:
            values[field.name] = value
    return values


def peek(argv: list[str], name: str, default: str) -> str:
    """The value of one flag, before the others are parsed: they depend on it."""
    for i, word in enumerate(argv):
        if word.startswith(f"{flag(name)}="):
            return word.split("=", 1)[1]
        if word == flag(name) and i + 1 < len(argv):
            return argv[i + 1]
    return default


# ------------------------------------------------------------------------------------- a command


def main(work: Callable[[], int | None]) -> None:
    """Run a command: known errors become one line on stderr and exit code 1."""
    from heptapod_fast.checkpoints import CheckpointError
    from heptapod_fast.ops.dispatch import Unavailable
    from heptapod_fast.runs import RunError

    try:
        code = work()
    except BrokenPipeError:  # the output went to `head` or the like
        sys.stderr.close()
        code = 141
    except (ValueError, OSError, RunError, CheckpointError, Unavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except ModuleNotFoundError as error:
        need(str(error.name))
        raise
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
            raise
        why = str(error).split("\n")[0][:200] or type(error).__name__
        print(
            f"error: out of memory ({why}): lower --micro-batch or --batch, or choose a smaller "
            "--size",
            file=sys.stderr,
        )
        code = 1
    except KeyboardInterrupt:
        print("interrupted before there was anything to save", file=sys.stderr)
        code = 130
    sys.exit(code)
