"""A training step of SAR with two streams beside one with a single stream, and of its groupings.

    python bench/bench_sar.py
    python bench/bench_sar.py --size B --batch 4
    pytest bench/bench_sar.py --benchmark-only

One stream is `--grouping next-token --injection shift`, as many tokens in half of the elements:
"ours is 0.5x" beside it means that two streams take twice the time, which is what the slides say.
Continuous tokens and flow matching; size tiny and its logograms without --size, other sizes take
synthetic latents.
"""

import functools

from bench import harness
from bench.case import Case
from bench.steps import prepared_step
from heptapod_fast import configure
from heptapod_fast.systems import build_system
from heptapod_fast.train.metrics import training_flops

BATCH = {"cpu": 8, "cuda": 64}
ONE_STREAM = dict(grouping="next-token", injection="shift")
TWO_STREAMS = {
    "next-neighbor, average": dict(grouping="next-neighbor", injection="average"),
    "next-layer, nearest": dict(grouping="next-layer", injection="nearest"),
}


def settings_of(size, batch, device, kind):
    """Flags of a step."""
    data = {"logogram_count": 500} if size == "tiny" else {"data": "synthetic"}
    if device == "cuda":
        data |= {"kernels": "triton", "attention": "triton"}
    return dict(size=size, batch=batch, micro_batch=batch, system="sar", **data, **kind)


def step_of(settings, device, made):
    """A call; nothing is compared, so that no inputs are shared."""
    return prepared_step(device=device, **settings).call


def flops_of(settings):
    """FLOPs of a step, without building anything but shapes."""
    config = configure(**settings)
    system = build_system(config, 10, "meta", fill=False)
    return config.recipe.batch * training_flops(system, system.phase(0, config.recipe.images))


def cases_of(device, size, batch):
    """Two streams in turns with one."""
    one = settings_of(size, batch, device, ONE_STREAM)
    found = []
    for name, kind in TWO_STREAMS.items():
        two = settings_of(size, batch, device, kind)
        contenders = {
            "ours": functools.partial(step_of, two, device),
            "one stream": functools.partial(step_of, one, device),
        }
        case = Case(
            f"training step, {size}, batch {batch}",
            f"two streams, {name}",
            lambda: None,
            contenders,
            flops=flops_of(two),
            images=batch,
        )
        found.append(case)
    return found


def cases(device):
    """Shapes that show that everything works on a CPU, size B on a GPU."""
    return cases_of(device, harness.default_size(device), BATCH[device])


bench_sar = harness.bench(cases)

if __name__ == "__main__":
    harness.main_of_sizes(cases_of, BATCH)
