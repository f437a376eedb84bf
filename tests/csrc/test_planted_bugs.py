"""Bugs that are planted in csrc/ one by one must be caught (mutants.py); battery.py has the checks.

The list is what says that the checks see anything, so it grows with the kernels. What was said to
sources and checks that did not change is in verdicts.json; the rest is planted.
"""

import json
import subprocess
import sys

import pytest
import torch

from heptapod_fast.ops import library
from tests.csrc import battery, emulator, mutants, verdicts
from tests.running import ROOT, environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(emulator.why_not() is not None, reason=str(emulator.why_not())),
    pytest.mark.skipif(not library.available("cpu"), reason=library.status()),
]


# Planted anew in every run, one of each kind: that the machinery works here is not taken on trust.
ALWAYS = (
    "step: no barrier before the plan is read",
    "norm: threads leave before the barrier",
    "norm: the block's sum reads what no warp has written",
    "copies: neighbours change places",
    "step: gradients are written",
    "words: a counter of 31 bits",
)


class Judge:
    """judge(edits): what the checks say to sources with these changes, or None. They run in a
    process of their own."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.csrc.battery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment(),
        )
        return self

    def __exit__(self, *error):
        self._process.stdin.close()
        assert self._process.wait(timeout=60) == 0

    def __call__(self, edits, flags=emulator.CHECKED, checks=tuple(battery.CHECKS)):
        path = str(emulator.library(edits, flags))
        request = {"library": path, "seed": self.seed, "checks": checks}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())["caught"]


@pytest.fixture(scope="module")
def judge():
    with Judge(seed=int(torch.randint(2**31, ()))) as found:
        yield found


@pytest.mark.parametrize("bug", mutants.PLANTED)
def test_a_planted_bug_is_caught(judge, bug):
    if bug == mutants.CONTRACTED and not emulator.has_fma():
        pytest.skip("no fused multiply-adds that the compiler has to be told of")
    edits, told = mutants.PLANTED[bug]
    caught = None if bug in ALWAYS else verdicts.recorded(bug)
    if caught is None:
        caught = judge(edits)
    assert caught is not None, "the checks are content"
    assert told in caught


def test_the_bugs_that_are_always_planted_are_on_the_list():
    assert set(ALWAYS) <= mutants.PLANTED.keys()


@pytest.mark.parametrize("what", mutants.SMALL)
def test_smaller_limits_change_nothing(judge, what):
    assert judge(mutants.SMALL[what]) is None


def test_the_sources_as_they_are_pass(judge):
    assert judge([]) is None


def test_the_fibers_of_other_processors_pass(judge):
    """Those of x86 are changed by a few instructions of our own, all others by the C library."""
    flags = (*emulator.CHECKED, "-DEMULATION_UCONTEXT")
    assert judge([], flags, ("words", "norms", "further_averages")) is None
