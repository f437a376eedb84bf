"""Tables of compared runs: a plan of what is compared, running it, and the table that comes of it.
tools/_ablations.py has the lists of the papers."""

from heptapod_fast.ablations.plan import Ablation, Scale, Variant, make_rows, read_plan
from heptapod_fast.ablations.running import run_plan
from heptapod_fast.ablations.table import write_table

__all__ = [
    "Ablation",
    "Scale",
    "Variant",
    "make_rows",
    "read_plan",
    "run_plan",
    "write_table",
]
