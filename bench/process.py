"""Commands that end at a deadline, with everything they started."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CUT_OFF = 124  # exit code of a command that ran into its deadline


def run(command: Sequence[str], deadline: float) -> tuple[int, str]:
    """Run a command in the checkout.

    Args:
        deadline: on `time.monotonic()`; the command and all its children are killed then.

    Returns:
        (exit code, CUT_OFF at the deadline; stdout and stderr together).
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
        code = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        code = CUT_OFF
    return code, output.replace(str(ROOT), ".")


def environment() -> dict[str, str]:
    """This checkout first; what the user put on PYTHONPATH stays."""
    paths = [str(ROOT)]
    before = os.environ.get("PYTHONPATH")
    if before:
        paths.append(before)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
