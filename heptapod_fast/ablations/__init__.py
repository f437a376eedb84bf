"""The papers' tables at any size: what is compared, running it, and the table that comes of it."""

from heptapod_fast.ablations.defined import ABLATIONS
from heptapod_fast.ablations.plan import Ablation, Scale, Variant, make_plan, read_plan
from heptapod_fast.ablations.running import run_plan
from heptapod_fast.ablations.table import write_table

__all__ = [
    "ABLATIONS",
    "Ablation",
    "Scale",
    "Variant",
    "make_plan",
    "read_plan",
    "run_plan",
    "write_table",
]
