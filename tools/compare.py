"""Whether two checkouts train and sample alike, bit for bit.

    python tools/compare.py BEFORE AFTER

For a change that should not change results. Each case trains the smallest run with both checkouts,
through their command lines, and compares everything that comes out: the loss, gradient norm and
rate of every step, weights, averages and both moments after every step (the first moment after the
first step is a tenth of the gradient), and sampled images. Both must be built (`make venv` in each)
and run on one machine; give other interpreters with --python. Exit code 1 if anything differs.

    python tools/compare.py BEFORE AFTER --speed

Both train the embedded default side by side, and take turns of a few steps, so that whatever else
the machine does meets both alike. What is printed is how many times as fast AFTER is.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# A step each 8 images, a checkpoint after every one.
SMALLEST = {
    "size": "tiny",
    "width": 32,
    "heads": 2,
    "depth": 2,
    "batch": 8,
    "images": 40,
    "logogram-count": 64,
    "log-every": 8,
    "checkpoint-every": 8,
    "keep-checkpoints": 99,
    "sample-every": 40,
    "device": "cpu",
}
HEAD = {"head-depth": 2}
CODES = {"tokenizer": "patch-vq", "codes": 16}
VECTORS = {"tokenizer": "patch", "diffusion-blocks": 2, "diffusion-width": 32}
LOCAL = {"head": "local", "window": 9, "density": 2}
DROPOUT = {"dropout": 0.1}
FLOW = {"token-loss": "flow"}
ROWS = {"grouping": "next-row", "injection": "shift"}

CASES: dict[str, dict[str, object]] = {
    "global, codes": HEAD | CODES,
    "global, codes, dropout": HEAD | CODES | DROPOUT,
    "global, codes, uniform steps, weight by step": HEAD
    | CODES
    | {"steps": "uniform", "loss-weight": "step"},
    "global, codes, micro-batches, two averages, float32": HEAD
    | CODES
    | {"micro-batch": 2, "ema": "0.9 0.999", "precision": "fp32"},
    "global, vectors": HEAD | VECTORS,
    "global, vectors, dropout": HEAD | VECTORS | DROPOUT,
    "local, codes": HEAD | CODES | LOCAL,
    "local, codes, dropout": HEAD | CODES | LOCAL | DROPOUT,
    "local, vectors, dropout": HEAD | VECTORS | LOCAL | DROPOUT,
    "1d-raster, codes, dropout": {"system": "1d-raster"} | CODES | DROPOUT,
    "1d-raster, vectors": {"system": "1d-raster"} | VECTORS,
    "1d-random, codes": {"system": "1d-random"} | CODES,
    "1d-random, vectors, dropout": {"system": "1d-random"} | VECTORS | DROPOUT,
    "global, vectors, flow": HEAD | VECTORS | FLOW,
    "llamagen, codes, dropout": {"system": "llamagen"} | CODES | DROPOUT,
    "npp, codes, dropout": {"system": "npp", "levels": 2} | CODES | DROPOUT,
    "sar, vectors, dropout": {"system": "sar"} | VECTORS | DROPOUT,
    "sar, codes, rows": {"system": "sar"} | CODES | ROWS,
    "global, codes, dropout, 2 ranks": HEAD | CODES | DROPOUT | {"ranks": 2},
    "local, vectors, 2 ranks": HEAD | VECTORS | LOCAL | {"ranks": 2},
    "1d-random, codes, dropout, 2 ranks": {"system": "1d-random"} | CODES | DROPOUT | {"ranks": 2},
}
# How a finished run is sampled; the second takes more than one position a step, which only heptapod
# can.
SAMPLINGS: tuple[dict[str, object], ...] = ({}, {"positions-per-step": 4, "temperature": 0.8})
# Of metrics.jsonl, what depends on the machine.
OF_THE_MACHINE = ("images_per_second", "seconds", "tflops", "memory_peak_gb")


def words(flags: dict[str, object]) -> list[str]:
    """Flags as they are typed."""
    found = []
    for name, value in flags.items():
        found += [f"--{name}", *str(value).split()]
    return found


def run(checkout: Path, python: Path, arguments: list[str], ranks: int = 1) -> None:
    """A command of a checkout; SystemExit with its output if it fails."""
    command = [str(python)]
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
        command += ["--master_addr=127.0.0.1", f"--master_port={port}"]
    # One thread each: how a sum is spread over threads changes its rounding.
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        # The checkout's own code, whichever one the interpreter has installed.
        "PYTHONPATH": str(checkout),
    }
    done = subprocess.run(
        [*command, *arguments],
        cwd=checkout,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        raise SystemExit(f"{checkout}: {' '.join(arguments)} failed:\n{done.stdout[-3000:]}")


def results(checkout: Path, python: Path, case: dict[str, object], out: Path) -> None:
    """Train and sample one case into `out`."""
    flags = SMALLEST | case | {"out": out}
    ranks = int(str(flags.pop("ranks", 1)))
    run(checkout, python, ["tools/train.py", *words(flags)], ranks)
    is_heptapod = "system" not in case
    for number, sampling in enumerate(SAMPLINGS if is_heptapod else SAMPLINGS[:1]):
        picture = {"count": 6, "out": out / f"{number}.png", "save-npz": out / f"{number}.npz"}
        run(checkout, python, ["tools/sample.py", str(out), *words(picture | sampling)])


def differences(before: Path, after: Path) -> Iterator[str]:
    """What differs between the results of two checkouts."""
    import numpy as np

    if records(before / "metrics.jsonl") != records(after / "metrics.jsonl"):
        yield "metrics.jsonl"
    names = {path.relative_to(before) for path in before.rglob("*.safetensors")}
    names |= {path.relative_to(after) for path in after.rglob("*.safetensors")}
    for name in sorted(names):
        if not (before / name).exists() or not (after / name).exists():
            yield f"{name} is missing"
        elif (before / name).read_bytes() != (after / name).read_bytes():
            yield str(name)
    arrays = {path.name for folder in (before, after) for path in folder.glob("*.npz")}
    for array in sorted(arrays):
        if not (before / array).exists() or not (after / array).exists():
            yield f"{array} is missing"
            continue
        old = np.load(before / array)
        new = np.load(after / array)
        same_names = sorted(old) == sorted(new)
        if not same_names or any(not np.array_equal(old[key], new[key]) for key in old):
            yield array


def records(path: Path) -> list[dict]:
    """Records without what depends on the machine."""
    found = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        found.append({name: value for name, value in record.items() if not depends(name)})
    return found


def depends(name: str) -> bool:
    """Whether a number of a record depends on the machine."""
    return name in OF_THE_MACHINE or name.endswith("_seconds")


# ------------------------------------------------------------------------------------------- speed

# Trains by the checkout's command line, and stops before every STEPS-th batch until it is told to
# go on; says how long the steps between took. Arguments: STEPS, then the words of the command.
RUNNER = """
import os, runpy, sys, time
from heptapod_fast.data.tokens import TokenizedImages

