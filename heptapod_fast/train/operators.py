"""Which implementation runs each operation of a run: decided once, and handed on from there."""

from __future__ import annotations

from typing import NamedTuple

import torch

from heptapod_fast import ops
from heptapod_fast.config import Config
from heptapod_fast.ops.dispatch import Operators, Unavailable, choose, operations
from heptapod_fast.ops.linear_cross_entropy import passed_over
from heptapod_fast.world import choose_precision


class _Wish(NamedTuple):
    """One operation: the flag that decides about it, what that says, and for which tensors."""

    flag: str
    asked: str
    operation: str
    dtype: torch.dtype
    limits: dict[str, str | None] | None = None


def choose_operators(config: Config, device: torch.device) -> Operators:
    """Attention, the optimizer step, then all others.

    Raises:
        Unavailable: names the flag that asks for what cannot run.
    """
    run = config.run
    dtype = choose_precision(run.precision, device)
    wishes = [
        _Wish("--attention", run.attention, "attention", dtype, _limits_of_all_uses(config)),
        _Wish("--adamw-ema", run.adamw_ema, "adamw_ema", torch.float32),
        _Wish("--adamw-ema", run.adamw_ema, "global_norm", torch.float32),
        _Wish("--kernels", "auto", "philox", torch.int64),
    ]
    rows = config.split_batch(1).micro_batch * config.spec.num_tokens
    limits = {"linear_cross_entropy": passed_over(rows, config.spec.vocabulary)}
    wishes += [
        _Wish("--kernels", run.kernels, operation, dtype, limits.get(operation))
        for operation in operations("triton")
        if operation != "attention"
    ]
    choices = []
    for wish in wishes:
        try:
            choices.append(choose(wish.operation, device, wish.dtype, wish.asked, wish.limits))
        except Unavailable as error:
            raise Unavailable(
                f"{wish.flag} {wish.asked}: {error}. Leave {wish.flag} away to take what there is"
            ) from None
    return Operators({wish.operation: wish.asked for wish in wishes}, choices)


def _limits_of_all_uses(config: Config) -> dict[str, str | None]:
    """{implementation: what keeps it from some attention of this model, or None}."""
    limits: dict[str, str | None] = {}
    for use in config.model.attention_uses(config.spec):
        for name, why in ops.attention_limits(use.head_width, use.keys, use.visible).items():
            limits[name] = limits.get(name) or why
    return limits
