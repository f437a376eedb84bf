"""Images and tokens: where training samples come from and in which order.

Caches of tokens are in `heptapod_fast.data.cache`. Image libraries are imported where they are
used: training on tokens needs none.
"""

from heptapod_fast.data.embedded import EMBEDDED_SETS, EmbeddedImages, embedded_images
from heptapod_fast.data.images import ImageFolder
from heptapod_fast.data.logograms import Logograms, logogram_classes, write_folder
from heptapod_fast.data.order import sample_ids
from heptapod_fast.data.pairs import Pairs
from heptapod_fast.data.sources import ImageSource
from heptapod_fast.data.tokens import Batch, SyntheticTokens, TokenizedImages, TokenSource

__all__ = [
    "EMBEDDED_SETS",
    "Batch",
    "EmbeddedImages",
    "ImageFolder",
    "ImageSource",
    "Logograms",
    "Pairs",
    "SyntheticTokens",
    "TokenSource",
    "TokenizedImages",
    "embedded_images",
    "logogram_classes",
    "sample_ids",
    "write_folder",
]
