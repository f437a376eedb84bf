"""Operations: one file each, with the math, the plain-PyTorch reference and the dispatch.

Imports with nothing but torch (and triton where there is a GPU) and works on CPU tensors.
"""

from heptapod_fast.ops import dispatch, library
from heptapod_fast.ops.adamw_ema import adamw_ema, global_norm
from heptapod_fast.ops.attention import attention, causal_mask
from heptapod_fast.ops.bias_gelu import bias_gelu
from heptapod_fast.ops.diffusion_loss import (
    STEPS,
    add_noise,
    cosine_betas,
    diffusion_loss,
    schedule_tables,
)
from heptapod_fast.ops.dropout import Mask, dropout
from heptapod_fast.ops.gather_rows import gather_rows, scatter_rows
from heptapod_fast.ops.layer_norm import layer_norm
from heptapod_fast.ops.linear_cross_entropy import linear_cross_entropy
from heptapod_fast.ops.philox import philox4x32

__all__ = [
    "STEPS", "Mask", "adamw_ema", "add_noise", "attention", "bias_gelu", "causal_mask",
    "cosine_betas", "diffusion_loss", "dispatch", "dropout", "gather_rows", "global_norm",
    "layer_norm", "library", "linear_cross_entropy", "philox4x32", "scatter_rows",
    "schedule_tables",
]
