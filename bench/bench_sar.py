"""A training step of SAR with two streams beside one with a single stream, and of its groupings.

    python bench/bench_sar.py
    python bench/bench_sar.py --size B --batch 4
    pytest bench/bench_sar.py --benchmark-only

One stream is `--grouping next-token --injection shift`, as many tokens in half of the elements:
"ours is 0.5x" beside it means that two streams take twice the time, which is what the slides say.
TFLOP/s count the FLOPs of the two streams for both: those of the single stream are too many.
Continuous tokens and flow matching; size tiny and its logograms without --size, other sizes take
synthetic latents.
"""

import functools

from bench import harness
from bench.steps import case_of, ours, sized

BATCH = {"cpu": 8, "cuda": 64}
ONE_STREAM = dict(grouping="next-token", injection="shift")
TWO_STREAMS = {
    "next-neighbor, average": dict(grouping="next-neighbor", injection="average"),
    "next-layer, nearest": dict(grouping="next-layer", injection="nearest"),
}


def cases_of(device, size, batch):
    """Two streams in turns with one."""
    step = functools.partial(sized, size, batch, device, system="sar")
    one_stream = functools.partial(ours, step(**ONE_STREAM))
    return [
        case_of(f"two streams, {name}", step(**kind), one_stream=one_stream)
        for name, kind in TWO_STREAMS.items()
    ]


def cases(device):
    """Shapes that show that everything works on a CPU, size B on a GPU."""
    return cases_of(device, harness.default_size(device), BATCH[device])


bench_sar = harness.bench(cases)

if __name__ == "__main__":
    harness.main_of_sizes(cases_of, BATCH)
