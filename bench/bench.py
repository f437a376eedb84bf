"""Stands in for the folder `bench` where one of its files is run as a script.

`python bench/bench_adaln.py` puts bench/ on Python's path, not the folder above it, so that
`from bench import harness` finds this file. It becomes a package whose modules are its neighbours,
and puts the checkout on the path, as pytest does.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)
__path__ = [str(ROOT / "bench")]
