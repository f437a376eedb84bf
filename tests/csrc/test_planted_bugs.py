"""Bugs that are planted in csrc/ one by one must be caught (mutants.py); battery.py has the checks.

The list is what says that the checks see anything, so it grows with the kernels.
"""

import json
import subprocess
import sys

import pytest
import torch

from heptapod_fast.ops import library
from tests.csrc import emulator, mutants
from tests.running import ROOT, environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(emulator.why_not() is not None, reason=str(emulator.why_not())),
    pytest.mark.skipif(not library.available("cpu"), reason=library.status()),
]


@pytest.fixture(scope="module")
def judge():
    """judge(edits): what the checks say to the sources with these changes, or None."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.csrc.battery"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(),
    )

    def ask(edits):
        seed = int(torch.randint(2**31, ()))
        request = {"library": str(emulator.library(edits)), "seed": seed}
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