steps = int(sys.argv[1])
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what training prints is no answer
batch = TokenizedImages.batch
asked = 0
begin = None

def waiting(self, index):
    global asked, begin
    if asked % steps == 0:
        answers.write("ready\\n" if begin is None else f"{time.perf_counter() - begin}\\n")
        answers.flush()
        if not sys.stdin.readline():
            os._exit(0)
        begin = time.perf_counter()
    asked += 1
    return batch(self, index)

TokenizedImages.batch = waiting
sys.argv = ["tools/train.py", *sys.argv[2:]]
sys.path.insert(0, "tools")
runpy.run_path("tools/train.py", run_name="__main__")
"""
DEFAULT_RUN = "--size tiny --device cpu --images 100000000 --logogram-count 500 --log-every 3200"
SPEED_CASES = {
    "codes": (20, DEFAULT_RUN),
    "vectors": (8, f"{DEFAULT_RUN} --tokenizer patch"),
}
WARM_UP_TURNS = 2


class Runner:
    """Training in another process, a few steps at a time."""

    def __init__(self, checkout: Path, python: Path, steps: int, flags: str, out: Path):
        command = [str(python), "-c", RUNNER, str(steps), *shlex.split(flags)]
        command += ["--sample-every", "0", "--checkpoint-every", "100000000", "--out", str(out)]
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command,
            cwd=checkout,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(checkout)},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
        )
        self._answer()

    def turn(self) -> float:
        """Seconds of the next few steps."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        if not answer:
            self.errors.seek(0)
            raise SystemExit(f"training ended:\n{self.errors.read()[-3000:]}")
        return answer

    def stop(self) -> None:
        """End the process; nothing of it is kept."""
        self.process.kill()
        self.process.communicate()
        self.errors.close()


