"""What was said to planted bugs before, by a hash of everything that it follows from.

    python -m tests.csrc.verdicts     plants the bugs that the file does not know, and notes them

Planting all of them takes minutes of compiling; a bug in sources that did not change, looked at by
checks that did not change, is caught as it was. As with the figures of kernels that were compiled
offline (bench/results/offline.json), the file is committed and only what is new is done again.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from tests.csrc import emulator, mutants

ROOT = Path(__file__).resolve().parents[2]
FILE = Path(__file__).with_name("verdicts.json")
HERE = Path(__file__).parent


def key(bug: str) -> str:
    """A hash of the sources with the bug in them, the emulation, and the checks."""
    edits, _ = mutants.PLANTED[bug]
    changed = emulator.edited(edits)
    texts = {name: changed[name] for name in (*reached(changed), "CMakeLists.txt")}
    own = [*sorted(emulator.HEADERS.iterdir()), HERE / "emulator.py", HERE / "battery.py"]
    texts |= {path.name: path.read_text() for path in own}
    digest = hashlib.sha256()
    for name in sorted(texts):
        digest.update(f"{name}\0{texts[name]}\0".encode())
    return digest.hexdigest()[:32]


def reached(texts: dict[str, str]) -> set[str]:
    """The CUDA sources, the operators of the CPU that they are compared with, and what these
    include: nothing else in csrc/ has a say."""
    cuda = {name for name in texts if name.endswith(".cu")}
    sources = cuda | {name.replace(".cu", ".cpp") for name in cuda}
    return sources.union(*(emulator.included(texts[name], texts) for name in sources))


def known() -> dict[str, dict[str, str]]:
    """{bug: its key then, and what caught it}."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def recorded(bug: str, noted: dict[str, dict[str, str]] | None = None) -> str | None:
    """What caught the bug as it is planted now, if that was noted. noted: default, `known`."""
    entry = (known() if noted is None else noted).get(bug, {})
    return entry.get("caught") if entry.get("key") == key(bug) else None


def main() -> None:
    """Plant what the file does not know."""
    from tests.csrc.test_planted_bugs import Judge

    noted = known()
    found = {}
    with Judge(seed=0) as judge:
        for number, bug in enumerate(mutants.PLANTED, 1):
            caught = recorded(bug, noted)
            how = "as before"
            if caught is None:
                caught = judge(mutants.PLANTED[bug][0])
                how = "planted"
            if caught is None:
                sys.exit(f"{bug}: the checks are content")
            # The first line says it; what follows are numbers of this run.
            first_line = caught.splitlines()[0].replace(f"{ROOT}/", "")
            found[bug] = {"key": key(bug), "caught": first_line[:200]}
            print(
                f"{number}/{len(mutants.PLANTED)}  {how}  {bug}: {found[bug]['caught']}", flush=True
            )
            # Ended in between, it goes on from here.
            kept = {bug: entry for bug, entry in (noted | found).items() if bug in mutants.PLANTED}
            FILE.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
