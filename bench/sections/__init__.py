"""The sections of bench/gpu.py, by worth.

Whether it is right at all; what everything is compared with; how fast it trains; the operations
with a gate (attention's heads of 80 are of the larger sizes); everything else.
"""

from bench.process import ROOT
from bench.sections import suites
from bench.sections.ceilings import CeilingsSection
from bench.sections.operations import LARGER, SLOW, Operation
from bench.sections.sampling import Sampling
from bench.sections.training import Baseline, Launching, LlamaSteps, SarSteps, Steps
from bench.sections.work import Section

GATED = ("layer_norm", "adaln", "linear_cross_entropy", "adamw_ema", "diffusion_loss")
OTHERS = ("diffusion_mlp", "bias_gelu", "gather_rows", "flow_loss", "swiglu", "rms_norm", "rotary")
OPERATIONS = ("attention", *GATED, *OTHERS)
ONE_SIZE = ("diffusion_loss", "flow_loss")  # their cases are kinds of tokens
BESIDE = {"adaln": ("diffusion_mlp",), "flow_loss": ("diffusion_loss",)}


def operation(name: str, which: str = "size B") -> Operation:
    """A section of one operation, with the bench files that it shares code with."""
    return Operation(name, which, BESIDE.get(name, ()))


def by_worth() -> list[Section]:
    """All sections of this checkout."""
    found: list[Section] = [suites.SMOKE, CeilingsSection(), Steps("B"), Launching()]
    found += [operation("attention"), operation("attention", LARGER)]
    found += [operation(name) for name in GATED]
    found += [suites.ATTENTION, suites.ALL]
    if (ROOT / "tests" / "ladder").is_dir():
        found.append(suites.LADDER)
    found += [Steps("L"), Steps("H"), LlamaSteps("B"), LlamaSteps("L")]
    found += [SarSteps("B"), Sampling()]
    found += [Baseline(size) for size in ("B", "L", "H")]
    found += [operation(name) for name in OTHERS]
    found += [operation(name, LARGER) for name in (*GATED, *OTHERS) if name not in ONE_SIZE]
    found.append(operation("adamw_ema", SLOW))
    return found


SECTIONS: dict[str, Section] = {section.name: section for section in by_worth()}
