"""The embedded default from nothing to measured samples: what `make demo` runs after installing."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Fewer than the size's own: on two cores the demo should be over in five minutes, with installing.
IMAGES = 110_000

NEXT = """
Next, in this folder:
    source .venv/bin/activate                          once per shell
    python tools/sample.py {out} --classes 0,4 --out grid.png
    python tools/train.py --size tiny --images 300000 --out {out}        trains on
    python tools/train.py --size tiny --data FOLDER --image-size 32      your own images
    python tools/train.py --size B --data synthetic --dry-run            the paper's sizes"""


def step(*words: str) -> None:
    """Print a command as a user would type it, and run it; ends with the command's exit code if it
    fails."""
    print(f"\n$ python {' '.join(words)}", flush=True)
    done = subprocess.run([sys.executable, *words], cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)


def work() -> None:
    """Train, measure, report; the picture is copied to demo.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/demo", help="run directory")
    parser.add_argument("--minutes", type=float, default=7.0, help="limit of the training time")
    parser.add_argument("--images", type=int, default=IMAGES, help="training images (%(default)s)")
    given = parser.parse_args()
    begin = time.monotonic()
    training = ["--size", "tiny", "--out", given.out, "--minutes", f"{given.minutes:g}"]
    step("tools/train.py", *training, "--images", str(given.images))
    step("tools/evaluate.py", given.out, "--count", "400")
    step("tools/report.py", given.out)
    run = ROOT / given.out
    shutil.copyfile(run / "evaluation.png", ROOT / "demo.png")
    results = json.loads((run / "evaluation.json").read_text())
    print(
        f"\nsamples            demo.png (a row per class: 2-fold, 3-fold, ... symmetry)\n"
        f"symmetry accuracy  {results['symmetry_accuracy']:.3f} over {results['samples']} "
        f"samples\n"
        f"copies             {results['copy_share']:.1%} of the samples lie as near to a "
        f"training image as the nearest\n"
        f"                   {results['copy_share_fresh']:.1%} of images never trained on\n"
        f"report             {given.out}/report.md\n"
        f"time               {time.monotonic() - begin:.0f} s without the installation"
    )
    print(NEXT.format(out=given.out))


if __name__ == "__main__":
    work()
