"""What a GPU reaches at most, measured: bytes/s of a copy, FLOP/s of a product."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from bench import timer
from bench.case import Case


class Ceilings(NamedTuple):
    """copy: bytes/s, read plus written. product: FLOP/s in bf16. 0 where it is not known."""

    copy: float = 0.0
    product: float = 0.0

    def floor(self, bytes: float, flops: float) -> float:
        """Seconds below which nothing can be: the longer of bytes and FLOPs; 0 if unknown."""
        moving = bytes / self.copy if self.copy else 0.0
        computing = flops / self.product if self.product else 0.0
        return max(moving, computing)


UNKNOWN = Ceilings()


def copy_inputs(megabytes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(source, target) in bf16."""
    count = megabytes * 2**20 // 2
    source = torch.randn(count, device="cuda", dtype=torch.bfloat16)
    return source, torch.empty_like(source)


def copying(made: tuple) -> timer.Call:
    """The fastest copy that PyTorch has."""
    source, target = made
    return functools.partial(target.copy_, source)


def copy_case(megabytes: int) -> Case:
    """A copy of so many megabytes."""
    return Case(
        "ceilings",
        f"copy {megabytes} MB",
        functools.partial(copy_inputs, megabytes),
        {"copy": copying},
        bytes=2 * megabytes * 2**20,
    )


def product_inputs(m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(m, k) and (n, k) in bf16."""
    draw = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    return draw(m, k), draw(n, k)


def multiplying(made: tuple) -> timer.Call:
    """cuBLAS."""
    left, right = made
    return functools.partial(torch.mm, left, right.t())


def product_case(name: str, m: int, n: int, k: int) -> Case:
    """(m, k) times the transpose of (n, k)."""
    return Case(
        "ceilings",
        f"product {name}, {m} x {n} x {k}",
        functools.partial(product_inputs, m, n, k),
        {"cuBLAS": multiplying},
        flops=2 * m * n * k,
        bytes=2 * (m * k + n * k + m * n),
    )


@functools.cache
def ceilings(device: str) -> Ceilings:
    """Measured on this GPU in a second; UNKNOWN on a CPU, whose toy shapes have no roofline."""
    if device != "cuda":
        return UNKNOWN
    copy, product = copy_case(1024), product_case("square", 8192, 8192, 8192)
    seconds = {}
    for case in (copy, product):
        (prepare,) = case.contenders.values()
        watches = {case.name: timer.watch(prepare(case.inputs()), device)}
        seconds[case] = timer.in_turns(watches, rounds=11)[case.name].median
    return Ceilings(copy.bytes / seconds[copy], product.flops / seconds[product])
