"""The same global batch gives the same weights, whatever the number of ranks and the mode: every
system, from checkpoint to checkpoint of other numbers of ranks. In float64, where the token loss
takes it: those of continuous tokens are float32.

Steps are those of training up to the update, for which plain gradient descent stands in: the
optimizer's operations are float32, and have tests of their own (test_sharded_optimizer.py).
"""

import functools
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from heptapod_fast import checkpoints
from heptapod_fast.data.tokens import SyntheticTokens
from heptapod_fast.ops import sharded
from heptapod_fast.rng import Rng
from heptapod_fast.systems import build_system, configure
from heptapod_fast.train.parallelize import Layout, gradients_of, spread
from heptapod_fast.train.saving import HostBuffers
from heptapod_fast.train.step import Buffers, forward_backward, load
from heptapod_fast.world import ALONE, World
from tests import ranks

SMALL = dict(width=32, heads=2, depth=2, batch=12, images=72, dropout=0.1, num_classes=3)
DISCRETE = SMALL | dict(codes=16)
CONTINUOUS = SMALL | dict(tokenizer="patch", data="synthetic")
CASES = {
    "heptapod": DISCRETE | dict(head_depth=1),
    "heptapod-local": DISCRETE | dict(head="local", window=4, head_depth=1, density=2),
    "heptapod-continuous": CONTINUOUS | dict(head_depth=1),
    "heptapod-uniform": DISCRETE | dict(head_depth=1, steps="uniform"),
    "1d-raster": DISCRETE | dict(system="1d-raster"),
    "1d-random": DISCRETE | dict(system="1d-random"),
    "llamagen": DISCRETE | dict(system="llamagen"),
    "npp": DISCRETE | dict(system="npp"),
    "sar": CONTINUOUS | dict(system="sar"),
}
# Largest relative difference of a loss, and largest difference of a weight.
TOLERANCE = {torch.float64: (1e-10, 1e-9), torch.float32: (1e-5, 1e-5)}
STEPS = 6
LOSSES = "losses of all steps"
MICRO_BATCH = 2


def here():
    dist = torch.distributed
    return World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


def plain(name):
    """A system that nobody has spread, and its configuration."""
    config = configure("tiny", **CASES[name])
    system = build_system(config, 3)
    system.to(dtype_of(config))
    system.set_dtype(dtype_of(config))
    return config, system.train()


def dtype_of(config):
    return torch.float32 if config.spec.kind == "continuous" else torch.float64


class Run:
    """Steps of one system among ranks, from checkpoint to checkpoint.

    Attributes:
        losses: mean loss of the global batch, step by step.
    """

    def __init__(self, name, world, layout):
        self.config, self.system = plain(name)
        self.world = world
        phases = list(self.system.phases(self.config.recipe.images))
        self.parallel = spread(self.system, layout, world, phases, blank=lambda: plain(name)[1])
        spec = self.config.spec
        self.source = SyntheticTokens(spec, 3, seed=1)
        self.buffers = Buffers.allocate(spec, MICRO_BATCH, torch.device("cpu"))
        self.losses = []

    def step(self, number):
        """Optimizer step `number`, counted from 0."""
        config = self.config
        share = config.recipe.batch // self.world.size
        images = number * config.recipe.batch
        phase = self.system.phase(images, config.recipe.images)
        expected = self.system.expected_count(config.recipe.batch, phase)
        self.buffers.sums.zero_()
        first = images + self.world.rank * share
        for start in range(first, first + share, MICRO_BATCH):
            load(self.source, start, self.buffers)
            with self.parallel.adding_up(start + MICRO_BATCH == first + share):
                forward_backward(self.parallel.model, self.buffers, Rng(0), expected, phase)
        total, count = self.world.sum(self.buffers.sums).unbind()
        self.losses.append(float(total / count))
        parameters = list(self.system.parameters())
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients_of(parameters), strict=True):
                parameter -= 0.05 * (expected / float(count)) * gradient
                parameter.grad = None

    def named(self):
        return {name: value.detach() for name, value in self.system.named_parameters()}

    def save(self, folder, number):
        files = HostBuffers(self.world).copy({"model": self.named()})
        checkpoints.save(folder, files, {"step": number}, keep=None, world=self.world)

    def load(self, folder):
        checkpoints.load_step(folder, None).read_into("model", self.named())


