"""Faults on request, so that tests can show what survives them. Nothing happens by default.

HEPTAPOD_FAULT="ACTION@POINT" acts once, where the program passes POINT:
    actions  kill9: the process dies at once; sleep: it waits for a minute (or to be killed)
    points   step=N: gradients of step N are there, the update is not; and while the checkpoint of
             step N is written: files=N: tensors written, manifest=N: all but the new name,
             rename=N: committed, older ones not yet removed; while a cache is built: shard=N: the
             arrays of shard N are written, its record is not; manifest: all but the manifest
"""

from __future__ import annotations

import os
import signal
import time


def point(name: str) -> None:
    """Pass a point; acts if HEPTAPOD_FAULT names it."""
    action, _, where = os.environ.get("HEPTAPOD_FAULT", "").partition("@")
    if where != name:
        return
    if action == "kill9":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "sleep":
        print(f"sleeping at {name}", flush=True)
        time.sleep(60)
