"""The memory estimate against what training really keeps, counted tensor by tensor."""

import pytest
import torch

from heptapod_fast.config import Config
from heptapod_fast.data import SyntheticTokens
from heptapod_fast.rng import Rng
from heptapod_fast.systems import Phase, build_system
from heptapod_fast.train.memory import bytes_of_run, bytes_per_parameter, estimate
from heptapod_fast.train.optimizer import Optimizer
from tests.running import NO_HEAD, tiny_config

CLASSES, SEQUENCES = 5, 8
CASES = {
    "global": {"depth": 2, "head_depth": 2, "density": 2},
    "dense": {"depth": 1, "head_depth": 3, "density": 8},
    "uniform steps": {"depth": 1, "head_depth": 2, "density": 4, "steps": "uniform"},
    "local": {"depth": 2, "head_depth": 2, "head": "local", "window": 9, "density": 4},
    "1d": {"system": "1d-random", "depth": 4} | NO_HEAD,
    "vectors": {
        "depth": 2,
        "head_depth": 2,
        "tokenizer": "patch",
        "codes": None,
        "diffusion_blocks": 3,
        "diffusion_width": 64,
    },
    "flow": {
        "depth": 2,
        "head_depth": 2,
        "tokenizer": "patch",
        "codes": None,
        "token_loss": "flow",
        "diffusion_blocks": 1,
        "diffusion_width": 96,
    },
    "two streams": {
        "system": "sar",
        "depth": 3,
        "codes": None,
        "diffusion_blocks": 2,
        "diffusion_width": 64,
    }
    | NO_HEAD,
    "llamagen": {"system": "llamagen", "depth": 3} | NO_HEAD,
}


def config_of(**settings) -> Config:
    return tiny_config("out", **{"width": 64, "heads": 4, "precision": "fp32"} | settings)


def of_meta(config: Config):
    return build_system(config, CLASSES, "meta", fill=False)


def nbytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# ------------------------------------------------------------------------------------- fixed bytes


@pytest.mark.parametrize("averages", [(), (0.9999,), (0.9999, 0.9)])
def test_fixed_bytes_are_those_of_the_tensors_that_stay(averages):
    config = config_of(ema=averages)
    system = build_system(config, CLASSES)
    optimizer = Optimizer(system, config.recipe)
    batch = SyntheticTokens(config.spec, CLASSES, 0).batch(torch.arange(2))
    system.loss(batch, Rng(0)).total.backward()
    gradients = [parameter.grad for parameter in system.parameters()]
    kept = [tensor for file in optimizer.files().values() for tensor in file.values()]
    counted = nbytes(gradients) + nbytes(kept) - nbytes([optimizer.skipped])
    assert estimate(config, of_meta(config), 8).fixed == counted


def test_mixed_precision_keeps_a_copy_of_two_bytes():
    assert bytes_per_parameter(1, is_mixed=True) == bytes_per_parameter(1, is_mixed=False) + 2
    plain = estimate(config_of(), of_meta(config_of()), 8)
    mixed_config = config_of(precision="bf16")
    mixed = estimate(mixed_config, of_meta(mixed_config), 8)
    assert mixed.per_parameter == plain.per_parameter + 2
    assert mixed.activations == plain.activations / 2


# ------------------------------------------------------------------------------------- activations


def saved_bytes(config: Config) -> int:
    """Bytes that autograd keeps for the backward pass of a micro-batch, parameters left out."""
    system = build_system(config, CLASSES)
    own = {parameter.untyped_storage().data_ptr() for parameter in system.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # The tensor is held, so that its address is not given to another one.
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    batch = SyntheticTokens(config.spec, CLASSES, 0).batch(torch.arange(SEQUENCES))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = system.loss(batch, Rng(0))
    assert loss.total.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("name", CASES)
def test_the_estimate_of_activations_is_near_what_is_kept(name):
    config = config_of(**CASES[name])
    estimated = estimate(config, of_meta(config), SEQUENCES).activations
    kept = saved_bytes(config)
    assert 0.7 < estimated / kept < 1.3, (estimated, kept)


def test_activations_grow_with_the_micro_batch_and_nothing_else_does():
    config = config_of()
    one, eight = (estimate(config, of_meta(config), count) for count in (1, 8))
    assert eight.activations == 8 * one.activations
    assert eight.fixed == one.fixed
    assert eight.total == eight.fixed + eight.activations


def test_the_largest_phase_counts():
    config = config_of()
    system = of_meta(config)
    plain = system.saved_values(None)
    middle = Phase(8, 16, "middle", 1)
    phases = [Phase(0, 8, "first"), middle, Phase(16, 64, "last", 2)]
    system.phase = lambda images, total: next(p for p in phases if p.first <= images < p.end)
    system.saved_values = lambda phase: 3 * plain if phase == middle else plain
    expected = 3 * SEQUENCES * 4 * plain
    assert estimate(config, system, SEQUENCES).activations == expected


def test_bytes_of_a_run_are_those_of_its_micro_batch():
    config = config_of(micro_batch=2)
    assert bytes_of_run(config, CLASSES, 1) == int(estimate(config, of_meta(config), 2).total)
    alone, shared = (bytes_of_run(config_of(), CLASSES, ranks) for ranks in (1, 2))
    assert shared < alone
