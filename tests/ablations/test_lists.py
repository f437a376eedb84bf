"""The papers' tables, row by row: what is trained, and which figures stand beside it."""

import sys

import pytest

from heptapod_fast.ablations import Scale
from tests.running import ROOT

sys.path.append(str(ROOT / "tools"))
from _ablations import ABLATIONS

TINY = Scale("tiny", 64, 3, has_patches=True)
LARGE = Scale("L", 256, 16, has_patches=False)


def flags_of(name, scale=TINY):
    return {row.name: dict(row.flags) for row in ABLATIONS[name].variants(scale)}


def papers_of(name, scale=LARGE):
    return {row.name: row.paper for row in ABLATIONS[name].variants(scale)}


def test_orders_and_samplers():
    assert flags_of("table1") == {
        "1d-raster": {"system": "1d-raster"},
        "1d-random": {"system": "1d-random"},
        "2d-random": {"system": "heptapod", "density": 1},
    }
    assert papers_of("table1") == {
        "1d-raster": (19.23, 62.3),
        "1d-random": (13.07, 91.4),
        "2d-random": (3.97, 185.3),
    }


def test_codes_and_vectors():
    assert list(flags_of("figure6").values()) == [{"tokenizer": "patch-vq"}, {"tokenizer": "patch"}]
    caches = Scale("L", 256, 16, has_patches=False, data_of_vectors="vectors.zarr")
    assert list(flags_of("figure6", caches).values()) == [
        {"tokenizer": "vq16"},
        {"tokenizer": "kl16", "data": "vectors.zarr"},
    ]


def test_windows_and_densities():
    def local(window, density):
        return {"head": "local", "window": window, "density": density}

    assert flags_of("figure7") == {
        "w64n1": {"head": "global", "density": 1},
        "w16n4": local(16, 4),
        "w4n16": local(4, 16),
        "w4n32": local(4, 32),
        "w1n64": local(1, 64),
    }
    assert flags_of("figure7", LARGE) == {
        "w256n1": {"head": "global", "density": 1},
        "w64n4": local(64, 4),
        "w16n16": local(16, 16),
        "w16n32": local(16, 32),
        "w4n64": local(4, 64),
    }


def test_densities():
    assert list(flags_of("figure8").values()) == [{"density": n} for n in (1, 2, 4, 8)]
    assert [row.x for row in ABLATIONS["figure8"].variants(TINY)] == [1, 2, 4, 8]


def test_depths_of_backbone_and_head():
    assert list(flags_of("table4", LARGE).values()) == [
        {"depth": 31, "head_depth": 1},
        {"depth": 24, "head_depth": 8},
        {"depth": 16, "head_depth": 16},
    ]
    assert papers_of("table4") == {
        "31 / 1": (14.74, 98.15),
        "24 / 8": (4.88, 158.93),
        "16 / 16": (3.62, 190.8),
    }


def test_dense_supervision():
    """Batches of size tiny are 64 images at a rate of 0.008 per 256."""
    vectors = {"tokenizer": "patch"}
    few = {"rows_per_step": 4}
    eighth = {"batch": 8, "lr_per_256": pytest.approx(0.064)}
    assert flags_of("dense") == {
        "n = 1": {**vectors, "density": 1},
        "n = 1, 4 rows a step": {**vectors, "density": 1, **few},
        "n = 8": {**vectors, "density": 8},
        "n = 8, 4 rows a step": {**vectors, "density": 8, **few},
        "n = 8, 4 rows, one noise": {**vectors, "density": 8, **few, "diffusion_repeat": 1},
        "n = 1, batch 8": {**vectors, "density": 1, **eighth},
        "n = 8, batch 8": {**vectors, "density": 8, **eighth},
        "n = 8, batch 8, 4 rows a step": {**vectors, "density": 8, **eighth, **few},
    }
    assert flags_of("dense", LARGE)["n = 8, 16 rows a step"]["tokenizer"] == "kl16"


def test_draws_of_steps():
    assert flags_of("steps") == {
        kind: {"steps": kind, "density": 2} for kind in ("antithetic", "uniform", "mar")
    }


def test_levels_of_patches():
    def level(count):
        return {"system": "npp", "levels": count}

    of_l = flags_of("npp-levels", LARGE)
    assert list(of_l.values()) == [{"system": "llamagen"}, level(2), level(3), level(4)]
    assert list(flags_of("npp-levels").values()) == list(of_l.values())[:3]  # of 8 x 8 tokens
    assert list(papers_of("npp-levels").values()) == [
        (5.46, 193.61, "1.0 x"),
        (4.47, 229.25, "0.625 x"),
        (4.62, 231.57, "0.578 x"),
        (4.68, 228.31, "0.572 x"),
    ]


def test_lengths_of_segments():
    first, *others = flags_of("npp-segment").values()
    assert first == {"system": "llamagen"}
    shares = (1 / 2, 2 / 3, 3 / 4, 4 / 5)
    for flags, share in zip(others, shares, strict=True):
        assert flags["system"] == "npp" and flags["patches"] == (2, 1)
        assert flags["shares"] == pytest.approx((share, 1 - share))
    assert list(papers_of("npp-segment").values()) == [
        (3.80, 248.28, "1.0 x"),
        (2.76, 266.34, "0.625 x"),
        (2.79, 263.75, "0.5 x"),
        (2.81, 262.22, "0.43 x"),
        (2.92, 260.68, "0.4 x"),
    ]


def test_sides_of_patches():
    assert list(flags_of("npp-patch").values()) == [
        {"system": "llamagen"},
        {"system": "npp", "patches": (2, 1), "shares": (0.5, 0.5)},
        {"system": "npp", "patches": (4, 1), "shares": (0.5, 0.5)},
    ]


def test_groups_of_tokens():
    found = {}
    for row in ABLATIONS["sar-grouping"].variants(TINY):
        assert row.flags["system"] == "sar"
        found[row.flags["grouping"], row.flags["injection"]] = row.paper
    assert found == {
        ("next-token", "shift"): (4.92, "1 x"),
        ("next-row", "shift"): (22.78, "1 x"),
        ("next-layer", "nearest"): (29.33, "2 x"),
        ("next-neighbor", "shared"): (58.49, "2 x"),
        ("next-neighbor", "average"): (4.40, "2 x"),
    }


def test_guidance_is_of_one_run():
    first, *others = ABLATIONS["sar-guidance"].variants(TINY)
    assert first.of is None and first.sampling == {"guidance": 1}
    assert {row.of for row in others} == {first.name}
    assert [dict(row.sampling) for row in others] == [
        {"guidance_x": 1.25, "guidance_z": 1},
        {"guidance": 3.5},
        {"guidance_x": 1, "guidance_z": 3.5},
        {"guidance_x": 1.25, "guidance_z": 2.7},
    ]
    assert [row.paper for row in (first, *others)] == [
        (39.68, 50.09),
        (18.53, 77.98),
        (4.40, 307.34),
        (6.90, 287.16),
        (3.56, 275.13),
    ]
