"""Freed memory stays with the process: no page of it has to be taken anew."""

import platform
import subprocess
import sys

import pytest

# Minor page faults of the last of three rounds, each of which takes and frees 64 MiB. As bytes:
# PyTorch asks for aligned blocks, for which glibc 2.36 looks less far among those that are free.
COUNTED = """
import resource
from heptapod_fast.allocator import keep_freed_memory
{call}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
size = 2**26
for _ in range(3):
    before = faults()
    b"x" * size
    taken = faults() - before
print(taken)
"""


def faults(call):
    words = [sys.executable, "-c", COUNTED.format(call=call)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc")
def test_pages_are_taken_once():
    pages = 2**26 // 4096
    assert faults("assert keep_freed_memory()") < pages / 100
    assert faults("") > pages / 2000  # the check can fail: huge pages may make them few
