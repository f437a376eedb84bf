"""How far a network's attention reaches over the grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from heptapod_fast.evaluation.context import MetricContext
from heptapod_fast.evaluation.likelihood import images_of
from heptapod_fast.evaluation.observing import Attended, batches_of, observe
from heptapod_fast.rng import Rng
from heptapod_fast.systems.base import NOWHERE, System


class AttentionDistance:
    """Mean distance between a query and what it looks at, in tokens: see `Metric`.

    A query's distances to all keys that it sees are averaged with its shares as weights, then over
    queries, heads and images; elements that stand nowhere, as the class, are left out and the other
    shares made to add up to 1. What stands behind the backbone is shown half of the tokens. Images
    are those of `likelihood`.

    `compute` returns:
        attention_distance: mean over the layers of the last part of the network, Heptapod's head.
        attention_distance_even: of queries that look at all keys alike, which is what a distance
            is to be compared with: a causal network sees less than the whole grid.
        attention_distances: {layer: distance}, of layers with several attentions one after the
            other "+ 1", and attention_distances_even.
        attention_distances_heads: {layer: [distance of each head]}.

    Raises:
        ValueError: a system that does not answer `look`, or images without classes.
    """

    needs_samples = False

    def __init__(self, context: MetricContext, names: Sequence[str] = ("attention",)) -> None:
        if context.system is None or context.tokenizer is None:
            raise ValueError("--metrics attention needs a run and its tokenizer")
        context.system.check_answers("look", "--metrics attention")
        self._system = context.system
        self._tokenizer = context.tokenizer
        self._context = context
        self._images = images_of(context, "attention")

    def update(self, pixels: Tensor, labels: Tensor) -> None:
        """See `Metric.update`: samples are not what is looked at."""

    def restart(self, system: System) -> None:
        """See `Metric.restart`."""
        self._system = system

    def compute(self) -> dict[str, Any]:
        """See `Metric.compute`."""
        progress = self._context.progress("attention")
        half = self._system.num_tokens // 2
        side = self._system.spec.grid
        sums: dict[str, Tensor] = {}
        even: dict[str, float] = {}
        counts: dict[str, int] = {}
        last = ""
        for _, _, batch in batches_of(self._images, self._system, self._tokenizer, progress):
            for layer in observe(self._system, batch, Rng(0), half):
                last = layer.part
                for number, attended in enumerate(layer.attended):
                    name = f"{layer.name} + {number}" if number else layer.name
                    total_H, count = distances(attended, attended.shares(), side)
                    total_even_H, _ = distances(attended, attended.even_shares(), side)
                    sums[name] = sums.get(name, 0.0) + total_H.cpu()
                    even[name] = even.get(name, 0.0) + float(total_even_H.mean())
                    counts[name] = counts.get(name, 0) + count
        seen = [name for name in counts if counts[name]]
        if not seen:
            raise ValueError("--metrics attention: no token looks at another one")
        by_head = {name: sums[name] / counts[name] for name in seen}
        by_layer = {name: float(by_head[name].mean()) for name in seen}
        by_layer_even = {name: even[name] / counts[name] for name in seen}
        of_last = [name for name in seen if name.startswith(last)]
        return {
            "attention_distance": _mean(by_layer, of_last),
            "attention_distance_even": _mean(by_layer_even, of_last),
            "attention_part": last,
            "attention_distances": by_layer,
            "attention_distances_even": by_layer_even,
            "attention_distances_heads": {name: by_head[name].tolist() for name in seen},
            "attention_of": self._images.name,
        }


def _mean(values: dict[str, float], names: list[str]) -> float:
    return sum(values[name] for name in names) / len(names)


def distances(attended: Attended, share_BHNK: Tensor, side: int) -> tuple[Tensor, int]:
    """((H,) sum over queries of their mean distance, how many queries there were), on a grid of
    side x side tokens."""
    key_BK, query_BN = attended.key_BK, attended.query_BN
    is_key_B11K = (key_BK != NOWHERE)[:, None, None]
    share_BHNK = share_BHNK * is_key_B11K
    whole_BHN = share_BHNK.sum(-1)
    apart_BNK = _apart(query_BN, key_BK, side)
    mean_BHN = torch.einsum("bhnk,bnk->bhn", share_BHNK, apart_BNK) / whole_BHN.clamp(min=1e-12)
    # A query at a token, which looks at some other token at least: the first of an order does not.
    visible_BNK = attended.even_shares()[:, 0] * is_key_B11K[:, 0]
    counts_BN = (query_BN != NOWHERE) & (visible_BNK.sum(-1) > 0)
    total_H = (mean_BHN * counts_BN[:, None]).sum((0, 2))
    return total_H, int(counts_BN.sum())


def _apart(query_BN: Tensor, key_BK: Tensor, side: int) -> Tensor:
    """(B, N, K) distances in tokens."""
    rows = query_BN[:, :, None] // side - key_BK[:, None] // side
    columns = query_BN[:, :, None] % side - key_BK[:, None] % side
    return torch.hypot(rows.float(), columns.float())
