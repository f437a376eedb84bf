"""The tables and figures of the papers, as lists of configurations. A new one is a list.

Windows and depths are the papers' where the scale is theirs (16 x 16 tokens), and their shares of
it elsewhere: w16n4 of 64 tokens is w64n4 of 256.
"""

from __future__ import annotations

import math
from typing import Any

from heptapod_fast.ablations.plan import Ablation, Scale, Variant
from heptapod_fast.systems import configure

PAPER_TOKENS = 256  # of the papers' grids


def _table1(scale: Scale) -> list[Variant]:
    return [
        Variant("1d-raster", {"system": "1d-raster"}, paper=(19.23, 62.3)),
        Variant("1d-random", {"system": "1d-random"}, paper=(13.07, 91.4)),
        Variant("2d-random", {"system": "heptapod", "density": 1}, paper=(3.97, 185.3)),
    ]


def _figure6(scale: Scale) -> list[Variant]:
    codes = "patch-vq" if scale.has_patches else "vq16"
    of_vectors = _vectors(scale)
    return [
        Variant(f"codes ({codes})", {"tokenizer": codes}),
        Variant(f"vectors ({of_vectors['tokenizer']})", of_vectors),
    ]


def _vectors(scale: Scale) -> dict[str, Any]:
    """Flags of rows on vectors."""
    flags: dict[str, Any] = {"tokenizer": "patch" if scale.has_patches else "kl16"}
    if scale.data_of_vectors is not None:
        flags["data"] = scale.data_of_vectors
    return flags


