"""heptapod_fast: training image autoregressive models fast.

from heptapod_fast import build_system, configure, load_run
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heptapod_fast.config import Config
    from heptapod_fast.runs import load_run
    from heptapod_fast.systems import build_system, configure

__version__ = "0.1.0"
__all__ = ["Config", "build_system", "configure", "load_run"]
# Imported when they are first asked for, so that `heptapod_fast.ops` needs nothing beyond torch.
_WHERE = {
    "Config": "heptapod_fast.config",
    "build_system": "heptapod_fast.systems",
    "configure": "heptapod_fast.systems",
    "load_run": "heptapod_fast.runs",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'heptapod_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
