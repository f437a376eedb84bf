"""What the command lines share: parsing with tyro, and errors without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The folder of a script comes first in sys.path, where profile.py would stand in for the standard
# library's module of that name (which torch imports): it goes to the end.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != _HERE] + [str(_HERE)]

import tyro  # noqa: E402


def parse(target: Callable[..., Any], argv: list[str] | None = None, **options: Any) -> Any:
    """tyro's command line for a dataclass, with bare `--flag` and `--no-flag` for switches."""
    argv = sys.argv[1:] if argv is None else argv
    return tyro.cli(target, args=switches(argv), config=(tyro.conf.FlagConversionOff,), **options)


SWITCHES = ("flip", "allow-upscale", "allow-data-change", "dry-run")


def switches(argv: list[str]) -> list[str]:
    """Rewrite bare switches as `--flag True` and `--no-flag` as `--flag False`."""
    out = []
    for i, word in enumerate(argv):
        name = word.removeprefix("--").removeprefix("no-").replace("_", "-")
        bare = i + 1 == len(argv) or argv[i + 1] not in ("True", "False", "None")
        if word.startswith("--") and name in SWITCHES and bare:
            out += [f"--{name}", str(not word.startswith("--no-"))]
        else:
            out.append(word)
    return out


def main(work: Callable[[], int | None]) -> None:
    """Run a command: known errors become one line on stderr and exit code 1."""
    from heptapod_fast.ops.dispatch import Unavailable
    from heptapod_fast.runs import RunError
    from heptapod_fast.train.checkpoint import CheckpointError

    try:
        code = work()
    except (ValueError, OSError, RunError, CheckpointError, Unavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
            raise
        print(
            f"error: out of memory ({str(error).splitlines()[0][:200]}): lower --micro-batch or "
            "--batch, or choose a smaller --size",
            file=sys.stderr,
        )
        code = 1
    except KeyboardInterrupt:
        print("interrupted before there was anything to save", file=sys.stderr)
        code = 130
    sys.exit(code)
