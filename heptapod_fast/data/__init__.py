"""Images and tokens: where training samples come from and in which order.

Caches of tokens are in `heptapod_fast.data.cache`. Image libraries are imported where they are
used: training on tokens needs none.
"""

from heptapod_fast.data.images import ImageFolder
from heptapod_fast.data.logograms import Logograms, logogram_classes, write_folder
from heptapod_fast.data.order import sample_ids
from heptapod_fast.data.sources import ImageSource
from heptapod_fast.data.tokens import Batch, SyntheticTokens, TokenizedImages, TokenSource

__all__ = [
    "Batch",
    "ImageFolder",
    "ImageSource",
    "Logograms",
    "SyntheticTokens",
    "TokenSource",
    "TokenizedImages",
    "logogram_classes",
    "sample_ids",
    "write_folder",
]
