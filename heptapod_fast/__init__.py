"""heptapod_fast: training image autoregressive models fast.

from heptapod_fast import build_system, configure, load_run
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
# Late, so that `heptapod_fast.ops` needs nothing beyond torch.
_WHERE = {
    "Config": "heptapod_fast.config",
    "build_system": "heptapod_fast.systems",
    "configure": "heptapod_fast.systems",
    "load_run": "heptapod_fast.runs",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'heptapod_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
