"""Faults on request, so that tests can show what survives them. Nothing happens by default.

HEPTAPOD_FAULT="ACTION@POINT" or "ACTION@POINT,rank=R" acts once, where the program passes POINT (on
rank R alone); not in processes that torchrun has restarted:
    actions  kill9: the process dies at once; sleep: it waits for a minute (or to be killed); wait:
             it waits for a signal, and goes on when its handler has run; raise: a ValueError
    points   step=N: gradients of step N are there, the update is not; and while the checkpoint of
             step N is written: files=N: tensors written, manifest=N: all but the new name,
             rename=N: committed, older ones not yet removed; while a cache is built: shard=N: the
             arrays of shard N are written, its record is not; manifest: all but the manifest; while
             samples are written: written=N: N images are in the outputs, which the journal does not
             say; recorded=N: it does; complete: outputs are whole, which it does not say;
             publish=NAME: all but their names from this one on
"""

from __future__ import annotations

import os
import signal
import socket
import time


def point(name: str) -> None:
    """Pass a point; acts if HEPTAPOD_FAULT names it."""
    action, _, where = os.environ.get("HEPTAPOD_FAULT", "").partition("@")
    place, _, rank = where.partition(",rank=")
    is_restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if is_restarted or place != name or rank not in ("", os.environ.get("RANK", "0")):
        return
    if action == "kill9":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "sleep":
        print(f"sleeping at {name}", flush=True)
        time.sleep(60)
    elif action == "raise":
        raise ValueError(f"asked to fail at {name}")
    elif action == "wait":
        _wait_for_a_signal(f"waiting at {name}")


def _wait_for_a_signal(announcement: str) -> None:
    """Whichever thread of the process gets it, and also if it comes at once."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno())
    # In one piece: several ranks say it at the same moment.
    print(f"{announcement}\n", end="", flush=True)
    reader.recv(1)
    signal.set_wakeup_fd(before)
    reader.close()
    writer.close()
