"""Images and tokens: where training samples come from and in which order.

Names are imported when they are asked for: training on tokens needs no image library.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "Batch": "tokens",
    "Cache": "cache_format",
    "CacheError": "cache_format",
    "CacheTokens": "cache",
    "ImageFolder": "images",
    "ImageSource": "sources",
    "Logograms": "logograms",
    "SyntheticTokens": "tokens",
    "TokenSource": "tokens",
    "TokenizedImages": "tokens",
    "logogram_classes": "logograms",
    "open_cache": "cache_format",
    "sample_ids": "order",
    "write_folder": "logograms",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
