"""heptapod_fast: training image autoregressive models fast.

from heptapod_fast import Config, build_system, load_run
"""

from __future__ import annotations

from typing import Any

from heptapod_fast.config import Config

__version__ = "0.1.0"
__all__ = ["Config", "build_system", "load_run"]


def __getattr__(name: str) -> Any:
    # Late, so that `heptapod_fast.ops` needs nothing beyond torch.
    if name == "build_system":
        from heptapod_fast.systems import build_system

        return build_system
    if name == "load_run":
        from heptapod_fast.runs import load_run

        return load_run
    raise AttributeError(f"module 'heptapod_fast' has no attribute {name!r}")
