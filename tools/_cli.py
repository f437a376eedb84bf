"""What the command lines share: flags from groups of settings, and errors without a traceback.

tyro makes a command line of a dataclass: a field is a flag, its annotation says what may follow it,
its docstring is the help. Which flags train.py and sample.py have depends on the system, so that
their dataclasses are made when the tool runs: `group_of_flags` makes one group of such a dataclass,
_training.py and _sampling.py put the groups together. Their docstrings show what comes out.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import io
import os
import sys
from collections.abc import Callable, Container, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

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
from heptapod_fast.config.settings import as_typed, type_hints  # noqa: E402
from heptapod_fast.launchers import find_ranks  # noqa: E402


def parse(target: Callable[..., Any], argv: list[str] | None = None) -> Any:
    """An object of a dataclass from its command line, with bare `--flag` and `--no-flag` for
    switches. Ends the process after --help, and after an error, which it shows."""
    argv = sys.argv[1:] if argv is None else argv
    # A setting's name is its flag in whichever group it is (--batch, not --recipe.batch), and
    # switches take a value, which `spell_out_switches` adds.
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff)
    argv = spell_out_switches(argv, set(switches(target)))
    return tyro.cli(target, args=argv, config=config, console_outputs=rank() == 0)


def switches(target: Any) -> Iterator[str]:
    """The settings of a dataclass, and of the groups in it, that are on or off, as typed after --:
    "allow-upscale"."""
    kinds = get_type_hints(target)
    for field in dataclasses.fields(target):
        kind = kinds[field.name]
        if dataclasses.is_dataclass(kind):
            yield from switches(kind)
        elif kind is bool or set(get_args(kind)) == {bool, NoneType}:
            yield field.name.replace("_", "-")


def spell_out_switches(argv: list[str], names: Container[str]) -> list[str]:
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


def group_of_flags(group: type[Settings], defaults: Settings | None = None) -> Any:
    """A dataclass of the settings of a group in which none is given by default: what comes back
    not None was on the command line.

        class RecipeSettings(Settings):
            batch: int = setting("Global batch size.", rule=at_least(1))

    becomes

        @dataclass(kw_only=True)
        class RecipeSettings:
            batch: Annotated[
                int | None,
                arg(help="Global batch size.", metavar="INT", help_behavior_hint="(default: 64)"),
            ] = None

    defaults: what `--help` shows as such; the values themselves stay None.
    """
    fields = []
    for field in dataclasses.fields(group):
        kind = type_hints(group)[field.name]
        default = field.default if defaults is None else getattr(defaults, field.name)
        shown = "" if default is None else f"(default: {_shown(default)})"
        about = tyro.conf.arg(
            help=field.metadata["help"], help_behavior_hint=shown, metavar=_metavar(kind)
        )
        fields.append((field.name, Annotated[kind | None, about], dataclasses.field(default=None)))
    made = dataclasses.make_dataclass(group.__name__, fields, kw_only=True)
    made.__doc__ = (group.__doc__ or "").split("\n")[0]
    return made


def _shown(default: Any) -> str:
    """A default as it would be typed."""
    return as_typed(default) or "none"


def _metavar(kind: Any) -> str | None:
    """What stands for a value in --help; None for tyro's own words."""
    for part in (kind, *get_args(kind)):
        if get_origin(part) is Literal:
            return f"{{{','.join(get_args(part))}}}"
        if part is bool:
            return "(or --no-...)"
        if get_origin(part) is tuple:
            return f"{_word(get_args(part)[0])}..."
        if part in (int, float, str):
            return part.__name__.upper()
    return None


def _word(kind: Any) -> str:
    """FLOAT, or FLOAT|post-hoc where words may stand among numbers."""
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if get_args(kind):
        return "|".join(_word(part) for part in get_args(kind))
    return kind.__name__.upper()


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
    """The value of one flag, before the others are parsed: they depend on it. Of a flag that is
    there twice, the last one counts, as for tyro."""
    value = default
    for word, after in pairwise([*argv, ""]):
        if word.startswith(f"{flag(name)}="):
            value = word.split("=", 1)[1]
        elif word == flag(name) and after:
            value = after
    return value


def find_flag(
    argv: list[str], names: Iterable[str], switch_names: Container[str]
) -> tuple[str, str] | None:
    """The first flag of one of these settings, also as --no-NAME.

    Args:
        names: of settings.
        switch_names: those among them that are on or off, as from `switches`.

    Returns:
        (setting, its value as typed); None if none of them is there.
    """
    by_flag = {flag(name): name for name in names}
    words = spell_out_switches(argv, switch_names)
    for word, after in pairwise([*words, ""]):
        spelt, equals, value = word.partition("=")
        name = by_flag.get(spelt.replace("_", "-"))
        if name is not None:
            return name, value if equals else after
    return None


# ------------------------------------------------------------------------------------- a command


def rank() -> int:
    """The number of this process among those that were started together; 0 for one alone, and
    where that cannot be known, which those who train or sample together will refuse."""
    try:
        return find_ranks().rank
    except ValueError:
        return 0


@contextlib.contextmanager
def alike_on_all_ranks() -> Iterator[None]:
    """Around what every rank finds alike, as errors in the command line: rank 0 says it for all."""
    try:
        yield
    except ValueError:
        if rank() > 0:
            sys.exit(1)
        raise


def main(work: Callable[[], int | None]) -> None:
    """Run a command: known errors become one line on stderr and exit code 1. Under torchrun, a rank
    that stops because of another one says nothing."""
    from heptapod_fast.checkpoints import CheckpointError
    from heptapod_fast.ops.dispatch import Unavailable
    from heptapod_fast.runs import RunError
    from heptapod_fast.world import LostRank, OtherRankFailed

    if isinstance(sys.stdout, io.TextIOWrapper):
        # What this terminal or file cannot show, as names of files, is escaped: no error.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = work()
    except BrokenPipeError:  # the output went to `head` or the like
        sys.stderr.close()
        code = 141
    except (ValueError, OSError, RunError, CheckpointError, Unavailable, LostRank) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except OtherRankFailed:
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
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted before there was anything to save", file=sys.stderr)
        code = 130
    leave(code or 0)


def leave(code: int) -> NoReturn:
    """End the process.

    One of several ranks does so without Python's own clearing up: a thread of gloo may let go of a
    tensor late, wants Python for that, and Python, while it ends, ends such a thread in a way that
    aborts the process. The work would be done and the command would fail.
    """
    from heptapod_fast import world as worlds

    if not worlds.has_joined:
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a pipe that nobody reads, or closed
            stream.flush()
    os._exit(code)
