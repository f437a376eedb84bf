"""Seeds of every test, and small systems and batches that many tests share."""

import os
import random
import zlib

import hypothesis
import numpy as np
import pytest
import torch

from tests import interpreter

# Before any kernel is imported: without a GPU they run in Triton's interpreter.
interpreter.use_without_a_gpu()

# Examples follow from the test alone; nothing found on another machine is replayed, and no test
# fails because a machine is slow.
hypothesis.settings.register_profile("by-name", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("by-name")

from heptapod_fast.config import Config
from heptapod_fast.data.tokens import Batch
from heptapod_fast.ops.dispatch import AUTO, Operators
from heptapod_fast.rng import Rng
from heptapod_fast.systems import System, build_system, configure


def seed_by(name: str) -> None:
    """Seed every global generator from a name.

    HEPTAPOD_TEST_SEED=text gives the whole suite other draws, to find tests that pass by luck.
    """
    seed = zlib.crc32(f"{name}{os.environ.get('HEPTAPOD_TEST_SEED', '')}".encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True, scope="module")
def seeded_module(request):
    """Fixtures that a module shares draw from a seed made of its name."""
    seed_by(request.node.nodeid)


@pytest.fixture(autouse=True)
def seeded(seeded_module, request):
    """Every test draws from a seed made of its own name: what ran before does not matter, nor on
    which worker."""
    seed_by(request.node.nodeid)


def small_config(tokens: str = "discrete", grid: int = 4, **flags) -> Config:
    """A resolved configuration: width 32, two blocks (each in backbone and head), 3 classes."""
    values = {
        "data": "synthetic",
        "num_classes": 3,
        "width": 32,
        "heads": 2,
        "dropout": 0.0,
        "image_size": grid,
        "patch_size": 1,
        "depth": 2,
        "batch": 8,
    }
    if flags.get("system", "heptapod") == "heptapod":
        values |= {"head_depth": 2, "density": 1}
    if tokens == "discrete":
        values |= {"tokenizer": "patch-vq", "codes": 11}
    else:
        values |= {"tokenizer": "patch", "diffusion_blocks": 2, "diffusion_width": 16}
    return configure("tiny", **(values | flags))


def small_system(
    tokens: str = "discrete",
    grid: int = 4,
    device: str = "cpu",
    operators: Operators = AUTO,
    **flags,
) -> System:
    """A system none of whose parameters is 0 or 1, so that its start hides nothing."""
    config = small_config(tokens, grid, **flags)
    system = build_system(config, config.data.num_classes, device, operators)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in system.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(device)
    return system


def small_batch(system: System, size: int, first: int = 0) -> Batch:
    """Random tokens and labels of the global sample indices first..first+size-1."""
    spec, index = system.spec, torch.arange(first, first + size)
    count = spec.num_tokens * max(1, spec.channels)
    if spec.kind == "discrete":
        tokens = Rng(5).integers("tokens", index, count, spec.vocabulary)
    else:
        tokens = Rng(5).normal("tokens", index, count).unflatten(-1, (spec.num_tokens, -1))
    labels = Rng(5).integers("labels", index, 1, system.num_classes)[:, 0]
    return Batch(tokens, labels, index)


@pytest.fixture
def make_config():
    """`small_config`."""
    return small_config


@pytest.fixture
def make_system():
    """`small_system`."""
    return small_system


@pytest.fixture
def make_batch():
    """`small_batch`."""
    return small_batch
