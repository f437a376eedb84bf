"""Matrix products with float32 results from bfloat16 factors: weight gradients.

cuBLAS accumulates in float32 anyway; asking for that result saves a rounding and the pass that
would convert it. PyTorch offers it on CUDA alone; elsewhere (tests) the factors are converted.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mm_float(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """a @ b in float32; a and b of one dtype, float32 or bfloat16."""
    if a_MK.is_cuda and a_MK.dtype != torch.float32:
        return torch.mm(a_MK, b_KN, out_dtype=torch.float32)
    return a_MK.float() @ b_KN.float()


def addmm_float_(total_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
    """total += a @ b in place, inside the product; total float32 contiguous."""
    if a_MK.is_cuda and a_MK.dtype != torch.float32:
        torch.ops.aten.addmm.dtype_out(total_MN, a_MK, b_KN, torch.float32, out=total_MN)
    else:
        total_MN.addmm_(a_MK.float(), b_KN.float())
