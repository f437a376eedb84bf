"""Who started this process: torchrun, Slurm's srun, an MPI's mpirun, or nobody.

Standard library only: the command line asks it before anything heavy is imported.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

_PORTS = 20_000  # how many ports jobs are spread over
_FIRST_PORT = 15_000
TORCHRUN = "torchrun --nproc_per_node=PROCESSES tools/..."


@dataclass(frozen=True)
class Ranks:
    """This process among those that were started together.

    Attributes:
        rank: 0 <= rank < size. local_rank: among those of this machine. local_size: their number.
        launcher: what started them, for messages; "" where there is one process.
        address: (host, port) where they meet; None where the environment says it (MASTER_ADDR and
            MASTER_PORT), or there is one process.
        attempt: how often torchrun has restarted the processes before.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str = ""
    address: tuple[str, int] | None = None
    attempt: int = 0


def find_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """What the environment says. One process where it says nothing.

    Raises:
        ValueError: one of several processes that cannot find the others; says how to start them.
    """
    if "RANK" in environment:
        return _torchrun(environment)
    # Within a Slurm job mpirun starts its processes by srun, one on each machine, whose numbers
    # they inherit: MPI's own go first.
    if "OMPI_COMM_WORLD_RANK" in environment:
        names = ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
        return _mpi(environment, "Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", names)
    if "PMI_RANK" in environment and "MPI_LOCALNRANKS" in environment:
        names = ("MPI_LOCALRANKID", "MPI_LOCALNRANKS")
        return _mpi(environment, "MPI", "PMI_RANK", "PMI_SIZE", names)
    if "SLURM_PROCID" in environment:
        return _slurm(environment)
    return Ranks()


def _torchrun(environment: Mapping[str, str]) -> Ranks:
    rank = _number(environment, "RANK", 0)
    size = _number(environment, "WORLD_SIZE", 1)
    if not 0 <= rank < size:
        raise ValueError(
            f"RANK is {rank} and WORLD_SIZE {environment.get('WORLD_SIZE', 'not set')}: expected a "
            f"rank below the number of processes, as {TORCHRUN} sets them"
        )
    return Ranks(
        rank,
        size,
        _number(environment, "LOCAL_RANK", 0),
        _number(environment, "LOCAL_WORLD_SIZE", 1),
        "torchrun",
        attempt=_number(environment, "TORCHELASTIC_RESTART_COUNT", 0),
    )


def _slurm(environment: Mapping[str, str]) -> Ranks:
    """Tasks of a step that srun has started. In a batch script, which is no step, the process that
    runs the script carries the numbers of the first task as well."""
    rank = _number(environment, "SLURM_PROCID", 0)
    if "SLURM_STEP_NUM_TASKS" not in environment:
        tasks = _number(environment, "SLURM_NTASKS", 1)
        if tasks > 1:
            raise ValueError(
                f"SLURM_NTASKS is {tasks}, but this process is no task of a step: start all of "
                f"them with srun python tools/..., or with {TORCHRUN}; to start one alone, put "
                "SLURM_NTASKS=1 in front of the command"
            )
        return Ranks()
    size = _number(environment, "SLURM_STEP_NUM_TASKS", 1)
    if size == 1:
        return Ranks()
    local_size = _tasks_here(environment)
    return Ranks(
        rank,
        size,
        _number(environment, "SLURM_LOCALID", 0),
        local_size,
        "srun",
        _meeting_place(
            environment,
            _first_host(environment.get("SLURM_STEP_NODELIST", "127.0.0.1")),
            f"{environment.get('SLURM_JOB_ID', '')}.{environment.get('SLURM_STEP_ID', '')}",
        ),
    )


def _tasks_here(environment: Mapping[str, str]) -> int:
    """Tasks on this machine, from a list such as "4(x2),1": two machines with 4, one with 1."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    counts: list[int] = []
    for count, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    node = _number(environment, "SLURM_NODEID", 0)
    if node < len(counts):
        return counts[node]
    raise ValueError(
        f"SLURM_STEP_TASKS_PER_NODE is {text!r}, which does not say how many tasks run on node "
        f"{node}: start with {TORCHRUN} under srun --ntasks-per-node=1"
    )


def _first_host(nodes: str) -> str:
    """The first machine of a list such as "gpu[03-05,9],cpu1": gpu03."""
    # Of every list in brackets its first number, then what stands before the first comma.
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).split(",")[0]


def _mpi(
    environment: Mapping[str, str], name: str, rank: str, size: str, local: tuple[str, str]
) -> Ranks:
    processes = _number(environment, size, 1)
    if processes == 1:
        return Ranks()
    local_size = _number(environment, local[1], 0)
    address = None
    if local_size == processes:
        job = environment.get("PMIX_NAMESPACE", environment.get("OMPI_MCA_ess_base_jobid", ""))
        address = _meeting_place(environment, "127.0.0.1", job)
    elif "MASTER_ADDR" not in environment or "MASTER_PORT" not in environment:
        raise ValueError(
            f"{name} started {processes} processes on several machines, nothing says where they "
            "meet: mpirun -x MASTER_ADDR=FIRST_HOST -x MASTER_PORT=29500 ..., or start with "
            f"{TORCHRUN} on each machine"
        )
    return Ranks(
        _number(environment, rank, 0),
        processes,
        _number(environment, local[0], 0),
        local_size or 1,
        name,
        address,
    )


def _meeting_place(environment: Mapping[str, str], host: str, job: str) -> tuple[str, int] | None:
    """Where the processes of a job meet: as the environment says, else on a port of the job's own,
    so that two jobs on one machine do not meet each other."""
    if "MASTER_ADDR" in environment and "MASTER_PORT" in environment:
        return None
    own = int.from_bytes(hashlib.blake2b(job.encode(), digest_size=4).digest(), "little")
    port = _number(environment, "MASTER_PORT", _FIRST_PORT + own % _PORTS)
    return environment.get("MASTER_ADDR", host), port


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name)
    if text is None:
        return default
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(
            f"the environment variable {name} is {text!r}: expected a number"
        ) from error