def write_undisturbed(name, folder):
    """All steps on one rank, once for all ranks that are held to them."""
    run = Run(name, ALONE, Layout("single", 1, ""))
    for number in range(STEPS):
        run.step(number)
    losses = torch.tensor(run.losses, dtype=torch.float64)
    save_file({LOSSES: losses, **run.named()}, folder / f"{name}.safetensors")


@functools.cache
def undisturbed(name):
    """(losses, weights) of all steps on one rank."""
    found = load_file(Path(os.environ["FOLDER"]) / f"{name}.safetensors")
    losses = found.pop(LOSSES)
    return losses.tolist(), found


def layout_of(mode, world):
    shards = {"single": 1, "ddp": 1, "fsdp": world.size, "hsdp": 1, "hsdp-one-copy": world.size}
    return Layout(mode.removesuffix("-one-copy"), shards[mode], "")


def same(run, steps, name):
    """The losses of these steps, and the weights after the last one, are those of one rank."""
    losses, weights = undisturbed(name)
    of_losses, of_weights = TOLERANCE[dtype_of(run.config)]
    assert run.losses == pytest.approx(losses[steps.start : steps.stop], rel=of_losses)
    if steps.stop == STEPS:
        for key, value in run.named().items():
            difference = sharded.whole(value) - weights[key]
            assert float(difference.abs().max()) < of_weights, key


# The modes on two ranks, on one, and on three.
CHAINS = {
    "ddp_then_fsdp": ("ddp", "single", "fsdp"),
    "fsdp_then_ddp": ("fsdp", "single", "ddp"),
    "hsdp": ("hsdp", "single", "hsdp-one-copy"),
}


def passing_on(chain):
    """check_...: two steps of every system, from the checkpoint before and to one for those after,
    by other processes."""

    def check():
        world = here()
        first = int(os.environ["FIRST"])
        steps = range(first, first + 2)
        mode = CHAINS[chain][first // 2]
        # What every system has to show is shown by the first chain.
        names = CASES if chain == "ddp_then_fsdp" else ("heptapod", "npp", "sar")
        for name in names:
            folder = Path(os.environ["FOLDER"]) / f"{name}-{chain}"
            run = Run(name, world, layout_of(mode, world))
            if first:
                run.load(folder)
            for number in steps:
                run.step(number)
            same(run, steps, name)
            run.save(folder, steps.stop)

    return check


for _chain in CHAINS:
    globals()[f"check_{_chain}"] = passing_on(_chain)


def check_a_system_with_averages_samples_alike():
    """`whole` of every mode: what sampling works on."""
    world = here()
    config, system = plain("heptapod")
    wanted = [2 * value.detach() for value in system.parameters()]
    for mode in ("ddp", "fsdp", "hsdp", "hsdp-one-copy"):
        run = Run("heptapod", world, layout_of(mode, world))
        doubled = [2 * value.detach() for value in run.system.parameters()]
        before = [sharded.whole(value.detach()).clone() for value in run.system.parameters()]
        with run.parallel.whole(doubled) as copy:
            assert all(map(torch.equal, copy.parameters(), wanted)), mode
            tokens = copy.eval().sample(torch.tensor([0, 1]), Rng(3))
            assert tokens.shape == (2, config.spec.num_tokens)
        after = [sharded.whole(value.detach()) for value in run.system.parameters()]
        assert all(map(torch.equal, before, after)), mode


def check_every_rank_holds_its_part():
    """fsdp: of weights, and of the gradients of a step."""
    world = here()
    if world.size == 1:
        return
    run = Run("llamagen", world, layout_of("fsdp", world))
    total = sum(value.numel() for value in run.system.parameters())
    held = sum(sharded.local(v, "", "").numel() for v in run.system.parameters())
    assert held < total / world.size + len(list(run.system.parameters())) * 64
    assert held < 0.75 * total


def test_two_ranks_then_one_then_three(tmp_path):
    """Two steps each. In one test: its processes are started once."""
    for name in CASES:
        write_undisturbed(name, tmp_path)
    for first, count in ((0, 2), (2, 1), (4, 3)):
        found = ranks.outcomes(__file__, count, FOLDER=str(tmp_path), FIRST=str(first))
        ranks.all_well(found)


if __name__ == "__main__":
    ranks.work(globals())