def _windows(scale: Scale, pairs: list[tuple[int, int]]) -> list[Variant]:
    """(window, density) of 256 tokens: windows are the same share of other grids."""
    found = []
    for window, density in pairs:
        mine = max(1, window * scale.tokens // PAPER_TOKENS)
        flags = {"head": "local", "window": mine, "density": density}
        if mine == scale.tokens:
            flags = {"head": "global", "density": density}
        paper = (f"w{window}n{density}",)
        found.append(Variant(f"w{mine}n{density}", flags, paper=paper))
    return found


def _figure7(scale: Scale) -> list[Variant]:
    return _windows(scale, [(256, 1), (64, 4), (16, 16), (16, 32), (4, 64)])


def _figure8(scale: Scale) -> list[Variant]:
    return [Variant(f"n = {density}", {"density": density}, x=density) for density in (1, 2, 4, 8)]


def _dense(scale: Scale) -> list[Variant]:
    # A sixteenth of the tokens: 8 steps have as many rows then as one whole step has on average.
    few = max(1, scale.tokens // 16)
    few_rows = {"rows_per_step": few}
    one_noise = {"diffusion_repeat": 1}
    # An eighth of the images with 8 steps each: an optimizer step has as many head passes.
    recipe = configure(scale.size).recipe
    batch = max(2, recipe.batch // 8)
    fewer_images = {"batch": batch, "lr_per_256": recipe.learning_rate * 256 / batch}
    rows: dict[str, dict[str, Any]] = {
        "n = 1": {"density": 1},
        f"n = 1, {few} rows a step": {"density": 1, **few_rows},
        "n = 8": {"density": 8},
        f"n = 8, {few} rows a step": {"density": 8, **few_rows},
        f"n = 8, {few} rows, one noise": {"density": 8, **few_rows, **one_noise},
        # What a smaller batch does by itself.
        f"n = 1, batch {batch}": {"density": 1, **fewer_images},
        f"n = 8, batch {batch}": {"density": 8, **fewer_images},
        f"n = 8, batch {batch}, {few} rows a step": {"density": 8, **fewer_images, **few_rows},
    }
    return [Variant(name, {**_vectors(scale), **flags}) for name, flags in rows.items()]


def _table4(scale: Scale) -> list[Variant]:
    total = 2 * scale.depth
    found = []
    papers = {(31, 1): (14.74, 98.15), (24, 8): (4.88, 158.93), (16, 16): (3.62, 190.8)}
    for (_, head), paper in papers.items():
        mine = max(1, round(total * head / 32))
        flags = {"depth": total - mine, "head_depth": mine}
        found.append(Variant(f"{total - mine} / {mine}", flags, paper=paper))
    return found


def _steps(scale: Scale) -> list[Variant]:
    return [
        Variant(name, {"steps": name, "density": 2}) for name in ("antithetic", "uniform", "mar")
    ]


_LLAMAGEN = {"system": "llamagen"}


def _npp_levels(scale: Scale) -> list[Variant]:
    rows = [Variant("llamagen, 1 level", _LLAMAGEN, x=1, paper=(5.46, 193.61, "1.0 x"))]
    papers = {
        2: (4.47, 229.25, "0.625 x"),
        3: (4.62, 231.57, "0.578 x"),
        4: (4.68, 228.31, "0.572 x"),
    }
    side = math.isqrt(scale.tokens)
    for levels, paper in papers.items():
        if 2 ** (levels - 1) >= side:
            continue  # the first level would have a single element
        flags = {"system": "npp", "levels": levels}
        rows.append(Variant(f"npp, {levels} levels", flags, x=levels, paper=paper))
    return rows


def _npp_segment(scale: Scale) -> list[Variant]:
    rows = [Variant("llamagen", _LLAMAGEN, paper=(3.80, 248.28, "1.0 x"))]
    papers = {
        "1/2": (2.76, 266.34, "0.625 x"),
        "2/3": (2.79, 263.75, "0.5 x"),
        "3/4": (2.81, 262.22, "0.43 x"),
        "4/5": (2.92, 260.68, "0.4 x"),
    }
    for factor, paper in papers.items():
        upper, lower = map(int, factor.split("/"))
        # The paper's factor is the share of the images that patches of 2 x 2 get here.
        flags = {"system": "npp", "patches": (2, 1), "shares": (upper / lower, 1 - upper / lower)}
        rows.append(Variant(f"npp, {factor} by 2 x 2", flags, x=upper / lower, paper=paper))
    return rows


def _npp_patch(scale: Scale) -> list[Variant]:
    rows = [Variant("llamagen, 1 x 1", _LLAMAGEN, paper=(5.46, 193.61, "1.0 x"))]
    papers: dict[int, tuple[float | str, ...]] = {
        2: (4.47, 229.25, "0.625 x"),
        4: (4.92, "", "0.531 x"),  # the text says 0.45 more; its IS cannot be read in our copy
    }
    for side, paper in papers.items():
        flags = {"system": "npp", "patches": (side, 1), "shares": (0.5, 0.5)}
        rows.append(Variant(f"npp, {side} x {side}", flags, x=side, paper=paper))
    return rows


def _sar_grouping(scale: Scale) -> list[Variant]:
    papers = {
        ("next-token", "shift"): (4.92, "1 x"),
        ("next-row", "shift"): (22.78, "1 x"),
        ("next-layer", "nearest"): (29.33, "2 x"),
        ("next-neighbor", "shared"): (58.49, "2 x"),
        ("next-neighbor", "average"): (4.40, "2 x"),
    }
    return [
        Variant(
            f"{grouping}, {injection}",
            {"system": "sar", "grouping": grouping, "injection": injection},
            paper=paper,
        )
        for (grouping, injection), paper in papers.items()
    ]


def _sar_guidance(scale: Scale) -> list[Variant]:
    papers: dict[str, tuple[dict[str, float], tuple[float, float]]] = {
        "none": ({"guidance": 1}, (39.68, 50.09)),
        "x 1.25": ({"guidance_x": 1.25, "guidance_z": 1}, (18.53, 77.98)),
        "cfg 3.5": ({"guidance": 3.5}, (4.40, 307.34)),
        "z 3.5": ({"guidance_x": 1, "guidance_z": 3.5}, (6.90, 287.16)),
        "x 1.25, z 2.7": ({"guidance_x": 1.25, "guidance_z": 2.7}, (3.56, 275.13)),
    }
    found: list[Variant] = []
    for name, (sampling, paper) in papers.items():
        of = None if not found else found[0].name
        found.append(Variant(name, {"system": "sar"}, sampling=sampling, of=of, paper=paper))
    return found


FID_IS = ("FID", "IS")
POINTS = 4  # of the curves of figures

ABLATIONS: dict[str, Ablation] = {
    "table1": Ablation(
        "Order and sampler (Heptapod, Table 1)",
        "One next token in raster order, in random order, and the distribution of the whole grid.",
        _table1,
        paper_columns=FID_IS,
    ),
    "figure6": Ablation(
        "Codes and vectors (Heptapod, Figure 6)",
        "Codes are learned faster at first; vectors come out better in the end, as their tokenizer "
        "loses less.",
        _figure6,
        points=POINTS,
        apart=("held_out_loss",),  # nats of codes, and squared errors of noise
    ),
    "figure7": Ablation(
        "Window and density (Heptapod, Figure 7)",
        "Windows shrink as the number of supervised steps grows; the whole grid is best.",
        _figure7,
        points=POINTS,
        paper_columns=("of 256 tokens",),
    ),
    "figure8": Ablation(
        "Density of supervision (Heptapod, Figure 8)",
        "More steps of each image that get a head pass and a loss, over the whole grid.",
        _figure8,
        x_label="supervised steps of an image",
        points=POINTS,
    ),
    "dense": Ablation(
        "What dense supervision costs",
        "Many supervised steps of vectors, with a loss at all unseen positions of a step or at a "
        "few that stand for them.",
        _dense,
        points=POINTS,
    ),
    "table4": Ablation(
        "Depth of backbone and head (Heptapod, Table 4)",
        "The blocks of both together are the same.",
        _table4,
        paper_columns=FID_IS,
    ),
    "steps": Ablation(
        "How supervised steps are drawn",
        "Mirrored pairs of steps, independent ones, and MAR's masking ratio.",
        _steps,
    ),
    "npp-levels": Ablation(
        "Levels of patches (NPP, Table 3c)",
        "Training begins with large patches of codes and ends with single ones (the paper's are of "
        "size B).",
        _npp_levels,
        paper_columns=(*FID_IS, "cost"),
    ),
    "npp-segment": Ablation(
        "Length of the first segment (NPP, Table 3b)",
        "The share of training that works on patches of 2 x 2 codes (the paper's are of size L).",
        _npp_segment,
        paper_columns=(*FID_IS, "cost"),
    ),
    "npp-patch": Ablation(
        "Side of the patches (NPP, Table 3a)",
        "Half of training on patches of this side (the paper's are of size B).",
        _npp_patch,
        paper_columns=(*FID_IS, "cost"),
    ),
    "sar-grouping": Ablation(
        "Groups of tokens (SAR, Table 1)",
        "What a step predicts at once, and what its elements are made of.",
        _sar_grouping,
        paper_columns=("FID", "cost"),
    ),
    "sar-guidance": Ablation(
        "Guidance (SAR, Table 2)",
        "One trained system, sampled with guidance at its head (x), of its vectors (z), or both.",
        _sar_guidance,
        paper_columns=FID_IS,
    ),
}
