"""Drawing codes from logits. Suffixes: R rows, V codes."""

from __future__ import annotations

import torch
from torch import Tensor

from heptapod_fast.sampling.options import SampleOptions


def sample_codes(
    logits_RV: Tensor, uniform_R: Tensor, options: SampleOptions
) -> tuple[Tensor, Tensor]:
    """Draw one code per row by inverse transform: the first whose cumulative probability passes u.

    Args:
        logits_RV: float32.
        uniform_R: in (0, 1).
        options: temperature (0 takes the likeliest code), top_k and top_p.

    Returns:
        codes (R,) int64, and their probabilities (R,).
    """
    if options.temperature == 0:
        probability_RV = logits_RV.softmax(-1)
        return probability_RV.argmax(-1), probability_RV.amax(-1)
    probability_RV = restrict(logits_RV / options.temperature, options).softmax(-1)
    total_RV = probability_RV.double().cumsum(-1)
    threshold_R1 = uniform_R.double()[:, None] * total_RV[:, -1:]
    code_R = torch.searchsorted(total_RV, threshold_R1, right=True).squeeze(-1)
    # A threshold that was rounded up to the total passes the last code.
    code_R = code_R.clamp(max=logits_RV.shape[-1] - 1)
    return code_R, probability_RV.gather(-1, code_R[:, None]).squeeze(-1)


def restrict(logits_RV: Tensor, options: SampleOptions) -> Tensor:
    """Top-k, then top-p (the code that crosses P is kept): others get -inf."""
    if options.top_k:
        least_R1 = logits_RV.topk(options.top_k, dim=-1).values[:, -1:]
        logits_RV = logits_RV.masked_fill(logits_RV < least_R1, float("-inf"))
    if options.top_p < 1:
        sorted_RV, index_RV = logits_RV.sort(dim=-1, descending=True)
        probability_RV = sorted_RV.softmax(-1)
        before_RV = probability_RV.cumsum(-1) - probability_RV
        drop_RV = before_RV >= options.top_p
        dropped_RV = torch.empty_like(drop_RV).scatter_(-1, index_RV, drop_RV)
        logits_RV = logits_RV.masked_fill(dropped_RV, float("-inf"))
    return logits_RV
