"""What dense supervision costs by count: the rows of `tools/ablate.py dense` at full size.

    python bench/dense_cost.py --out bench/results/dense-cost.json

Nothing is measured. FLOPs of one image's forward pass, by part, as `System.flops_per_image` counts
them. Two more rows are bounds: the head's passes without any token loss, and the same with a first
block that the steps of an image share. The elements of that block are the mask token or a state of
the backbone, whichever step it is, so that queries, keys and values of each could be computed once;
behind it every element depends on what the step sees.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from heptapod_fast.ablations import Scale
from heptapod_fast.storage import write_json
from heptapod_fast.systems import build_system, configure

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))  # where the lists of rows are

SIZE, DEPTH, TOKENS = "L", 16, 256
CLASSES = 1000

Parts = dict[str, float]


def counted() -> dict[str, Any]:
    """The file; the same for the same code."""
    from _ablations import ABLATIONS

    rows: list[tuple[str, int, Parts]] = []
    flags: dict[str, Any] = {}
    for variant in ABLATIONS["dense"].variants(Scale(SIZE, TOKENS, DEPTH, has_patches=False)):
        if "batch" in variant.flags:
            continue  # an image costs the same in a smaller batch
        flags = dict(variant.flags)
        rows.append((variant.name, flags["density"], parts_of(flags)))
    # The last row has the smallest token loss of all; no estimator goes below what is left without.
    _, steps, cheapest = rows[-1]
    bound = {**cheapest, "token loss": 0.0}
    rows.append(("bound: no token loss at all", steps, bound))
    shared = {**bound, "head": bound["head"] - spared_by_sharing(flags)}
    rows.append(("bound: and a first block shared by the steps", steps, shared))
    first = sum(rows[0][2].values())
    return {
        "command": "python bench/dense_cost.py --out bench/results/dense-cost.json",
        "modelled": "not measured: products of one image's forward pass, 2 per multiply-add",
        "size": SIZE,
        "rows": [row_of(name, steps, parts, first) for name, steps, parts in rows],
    }


def parts_of(flags: dict[str, Any]) -> Parts:
    """GFLOP of one image's forward pass, by part."""
    system = build_system(configure(SIZE, **flags), CLASSES, "meta", fill=False)
    return {name: value / 1e9 for name, value in system.flops_per_image().items()}


def spared_by_sharing(flags: dict[str, Any]) -> float:
    """GFLOP of an image that are spared where the steps of an image share queries, keys and values
    of the head's first block."""
    system: Any = build_system(configure(SIZE, **flags), CLASSES, "meta", fill=False)
    products_of_step = 2 * 3 * system.settings.width**2 * (TOKENS + 1) / 1e9
    # Once for the states of the backbone; those of mask tokens are alike for the whole batch.
    return (flags["density"] - 1) * products_of_step


def row_of(name: str, steps: int, parts: Parts, first: float) -> dict[str, Any]:
    """A row of the file; first: the GFLOP of the first one, which has one step."""
    total = sum(parts.values())
    return {
        "name": name,
        "steps": steps,
        "gflop": {**parts, "all": total},
        "of_first": total / first,
        "of_first_by_step": total / steps / first,
    }


def main() -> None:
    """Count and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file; default: print it")
    options = parser.parse_args()
    found = counted()
    if options.out is None:
        print(json.dumps(found, indent=1))
        return
    write_json(options.out, found)


if __name__ == "__main__":
    main()
