"""--recompute: activations that the backward pass makes again instead of keeping them.

    off        everything that the backward pass reads is kept
    selective  of every unit its inputs, its products and attention where a kernel computes it are
               kept; norms, residual sums, activations and dropout are made again, and attention
               where it is plain matmuls, whose matrices grow with the square of the length
               (Korthikanti et al., arXiv:2205.05198, section 5)
    full       of every unit its inputs alone are kept

A unit is what `System.units` names: a block. Losses and gradients are the same bits in every mode:
the same operations run again on the same values, and all randomness is a function of keys among
the inputs. `train/memory.py` chooses the mode where nobody does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from heptapod_fast.systems import System

# The mode that needs least time first, the one that needs least memory last.
MODES = ("off", "selective", "full")

_aten = torch.ops.aten
# Operations whose results `selective` keeps: what most of a unit's time goes into. bmm is not among
# them: it is the attention of plain matmuls.
KEPT = (
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.heptapod_fast.attention.default,
    torch.ops.heptapod_fast.cross_attention.default,
)


def apply(system: System, mode: str) -> None:
    """Make the units of a system recompute, once.

    A unit stays the module that it is: names of parameters do not change, hooks of the unit and
    what wraps it afterwards (fully_shard, DDP) act outside of the recomputation, which finds the
    parameters that the hooks have put in place.

    Raises:
        ValueError: a mode that there is not.
    """
    if mode not in MODES:
        raise ValueError(f"--recompute {mode}: expected one of {', '.join(MODES)}")
    if mode == "off":
        return
    # There is no generator whose state could matter: all draws are keyed.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        contexts = functools.partial(create_selective_checkpoint_contexts, list(KEPT))
        options["context_fn"] = contexts
    for unit in system.units():
        # Of the instance: Module.__call__ finds it before that of the class.
        unit.forward = functools.partial(_recomputed, unit.forward, options)


def _recomputed(
    forward: Callable[..., Any], options: dict[str, Any], /, *args: Any, **kwargs: Any
) -> Any:
    """forward(*args, **kwargs), whose activations the backward pass makes again."""
    if not torch.is_grad_enabled():
        # While sampling nothing is kept anyway.
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, **options, **kwargs)
