"""Caches of tokens: made once from a folder of images, then read by every training run.

format   what lies on the disk; opening a cache
plan     what a cache will hold, fixed before the first image is encoded
site     a cache under construction: who may build, what is done, the end, repairs
builder  encodes images and writes shards
making   from the settings of tools/cache.py to a finished cache, alone or on many ranks
reader   training batches: rows on the GPU, in shared memory, or streamed
check    every byte and every value of a finished cache
"""

from heptapod_fast.data.cache.format import Cache, CacheError, open_cache
from heptapod_fast.data.cache.reader import CacheTokens

__all__ = ["Cache", "CacheError", "CacheTokens", "open_cache"]
