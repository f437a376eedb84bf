"""Who started this process, and how the others are found."""

import os

import pytest

from heptapod_fast.launchers import Ranks, find_ranks
from tests.running import command, finish, flags, refused, start

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "7",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "gpu[03-05,9],cpu1",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


def test_nobody():
    assert find_ranks({}) == find_ranks({"SLURM_NTASKS": "4"}) == Ranks()


def test_torchrun_goes_first():
    """Also inside of Slurm, whose tasks each start one torchrun."""
    expected = Ranks(3, 8, 1, 2, "torchrun")
    assert find_ranks(TORCHRUN) == find_ranks(SRUN | TORCHRUN) == expected


def test_srun():
    found = find_ranks(SRUN)
    assert (found.rank, found.size, found.local_rank, found.local_size) == (5, 7, 1, 2)
    assert found.address[0] == "gpu03" and 15_000 <= found.address[1] < 35_000
    # All tasks of a step meet at one place; another step, or job, at another.
    assert find_ranks(SRUN | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}).address == found.address
    assert find_ranks(SRUN | {"SLURM_STEP_ID": "1"}).address != found.address
    assert find_ranks(SRUN | {"SLURM_JOB_ID": "1235"}).address != found.address


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("gpu03", "gpu03"),
        ("gpu[03-05]", "gpu03"),
        ("gpu[7,9]-ib", "gpu7-ib"),
        ("a-1,b-2", "a-1"),
        ("rack1-gpu[003-004],x", "rack1-gpu003"),
        ("rack[0-1]node[2-3]", "rack0node2"),
    ],
)
def test_the_first_machine_of_a_list(nodes, first):
    assert find_ranks(SRUN | {"SLURM_STEP_NODELIST": nodes}).address[0] == first


@pytest.mark.parametrize("node, tasks", [(0, 2), (2, 2), (3, 1)])
def test_tasks_of_a_machine(node, tasks):
    assert find_ranks(SRUN | {"SLURM_NODEID": str(node)}).local_size == tasks


def test_one_task_is_alone():
    assert find_ranks(SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) == Ranks()


def test_where_to_meet_can_be_said():
    said = {"MASTER_ADDR": "head", "MASTER_PORT": "1"}
    assert find_ranks(SRUN | said).address is None
    assert find_ranks(SRUN | {"MASTER_PORT": "77"}).address == ("gpu03", 77)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_tasks_that_are_no_step_are_refused_with_the_command(rank):
    """Else there would be two worlds of one, in one run directory."""
    with pytest.raises(ValueError, match="srun python tools/.*torchrun"):
        find_ranks({"SLURM_PROCID": rank, "SLURM_NTASKS": "2", "SLURM_LOCALID": rank})
    assert find_ranks({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) == Ranks()


def test_open_mpi_on_one_machine():
    found = find_ranks(OPEN_MPI)
    assert (found.rank, found.size, found.local_rank, found.local_size) == (1, 2, 1, 2)
    assert found.address[0] == "127.0.0.1"


def test_mpich_and_intel():
    found = find_ranks(
        {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    )
    assert (found.rank, found.size, found.local_size) == (1, 2, 2)


def test_open_mpi_on_several_machines_has_to_be_told_where():
    spread = OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4"}
    with pytest.raises(ValueError, match="mpirun -x MASTER_ADDR=FIRST_HOST"):
        find_ranks(spread)
    found = find_ranks(spread | {"MASTER_ADDR": "head", "MASTER_PORT": "29500"})
    assert found.size == 4 and found.address is None


DAEMON = {  # of mpirun inside of a Slurm job: a step of one task on each machine
    "SLURM_PROCID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_STEP_NODELIST": "a,b",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


@pytest.mark.parametrize("mpi", [OPEN_MPI, HYDRA])
@pytest.mark.parametrize("slurm", [DAEMON, {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}])
def test_mpirun_inside_of_a_slurm_job(mpi, slurm):
    found = find_ranks(slurm | mpi)
    assert (found.rank, found.size, found.local_rank, found.local_size) == (1, 2, 1, 2)


def test_srun_that_speaks_pmi(monkeypatch):
    """srun --mpi=pmi2 sets PMI_RANK too, and says no more of the machine."""
    assert find_ranks(SRUN | {"PMI_RANK": "5", "PMI_SIZE": "7"}).launcher == "srun"


@pytest.mark.parametrize("size", [{}, {"WORLD_SIZE": "1"}])
def test_a_rank_beyond_the_world(size):
    with pytest.raises(ValueError, match="RANK is 1 and WORLD_SIZE"):
        find_ranks({"RANK": "1"} | size)


def test_help_and_what_needs_no_other_rank_are_for_every_process(tmp_path, monkeypatch):
    for name, value in {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}.items():
        monkeypatch.setenv(name, value)
    assert command("verify", "--help").code == 0
    assert command("train", "--help").code == 0
    result = command("train", *flags(out=tmp_path / "run", images=16))
    refused(result, "srun python tools/")
    assert not (tmp_path / "run").exists()


def test_nonsense_names_the_variable():
    with pytest.raises(ValueError, match="WORLD_SIZE is 'two'"):
        find_ranks({"RANK": "0", "WORLD_SIZE": "two"})
    with pytest.raises(ValueError, match="SLURM_STEP_TASKS_PER_NODE is ''"):
        find_ranks(SRUN | {"SLURM_STEP_TASKS_PER_NODE": ""})


def test_two_processes_of_srun_train_together(tmp_path):
    """As tasks of one step on this machine, with nothing but Slurm's variables."""
    step = SRUN | {
        "SLURM_NODEID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_JOB_ID": str(os.getpid()),
    }
    words = flags(out=tmp_path / "run", images=16)
    processes = [
        start("train", *words, **step | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)})
        for rank in range(2)
    ]
    results = [finish(process) for process in processes]
    assert [result.code for result in results] == [0, 0], results
    assert "2 ranks" in results[0].out and results[1].out.strip() == ""
