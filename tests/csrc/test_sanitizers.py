"""The CUDA operators' own tests once more, under the address and undefined-behaviour sanitizers.

The sanitizers take the place of the emulation's checks of single accesses (both want the compiler's
instrumentation); vectors, barriers and shuffles are checked as ever.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from heptapod_fast.ops import library
from tests.csrc import emulator
from tests.running import ROOT, environment

TESTS = ("test_adamw_ema.py", "test_global_norm.py", "test_philox.py")


pytestmark = pytest.mark.slow


def runtimes() -> list[str]:
    """What must be loaded before all else; [] where the compiler has no address sanitizer.

    The C++ library too, or the sanitizer would find no exceptions to watch: Python has none.
    """
    found = []
    for name in ("libasan.so", "libstdc++.so.6"):
        words = [emulator.compiler(), f"-print-file-name={name}"]
        done = subprocess.run(words, capture_output=True, text=True)
        found.append(done.stdout.strip())
    return found if all(Path(path).is_absolute() for path in found) else []


@pytest.fixture(scope="module")
def sanitized():
    """sanitized(*words): Python, finished, with the sanitizers' emulation."""
    if emulator.why_not() is not None:
        pytest.skip(emulator.why_not())
    if not library.available("cpu"):
        pytest.skip(library.status())
    if not runtimes():
        pytest.skip("the C++ compiler has no libasan.so; g++ brings it")
    settings = {
        "LD_PRELOAD": ":".join(runtimes()),
        # Python and PyTorch keep memory to their end.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        emulator.SANITIZERS: "1",
    }

    def run(*words):
        return subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=ROOT,
            env=environment(**settings),
            capture_output=True,
            text=True,
        )

    probe = run("-c", "pass")
    if probe.returncode:
        pytest.skip(f"the address sanitizer does not start here: {probe.stderr[:300]}")
    return run


def test_the_operators_tests_pass_under_the_sanitizers(sanitized):
    paths = [ROOT / "tests" / "ops" / name for name in TESTS]
    # torch.compile and opcheck are about the operators' registration, and take most of the time.
    wanted = "emulated and not opcheck and not compile"
    # -s: what a sanitizer says before it ends the process would be lost.
    done = sanitized("-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-k", wanted, *paths)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "ERROR: AddressSanitizer" not in done.stderr


CHANGED = """
from tests.csrc import battery, emulator

edit = emulator.Edit("philox.cu", {old!r}, {new!r})
emulation = emulator.Emulation(emulator.library([edit], emulator.SANITIZED))
battery.words(emulation)
"""


@pytest.mark.parametrize(
    "old, new, told",
    [
        ("i < items;", "i <= items;", "AddressSanitizer: heap-buffer-overflow"),
        (
            "low0 = c0 * philox::kMultiplier0,",
            "low0 = int(c0) * int(philox::kMultiplier0),",
            "runtime error: signed integer overflow",
        ),
    ],
)
def test_the_sanitizers_see(sanitized, old, new, told):
    done = sanitized("-c", CHANGED.format(old=old, new=new))
    assert done.returncode != 0
    assert told in done.stderr