def speed(checkouts: list[Path], pythons: list[Path], case: str, turns: int) -> str:
    """How many times as fast the second checkout trains, in words."""
    steps, flags = SPEED_CASES[case]
    seconds: list[list[float]] = [[], []]
    with tempfile.TemporaryDirectory() as folder:
        runners = [
            Runner(checkout, python, steps, flags, Path(folder) / str(i))
            for i, (checkout, python) in enumerate(zip(checkouts, pythons, strict=True))
        ]
        for turn in range(WARM_UP_TURNS + turns):
            order = (0, 1) if turn % 2 else (1, 0)
            for i in order:
                seconds[i].append(runners[i].turn())
        for runner in runners:
            runner.stop()
    before, after = (each[WARM_UP_TURNS:] for each in seconds)
    ratios = [old / new for old, new in zip(before, after, strict=True)]
    first, _, third = statistics.quantiles(ratios, n=4)
    old = 1e3 * statistics.median(before) / steps
    new = 1e3 * statistics.median(after) / steps
    return (
        f"{old:.1f} ms a step before, {new:.1f} after; {statistics.median(ratios):.3f} times as "
        f"fast (median of {turns} turns of {steps} steps, quartiles {first:.3f} to {third:.3f})"
    )


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, help="checkout, built")
    parser.add_argument("after", type=Path, help="checkout, built")
    parser.add_argument(
        "--python", type=Path, nargs=2, help="interpreters (default: .venv/bin/python of each)"
    )
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--speed", action="store_true", help="how fast they train, in turns")
    parser.add_argument("--turns", type=int, default=30, help="of --speed, at least 2")
    options = parser.parse_args()
    checkouts = [options.before.resolve(), options.after.resolve()]
    pythons = options.python or [checkout / ".venv/bin/python" for checkout in checkouts]
    known: dict[str, object] = {**(SPEED_CASES if options.speed else CASES)}
    names = [name for name in known if options.only in name]
    if not names:
        raise SystemExit(
            f"--only {options.only}: no case has this in its name; there are: {'; '.join(known)}"
        )
    if options.turns < 2:
        raise SystemExit(f"--turns {options.turns}: expected at least 2")
    if options.speed:
        absolute = [Path(python).absolute() for python in pythons]
        for name in names:
            print(f"{name:10} {speed(checkouts, absolute, name, options.turns)}", flush=True)
        return 0
    chosen = {name: CASES[name] for name in names}
    wrong = 0
    for name, case in chosen.items():
        with tempfile.TemporaryDirectory() as folder:
            outs = [Path(folder) / "before", Path(folder) / "after"]
            for checkout, python, out in zip(checkouts, pythons, outs, strict=True):
                results(checkout, Path(python).absolute(), case, out)
            found = list(differences(*outs))
        wrong += bool(found)
        verdict = f"DIFFERS: {', '.join(found[:6])}" if found else "equal"
        print(f"{name:52} {verdict}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
