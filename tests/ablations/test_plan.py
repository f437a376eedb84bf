"""What a plan decides, and the lists of the papers at every scale."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from heptapod_fast.ablations import Ablation, Scale, Variant, make_rows, read_plan
from heptapod_fast.ablations import plan as plans
from heptapod_fast.ablations.plan import Plan, flops_per_image, timed, write_plan
from heptapod_fast.systems import build_system, configure

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))
from _ablations import ABLATIONS

SMALL = {"data": "pairs", "image_size": 32, "patch_size": 4}
SCALES = {
    "tiny": (Scale("tiny", 64, 3, has_patches=True), SMALL),
    "B": (Scale("B", 256, 12, has_patches=False), {"data": "synthetic", "num_classes": 1000}),
}


def configurations(name, scale):
    """{row: configuration} of the rows that are trained."""
    size, flags = SCALES[scale]
    ablation = ABLATIONS[name]
    found = {}
    for variant in ablation.variants(size):
        if variant.of is None:
            # As tools/ablate.py puts them together; what is counted needs no phases of a length.
            settings = {"size": size.size, **ablation.flags, **variant.flags, **flags}
            found[variant.name] = configure(**settings, images=4_000_000)
    return found


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ABLATIONS)
def test_every_row_is_a_configuration(name, scale):
    size, _ = SCALES[scale]
    ablation = ABLATIONS[name]
    rows = ablation.variants(size)
    names = [row.name for row in rows]
    assert len(set(names)) == len(names) >= 2
    found = configurations(name, scale)
    assert len({config.to_json() for config in found.values()}) == len(found)
    for row in rows:
        assert len(row.paper) in (0, len(ablation.paper_columns))
        assert row.of is None or row.of in names
    if ablation.x_label:
        assert all(row.x is not None for row in rows)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ["table1", "figure8", "table4", "steps", "npp-levels"])
def test_models_that_are_compared_have_as_many_parameters(name, scale):
    counts = []
    for config in configurations(name, scale).values():
        system = build_system(config, 5, "meta", fill=False)
        counts.append(sum(value.numel() for value in system.parameters()))
    assert max(counts) < 1.02 * min(counts)


def test_windows_shrink_with_the_grid():
    small = [
        row.name for row in ABLATIONS["figure7"].variants(Scale("tiny", 64, 3, has_patches=True))
    ]
    assert small == ["w64n1", "w16n4", "w4n16", "w4n32", "w1n64"]
    vast = ABLATIONS["figure7"].variants(Scale("B", 1024, 12, has_patches=False))
    assert [row.name for row in vast] == ["w1024n1", "w256n4", "w64n16", "w64n32", "w16n64"]
    large = ABLATIONS["figure7"].variants(Scale("B", 256, 12, has_patches=False))
    assert [row.name for row in large] == ["w256n1", "w64n4", "w16n16", "w16n32", "w4n64"]
    assert [row.paper for row in large] == [(row.name,) for row in large]


def test_depths_keep_their_sum():
    for depth, sums in ((3, 6), (16, 32)):
        rows = ABLATIONS["table4"].variants(Scale("L", 256, depth, has_patches=False))
        assert {row.flags["depth"] + row.flags["head_depth"] for row in rows} == {sums}
    assert [row.name for row in rows] == ["31 / 1", "24 / 8", "16 / 16"]


# ----------------------------------------------------------------------------------- what is equal

TWO = Ablation(
    "Two",
    "A test.",
    lambda scale: [
        Variant("one", {"system": "1d-raster"}),
        Variant("two", {"density": 4}),
        Variant("again", {}, sampling={"temperature": 0.5}, of="two"),
    ],
)
WIDTHS = {"width": 32, "heads": 2, **SMALL}


def made(monkeypatch=None, seconds=(), **how):
    rates = iter(seconds)
    if monkeypatch is not None:
        monkeypatch.setattr(plans, "timed", lambda settings, device: (100, next(rates)))
    given = dict(images=10_000, minutes=None, equal="images")
    return make_rows(
        TWO,
        Scale("tiny", 64, 3, has_patches=True),
        WIDTHS,
        device=torch.device("cpu"),
        say=lambda text: None,
        **(given | how),
    )


def plan_of(rows):
    return Plan(
        name="two",
        rows=rows,
        seeds=(0, 1),
        equal="images",
        metrics=("loss",),
        count=10,
        points=1,
        evaluation={},
        asked={"--images": 10},
        command="python x",
        begun="2026-01-02",
    )


def test_images_are_equal_or_follow_from_compute_or_time(monkeypatch):
    one, two, again = made(monkeypatch, (0.01, 0.03))
    assert one.images == two.images == again.images == 10_000
    one, two, _ = made(monkeypatch, (0.01, 0.03), equal="compute")
    assert one.flops * one.images == pytest.approx(two.flops * two.images, rel=1e-3)
    assert one.flops != pytest.approx(two.flops, rel=0.1)
    one, two, _ = made(monkeypatch, 3 * (0.01, 0.03), equal="time")
    assert (one.images, two.images) == (10_000, 3_333)
    one, two, _ = made(monkeypatch, 3 * (0.01, 0.03), equal="time", images=None, minutes=2)
    assert (one.images, two.images) == (12_000, 4_000)


def test_time_is_the_shortest_of_all_turns(monkeypatch):
    """Other work slows the second row in the first turn, and the first in the last."""
    seconds = (0.01, 0.09, 0.01, 0.03, 0.08, 0.03)
    one, two, again = made(monkeypatch, seconds, equal="time")
    assert (one.seconds, two.seconds, again.seconds) == (0.01, 0.03, 0.0)
    assert (one.images, two.images) == (10_000, 3_333)


def test_the_sum_counts_runs_and_not_rows(monkeypatch):
    plan = plan_of(made(monkeypatch, (0.01, 0.03)))
    assert [row.variant.name for row in plan.trained] == ["one", "two"]
    assert plan.total_seconds == pytest.approx(2 * (100 + 300))


def test_a_plan_is_read_as_it_was_written(monkeypatch, tmp_path):
    plan = plan_of(made(monkeypatch, (0.01, 0.03)))
    assert read_plan(tmp_path) is None
    write_plan(plan, tmp_path)
    found = read_plan(tmp_path)
    assert dataclasses.asdict(found) == dataclasses.asdict(plan)
    for broken in ("{}", "null", '{"rows": [1]}', ""):
        (tmp_path / "plan.json").write_text(broken)
        with pytest.raises(ValueError, match="is no plan of an ablation"):
            read_plan(tmp_path)


def test_a_row_of_too_few_images_is_refused(monkeypatch):
    """Two of the rows have fewer images than the first, which is what was asked for."""
    with pytest.raises(ValueError, match="two, which would train on [34].* --batch 64 is more"):
        made(monkeypatch, (0.01, 0.03), images=100, equal="compute")


def test_a_row_that_cannot_be_is_named():
    bad = dataclasses.replace(TWO, variants=lambda scale: [Variant("wide", {"width": 33})])
    scale = Scale("tiny", 64, 3, has_patches=True)
    how = dict(images=10, minutes=None, equal="images", device=torch.device("cpu"), say=print)
    with pytest.raises(ValueError, match="wide: --width 33 is not a multiple"):
        make_rows(bad, scale, SMALL, **how)


@pytest.mark.parametrize(
    "variants, flags, named",
    [
        (
            [Variant("a", {"density": 1})],
            {"density": 4},
            "--density behind the --: rows of this",
        ),
        ([Variant("a b"), Variant("a, b")], {}, "rows of one name, a b, a, b"),
    ],
)
def test_rows_that_would_be_the_same(variants, flags, named):
    with pytest.raises(ValueError, match=named):
        plans.check_variants(variants, flags)


def test_seconds_are_those_of_all_phases(monkeypatch):
    """Three quarters of the images on patches, the rest four times as slow."""
    times = {2: 0.08, 1: 0.32}
    monkeypatch.setattr(plans, "_seconds_of_step", lambda session, state, phase: times[phase.level])
    settings = {"size": "tiny", "system": "npp", "patches": (2, 1), "shares": (0.75, 0.25)}
    settings |= {"batch": 8, "images": 8000, "width": 32, "heads": 2, **SMALL}
    _, seconds = timed(settings, torch.device("cpu"))
    assert seconds == pytest.approx((0.75 * 0.08 + 0.25 * 0.32) / 8)


def test_steps_are_timed_on_the_systems_own_step():
    parameters, seconds = timed({"size": "tiny", **WIDTHS, "batch": 4}, torch.device("cpu"))
    system = build_system(configure("tiny", **WIDTHS), 5, "meta", fill=False)
    assert parameters == sum(value.numel() for value in system.parameters())
    assert 0 < seconds < 10


def test_flops_are_those_of_all_phases():
    whole = configure("tiny", system="llamagen", **SMALL)
    halves = configure(
        "tiny", system="npp", patches=(2, 1), shares=(0.5, 0.5), images=100_000, **SMALL
    )
    # Elements of 2 x 2 codes: a quarter, and attention among them a sixteenth.
    ratio = flops_per_image(halves) / flops_per_image(whole)
    assert 0.5 + 0.5 / 16 < ratio < 0.5 + 0.5 / 4
