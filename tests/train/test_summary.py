"""--dry-run: configuration, derived values with formulas, parameters, FLOPs, memory."""

import dataclasses
import re

import pytest
import torch

from heptapod_fast.config import Config, flag
from heptapod_fast.data import SyntheticTokens
from heptapod_fast.rng import Rng
from heptapod_fast.systems import build_system
from heptapod_fast.tokenizers import token_spec
from heptapod_fast.train.memory import activation_values
from heptapod_fast.train.summary import summary
from tests.running import tiny_config

CASES = {
    "global": dict(depth=2, head_depth=2, density=2),
    "dense": dict(depth=1, head_depth=3, density=8),
    "local": dict(depth=2, head_depth=2, head="local", window=9, density=4),
    "1d": dict(system="1d-random", depth=4, head_depth=None),
    "patch": dict(
        depth=2, head_depth=2, tokenizer="patch", codes=None, diffusion_blocks=3, diffusion_width=64
    ),
}


def numbers(text: str, name: str) -> str:
    return re.search(rf"^ *{re.escape(name)} +(.*)$", text, re.M)[1]


def test_every_setting_is_shown():
    config = tiny_config("out")
    text = summary(config)
    for field in dataclasses.fields(Config):
        assert numbers(text, flag(field.name)) == str(getattr(config, field.name)).strip()


def test_derived_values_carry_their_formula():
    text = summary(tiny_config("out", image_size=24, patch_size=4, density=3, lr_per_256=8e-3))
    assert numbers(text, "tokens") == "36 = (24 / 4)^2"
    assert numbers(text, "learning rate") == "0.00025 = 0.008 x 8 / 256"
    assert numbers(text, "steps") == "8 = 64 / 8"
    assert numbers(text, "head dim") == "16 = 32 / 2"
    assert numbers(text, "supervision") == "w36n3, 55.5 = 3 x (36 + 1) / 2 rows per image"
    assert numbers(text, "run directory") == "out"


def test_parameters_by_part_add_up():
    config = Config(size="B", data="no such folder").resolve()
    text = summary(config)
    text = text[text.index("\nparameters") :]
    parts = [
        int(numbers(text, name).replace(",", "")) for name in ("backbone", "head", "token_loss")
    ]
    assert sum(parts) == 207_234_336 and numbers(text, "total").startswith("207,234,336")


def test_neither_data_nor_weights_are_opened():
    config = Config(size="L", data="/no/such/folder", tokenizer_weights="/no/weights").resolve()
    assert "/no/such/folder" in summary(config)
    assert "assumed: the data is not opened" in summary(config)


def test_flops_of_a_step_are_three_forwards():
    text = summary(tiny_config("out"))
    forward = sum(float(v) for v in re.findall(r"([\d.]+) GFLOP forward", text))
    training = float(re.search(r"training +([\d.]+) GFLOP", text)[1])
    assert training == pytest.approx(3 * forward, abs=4e-4) and "3 x forward" in text


def test_ranks_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match="--batch 8 does not divide over 3 ranks.*6 and 9"):
        summary(tiny_config("out"), world_size=3)


def saved_bytes(config: Config, micro: int) -> int:
    """Bytes that autograd keeps for the backward pass of a micro-batch, parameters left out."""
    spec = token_spec(config.tokenizer, config.image_size, config.patch_size, config.codes)
    system = build_system(config, spec, 5)
    own = {p.untyped_storage().data_ptr() for p in system.parameters()}
    sizes = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    batch = SyntheticTokens(spec, 5, 0).batch(torch.arange(micro))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = system.loss(batch, Rng(0))
    assert loss.total.requires_grad
    return sum(size for size, _ in sizes.values())


@pytest.mark.parametrize("name", CASES)
def test_the_estimate_of_activations_is_near_what_is_kept(name):
    config = tiny_config("out", width=64, heads=4, precision="fp32", **CASES[name])
    spec = token_spec(config.tokenizer, config.image_size, config.patch_size, config.codes)
    system = build_system(config, spec, 5, "meta", fill=False)
    estimate = 8 * 4 * activation_values(config, system)
    kept = saved_bytes(config, 8)
    assert 0.7 < estimate / kept < 1.3, (estimate, kept)
