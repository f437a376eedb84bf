"""Several processes that call functions of a test file together (gloo).

def check_sums():
    ...                                        collective calls

if __name__ == "__main__":
    ranks.work(globals())                      runs every check_..., prints what came of it

ranks.outcomes(__file__, 2)                    [{"sums": "" or a traceback}, one per rank]
ranks.all_well(those)          fails with the tracebacks
"""

import datetime
import json
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PREFIX = "check_"


def checks(namespace):
    """{name: function} of everything named check_NAME."""
    return {
        name.removeprefix(PREFIX): function
        for name, function in sorted(namespace.items())
        if name.startswith(PREFIX)
    }


def work(namespace):
    """One process: {name of a check: "" or how it failed} as the last line, in JSON."""
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=600))
    outcome = {}
    for name, check in checks(namespace).items():
        try:
            check()
            outcome[name] = ""
        except Exception:
            outcome[name] = traceback.format_exc()
    print(json.dumps(outcome), flush=True)
    torch.distributed.destroy_process_group()


def outcomes(file, ranks, **environment):
    """What every rank of a test file printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, file],
            env=shared | environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    found = []
    for process in processes:
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, out + err
        found.append(json.loads(out.splitlines()[-1]))
    return found


def all_well(outcomes):
    """Every check of every rank went well."""
    failed = [
        f"rank {rank}, {name}: {text}"
        for rank, outcome in enumerate(outcomes)
        for name, text in outcome.items()
        if text
    ]
    assert not failed, "\n".join(failed)
    assert all(outcomes)
