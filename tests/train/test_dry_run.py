"""--dry-run: configuration, derived values with formulas, parameters, FLOPs, memory."""

import dataclasses
import re

import pytest
import torch

from heptapod_fast.config import flag
from heptapod_fast.data.logograms import logogram_classes
from heptapod_fast.systems import Heptapod, build_system, configure
from heptapod_fast.train.dry_run import class_count, dry_run
from heptapod_fast.train.memory import GB, Work, estimate
from heptapod_fast.train.metrics import training_flops
from heptapod_fast.train.operators import choose_operators
from tests.running import NO_HEAD, tiny_config


def line_of(text: str, name: str) -> str:
    """What stands behind a name at the start of a line."""
    found = re.search(rf"^ *{re.escape(name)} +(.*)$", text, re.M)
    assert found, f"no line of {name} in:\n{text}"
    return found[1]


def section(text: str, title: str) -> str:
    """The lines from a title to the next empty line."""
    start = text.index(f"\n{title}")
    return text[start:].split("\n\n")[0]


@pytest.mark.parametrize("system", ["heptapod", "1d-raster"])
def test_every_setting_is_shown(system):
    given = {} if system == "heptapod" else NO_HEAD
    config = tiny_config("out", system=system, **given)
    text = section("\n" + dry_run(config), "configuration")
    assert line_of(text, "--size") == "tiny"
    assert line_of(text, "--system") == system
    names = [field.name for group in config.groups.values() for field in dataclasses.fields(group)]
    assert len(names) > 40
    for group in config.groups.values():
        for field in dataclasses.fields(group):
            shown = line_of(text + "\n", flag(field.name))
            assert shown.strip() == str(getattr(group, field.name)).strip()


def test_settings_of_other_systems_are_not_shown():
    text = dry_run(tiny_config("out", system="1d-raster", **NO_HEAD))
    assert "--head-depth" not in text
    assert "supervision" not in text


def test_derived_values_carry_their_formula():
    text = dry_run(tiny_config("out", image_size=24, patch_size=4, density=3, lr_per_256=8e-3))
    assert line_of(text, "tokens") == "36 = (24 / 4)^2"
    assert line_of(text, "token") == "discrete, 16 codes"
    assert line_of(text, "learning rate") == "0.00025 = 0.008 x 8 / 256"
    assert line_of(text, "steps") == "8 = 64 / 8"
    assert line_of(text, "head dim") == "16 = 32 / 2"
    assert line_of(text, "supervision") == "w36n3, 55.5 = 3 x (36 + 1) / 2 rows per image"
    assert line_of(text, "run directory") == "out"


def test_the_warmup_shows_its_formula_where_it_has_one():
    of_a_share = dry_run(tiny_config("out", images=400, warmup=0.05))
    assert line_of(of_a_share, "warm-up images") == "20 = 0.05 x 400"
    of_a_number = dry_run(tiny_config("out", images=400, warmup_images=48))
    assert line_of(of_a_number, "warm-up images") == "48"
    assert "full rate is not reached" not in of_a_number
    of_everything = dry_run(tiny_config("out", images=400, warmup_images=400))
    assert "the full rate is not reached" in section(of_everything, "derived")


def test_micro_batches_are_those_of_a_rank():
    text = dry_run(tiny_config("out", micro_batch=2), world_size=2)
    assert line_of(text, "micro-batches") == "2 = 8 / 2 ranks / 2"


def test_parameters_by_part_add_up():
    config = configure("B", data="no such folder", batch=8, recompute="off")
    text = section(dry_run(config), "parameters")
    parts = [
        int(line_of(text, name).replace(",", "")) for name in ("backbone", "head", "token_loss")
    ]
    assert sum(parts) == 207_234_336
    assert line_of(text, "total") == "207,234,336"


