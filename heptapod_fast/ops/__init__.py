"""Operations: one file each, with the math, the plain-PyTorch reference and the dispatch.

Imports with nothing but torch (and triton where there is a GPU) and works on CPU tensors.
"""

from heptapod_fast.ops import dispatch, library
from heptapod_fast.ops.adaln import adaln
from heptapod_fast.ops.adamw_ema import adamw_ema
from heptapod_fast.ops.attention import (
    attention,
    attention_limits,
    attention_shares,
    causal_mask,
    cross_attention,
    watched_attention,
    with_cache,
)
from heptapod_fast.ops.bias_gelu import bias_gelu
from heptapod_fast.ops.diffusion_loss import diffusion_inputs, diffusion_loss
from heptapod_fast.ops.diffusion_mlp import diffusion_mlp
from heptapod_fast.ops.diffusion_schedule import STEPS, add_noise, cosine_betas, schedule_tables
from heptapod_fast.ops.diffusion_weights import BlockWeights, DiffusionWeights
from heptapod_fast.ops.dropout import dropout
from heptapod_fast.ops.dropout_mask import DropoutMask
from heptapod_fast.ops.flow_loss import flow_inputs, flow_loss
from heptapod_fast.ops.gather_rows import gather_rows, scatter_rows
from heptapod_fast.ops.global_norm import global_norm
from heptapod_fast.ops.layer_norm import add_layer_norm, layer_norm
from heptapod_fast.ops.linear_cross_entropy import linear_cross_entropy
from heptapod_fast.ops.masks import CAUSAL, FULL, AttentionMask, Causal, Ends, Full, Visible
from heptapod_fast.ops.philox import Draws, philox4x32
from heptapod_fast.ops.rms_norm import add_rms_norm, rms_norm
from heptapod_fast.ops.rotary import grid_table, rotary
from heptapod_fast.ops.swiglu import swiglu

__all__ = [
    "CAUSAL",
    "FULL",
    "STEPS",
    "AttentionMask",
    "BlockWeights",
    "Causal",
    "DiffusionWeights",
    "Draws",
    "DropoutMask",
    "Ends",
    "Full",
    "Visible",
    "adaln",
    "adamw_ema",
    "add_layer_norm",
    "add_noise",
    "add_rms_norm",
    "attention",
    "attention_limits",
    "attention_shares",
    "bias_gelu",
    "causal_mask",
    "cosine_betas",
    "cross_attention",
    "diffusion_inputs",
    "diffusion_loss",
    "diffusion_mlp",
    "dispatch",
    "dropout",
    "flow_inputs",
    "flow_loss",
    "gather_rows",
    "global_norm",
    "grid_table",
    "layer_norm",
    "library",
    "linear_cross_entropy",
    "philox4x32",
    "rms_norm",
    "rotary",
    "scatter_rows",
    "schedule_tables",
    "swiglu",
    "watched_attention",
    "with_cache",
]
