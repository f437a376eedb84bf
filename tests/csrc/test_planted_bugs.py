"""Bugs that are planted in csrc/ one by one must be caught (mutants.py); battery.py has the checks.

The list is what says that the checks see anything, so it grows with the kernels.
"""

import json
import subprocess
import sys

import pytest
import torch

from heptapod_fast.ops import library
from tests.csrc import battery, emulator, mutants
from tests.running import ROOT, environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(emulator.why_not() is not None, reason=str(emulator.why_not())),
    pytest.mark.skipif(not library.available("cpu"), reason=library.status()),
]


@pytest.fixture(scope="module")
def judge():
    """judge(edits): what the checks say to sources with these changes, or None."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.csrc.battery"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(),
    )

    def ask(edits, flags=emulator.CHECKED, checks=tuple(battery.CHECKS)):
        seed = int(torch.randint(2**31, ()))
        path = str(emulator.library(edits, flags))
        request = {"library": path, "seed": seed, "checks": checks}
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())["caught"]

    yield ask
    process.stdin.close()
    assert process.wait(timeout=60) == 0


@pytest.mark.parametrize("bug", mutants.PLANTED)
def test_a_planted_bug_is_caught(judge, bug):
    if bug == mutants.CONTRACTED and not emulator.has_fma():
        pytest.skip("no fused multiply-adds that the compiler has to be told of")
    edits, told = mutants.PLANTED[bug]
    caught = judge(edits)
    assert caught is not None, "the checks are content"
    assert told in caught


@pytest.mark.parametrize("what", mutants.SMALL)
def test_smaller_limits_change_nothing(judge, what):
    assert judge(mutants.SMALL[what]) is None


def test_the_sources_as_they_are_pass(judge):
    assert judge([]) is None


def test_the_fibers_of_other_processors_pass(judge):
    """Those of x86 are changed by a few instructions of our own, all others by the C library."""
    flags = (*emulator.CHECKED, "-DEMULATION_UCONTEXT")
    assert judge([], flags, ("words", "norms", "further_averages")) is None
