"""Sampling: the key-value cache, options, given tokens, and the samplers of single tokens."""

from heptapod_fast.sampling.codes import sample_codes
from heptapod_fast.sampling.completion import Given
from heptapod_fast.sampling.diffusion import Denoiser, respaced, respaced_on
from heptapod_fast.sampling.flow import FLOW_STEPS, Path
from heptapod_fast.sampling.kv_cache import KVCache
from heptapod_fast.sampling.options import DIFFUSION_STEPS, SampleOptions

__all__ = [
    "DIFFUSION_STEPS",
    "FLOW_STEPS",
    "Denoiser",
    "Given",
    "KVCache",
    "Path",
    "SampleOptions",
    "respaced",
    "respaced_on",
    "sample_codes",
]