def test_blocks_of_the_mask_that_are_skipped_are_counted():
    """On 16 x 16: anti-diagonals in two streams of 256, and rows in one."""
    few = dict(data="no such folder", batch=8, recompute="off")
    text = dry_run(configure("B", "sar", **few))
    assert line_of(text, "streams") == "two, 512 elements"
    assert line_of(text, "skipped") == "48% = 31 / 64 blocks of 64 x 64 in attention"
    rows = dry_run(configure("B", "sar", grouping="next-row", **few))
    assert line_of(rows, "skipped") == "38% = 6 / 16 blocks of 64 x 64 in attention"
    single = dry_run(configure("B", "sar", grouping="next-token", **few))
    assert "skipped" not in single


def test_parameters_of_the_system_itself_count():
    text = dry_run(configure("B", "sar", data="no such folder", batch=8, recompute="off"))
    assert line_of(section(text, "parameters"), "total") == "141,218,320"
    assert "bytes x 141,218,320" in section(text, "memory per rank")


def test_neither_data_nor_weights_are_opened():
    config = configure(
        "L", data="/no/such/folder", tokenizer_weights="/no/weights", batch=8, recompute="off"
    )
    text = dry_run(config)
    assert "/no/such/folder" in text
    assert line_of(text, "classes") == "1000 (assumed: the data is not opened by a dry run)"


def test_where_the_number_of_classes_comes_from():
    classes, why = class_count(tiny_config("out"))
    assert classes == logogram_classes(24)
    assert "logograms at 24 px" in why
    assert class_count(configure("B", data="folder", num_classes=7)) == (7, "--num-classes")


def test_flops_of_a_step_are_three_forwards():
    config = tiny_config("out", image_size=48)
    text = section(dry_run(config), "FLOPs per image")
    forward = [float(value) for value in re.findall(r"([\d.]+) GFLOP forward", text)]
    training = float(re.search(r"training +([\d.]+) GFLOP", text)[1])
    assert len(forward) >= 3
    assert training == pytest.approx(3 * sum(forward), abs=4e-4)
    assert "3 x forward" in text
    classes, _ = class_count(config)
    system = build_system(config, classes, "meta", fill=False)
    assert training == pytest.approx(training_flops(system) / 1e9, abs=1e-4)


@pytest.mark.parametrize("mode", ["off", "selective"])
def test_memory_is_the_estimate(mode):
    config = tiny_config("out", batch=32, recompute=mode, precision="bf16")
    text = section(dry_run(config, world_size=4), "memory per rank")
    device = torch.device("cpu")
    work = Work(config, 5, device, choose_operators(config, device), world_size=4)
    found = estimate(work, mode)
    rows = {
        "weights and optimizer": found.fixed,
        "weights in bf16": found.casts,
        "activations": found.activations,
        "at the peak": found.rest,
        "copies of the state": found.copies,
        "total": found.total,
    }
    for name, expected in rows.items():
        assert float(line_of(text, name).split()[0]) == pytest.approx(expected / GB, abs=1e-3)
    parameters = sum(p.numel() for p in work.system().parameters())
    assert f"= {found.per_parameter} bytes x {parameters:,}" in text
    assert "for 8 sequences" in text
    assert line_of(text, "recompute").startswith(f"{mode} (asked for")


def test_memory_that_is_not_counted_says_why(monkeypatch):
    def forward(self, batch, rng, phase=None):
        raise TypeError("no such thing")

    monkeypatch.setattr(Heptapod, "forward", forward)
    text = section(dry_run(tiny_config("out")), "memory per rank")
    assert "no estimate of memory: TypeError: no such thing" in line_of(text, "recompute")
    assert "total" not in text


def test_operators_are_those_of_this_machine():
    text = section(dry_run(tiny_config("out", kernels="reference")), "operators on this machine")
    assert "layer_norm" in text
    assert "reference (asked for)" in text


def test_what_cannot_run_here_may_be_meant_for_another_machine():
    text = dry_run(tiny_config("out", adamw_ema="cuda"))
    assert "refused: --adamw-ema cuda" in section(text, "operators on this machine")
    memory = section(text, "memory per rank")
    assert "counted with the references on the CPU" in memory
    assert float(line_of(memory, "total").split()[0]) > 0


def test_ranks_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match="--batch 8 does not divide over 3 ranks.*6 and 9"):
        dry_run(tiny_config("out"), world_size=3)
