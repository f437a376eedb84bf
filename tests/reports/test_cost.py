"""What a run on ImageNet costs, modelled."""

import json
from pathlib import Path

import pytest

from heptapod_fast.checkpoints import listed
from heptapod_fast.reports import cost
from heptapod_fast.systems import build_system, configure
from heptapod_fast.train.metrics import training_flops
from tests.running import train_here

ROOT = Path(__file__).resolve().parents[2]


def test_the_committed_file_is_up_to_date():
    """Otherwise: python -m heptapod_fast.reports.cost bench/results/modelled-cost.json, and
    python tools/report.py bench/results."""
    committed = json.loads((ROOT / "bench" / "results" / "modelled-cost.json").read_text())
    assert committed == cost.modelled()


def test_days_follow_from_the_formula_that_the_page_states():
    config = configure("B")
    row = cost.cost_of(config)
    flops = training_flops(build_system(config, 1000, "meta", fill=False))
    seconds = flops * config.recipe.images / (0.6 * 989e12)
    assert row["days"] == pytest.approx(
        {"1": seconds / 86_400, "8": seconds / 86_400 / 8, "64": seconds / 86_400 / 64}
    )
    assert row["images_per_second"] == pytest.approx(0.6 * 989e12 / flops)
    assert row["seconds_per_step"]["8"] * row["steps"] == pytest.approx(seconds / 8)


def test_phases_count_by_their_images():
    """Patches of 2 x 2 for a quarter of the images, and single codes for the rest."""
    config = configure("B", system="npp", patches=(2, 1), shares=(0.25, 0.75))
    system = build_system(config, 1000, "meta", fill=False)
    images = config.recipe.images
    first, last = system.phases(images)
    mean = 0.25 * training_flops(system, first) + 0.75 * training_flops(system, last)
    assert cost.run_flops(system, images) == pytest.approx(images * mean, rel=1e-5)


def test_every_size_but_those_of_the_embedded_data_has_a_row():
    found = [(row["system"], row["size"]) for row in cost.modelled()["runs"]]
    assert ("`heptapod`", "`H`") in found and ("`llamagen`", "`XXL`") in found
    assert len(found) == len(set(found))
    assert not any("tiny" in size for _, size in found)


@pytest.mark.parametrize("ema", [(), (0.99,), (0.9, "post-hoc")])
def test_a_checkpoint_is_as_large_as_it_says(tmp_path, ema):
    session, _, _ = train_here(tmp_path, images=16, width=64, ema=ema)
    parameters = sum(parameter.numel() for parameter in session.system.parameters())
    newest = listed(tmp_path / "checkpoints")[-1]
    size = sum(path.stat().st_size for path in newest.iterdir())
    expected = cost.checkpoint_bytes(session.config, parameters)
    assert expected < size < 1.1 * expected  # names and the state come on top


def test_caches_are_as_large_as_their_arrays():
    """kl16: mean and deviation of 16 channels on 16 x 16; vq16: a code of 2 bytes per position."""
    rows = {(row["tokens"], row["view_count"]): row for row in cost.modelled()["caches"]}
    assert rows["`kl16`", 1]["bytes_per_image"] == 2 * 2 * 16 * 16 * 16
    assert rows["`kl16`", 2]["bytes_per_image"] == 2 * rows["`kl16`", 1]["bytes_per_image"]
    assert rows["`vq16`", 20]["bytes_per_image"] == 20 * 2 * 256
    assert rows["`vq16`", 20]["gb"] == pytest.approx(20 * 512 * 1_281_167 / 1e9)
