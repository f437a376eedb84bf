"""Mean and deviation of every channel of a cache, summed shard by shard."""

from __future__ import annotations

from typing import Any

import numpy as np

_ROWS = 64  # worked on at once: what is converted to float64 stays in the processor's caches


def channel_sums(values: np.ndarray, broken: list[int]) -> dict[str, Any]:
    """Number of values of a channel, their sum and the sum of their squares in float64, of
    (rows, V, C, H, W) without the rows in `broken`."""
    kept = np.delete(np.arange(len(values)), broken)
    sums = np.zeros(values.shape[2])
    squares = np.zeros(values.shape[2])
    for start in range(0, len(kept), _ROWS):
        part = values[kept[start : start + _ROWS]].astype(np.float64)
        sums += part.sum((0, 1, 3, 4))
        squares += np.square(part, out=part).sum((0, 1, 3, 4))
    count = len(kept) * values[:1, :, 0].size
    return {"count": count, "sum": sums.tolist(), "squares": squares.tolist()}


def statistics(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Per array the mean and the standard deviation of every channel, float64, from the sums in
    the records of the shards."""
    found = {}
    for name in records[0]["sums"]:
        parts = [record["sums"][name] for record in records]
        count = max(1, sum(part["count"] for part in parts))
        mean = np.sum([part["sum"] for part in parts], axis=0) / count
        mean_square = np.sum([part["squares"] for part in parts], axis=0) / count
        # Rounding may leave a little less than nothing.
        variance = np.maximum(mean_square - mean**2, 0.0)
        found[name] = {"mean": mean.tolist(), "std": np.sqrt(variance).tolist()}
    return found
