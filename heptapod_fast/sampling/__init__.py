"""Sampling: the key-value cache and the samplers of single tokens. Systems call these."""

from heptapod_fast.sampling.kv_cache import KVCache
from heptapod_fast.sampling.samplers import SampleOptions, sample_codes, sample_vectors

__all__ = ["KVCache", "SampleOptions", "sample_codes", "sample_vectors"]
