"""Failing together, and what a process says of its machine."""

import platform
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from torch.distributed import HashStore, PrefixStore

from heptapod_fast import launchers, world
from heptapod_fast.checkpoints import CheckpointError
from heptapod_fast.world import LostRank, OtherRankFailed, World, processor_kind


class OneOfTwo(World):
    """A rank beside another one, of which `others` says what it answers: (it failed, it is rank 0
    and failed), question after question."""

    others: list

    def any(self, *flags):
        other = self.others.pop(0)
        return tuple(ours or theirs for ours, theirs in zip(flags, other, strict=True))


def one_of_two(rank, *others):
    world = OneOfTwo(rank, 2, torch.device("cpu"))
    object.__setattr__(world, "others", list(others))
    return world


FINE = (False, False)
RANK_0_FAILED = (True, True)
RANK_1_FAILED = (True, False)


@pytest.mark.parametrize(
    "rank, fails, other, raised",
    [
        (0, False, FINE, None),
        (0, True, FINE, ValueError),
        (0, True, RANK_1_FAILED, ValueError),
        (0, False, RANK_1_FAILED, OtherRankFailed),
        (1, False, FINE, None),
        (1, True, FINE, ValueError),
        (1, True, RANK_0_FAILED, OtherRankFailed),
        (1, False, RANK_0_FAILED, OtherRankFailed),
    ],
)
def test_ranks_fail_together_and_one_says_why(rank, fails, other, raised):
    world = one_of_two(rank, other)

    def work():
        with world.together():
            if fails:
                raise ValueError("of this rank")

    if raised is None:
        work()
    else:
        with pytest.raises(raised):
            work()
    assert world.others == []  # it was asked, whatever happened here


def test_rank_0_works_before_the_others():
    worked = []
    for rank, questions_before in ((0, 0), (1, 1)):
        world = one_of_two(rank, FINE, FINE)

        def work(world=world):
            worked.append(2 - len(world.others))
            return "made"

        assert world.main_first(work) == "made"
        assert worked.pop() == questions_before
        assert world.others == []


def test_the_others_do_not_begin_where_rank_0_failed():
    world = one_of_two(1, RANK_0_FAILED)
    with pytest.raises(OtherRankFailed, match="another rank failed"):
        world.main_first(lambda: pytest.fail("rank 1 began"))


def kind_with(monkeypatch, machine: str, capability: str, bf16: bool, amx: bool) -> str:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    return processor_kind()


def test_a_kind_of_processor_names_its_instruction_sets(monkeypatch):
    assert kind_with(monkeypatch, "x86_64", "AVX2", False, False) == "AVX2"
    assert kind_with(monkeypatch, "x86_64", "AVX512", True, False) == "AVX512 + bf16"
    assert kind_with(monkeypatch, "x86_64", "AVX512", True, True) == "AVX512 + bf16 + amx"


def test_off_x86_the_architecture_stands_first(monkeypatch):
    assert kind_with(monkeypatch, "aarch64", "SVE256", False, False) == "aarch64 SVE256"


def test_the_kind_of_this_machine_is_the_same_in_every_process():
    code = "from heptapod_fast.world import processor_kind; print(processor_kind())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == processor_kind()


@pytest.mark.parametrize(
    "environment, where",
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "env://"),
        (
            {
                "OMPI_COMM_WORLD_RANK": "1",
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
                "MASTER_PORT": "1234",
            },
            "tcp://127.0.0.1:1234",
        ),
    ],
)
def test_ranks_meet_where_the_launcher_says_and_wait_as_long_as_they_are_told(
    monkeypatch, environment, where
):
    asked = {}
    monkeypatch.setattr(world, "has_joined", False)  # and taken back: this process joins nobody
    monkeypatch.setattr(world.dist, "init_process_group", lambda *a, **k: asked.update(k))
    met = []

    def rendezvous(where, *who, **patience):
        met.append((where, who, patience))
        yield HashStore(), *who

    monkeypatch.setattr(world.dist, "rendezvous", rendezvous)
    monkeypatch.setattr(world, "find_ranks", lambda: launchers.find_ranks(environment))
    found = world.start("cpu", timedelta(days=7))
    assert (found.rank, found.size) == (1, 2)
    assert world.has_joined
    assert met == [(where, (1, 2), {"timeout": timedelta(days=7)})]
    assert isinstance(asked.pop("store"), PrefixStore)
    assert asked == {
        "rank": 1,
        "world_size": 2,
        "timeout": timedelta(days=7),
    }


@pytest.mark.parametrize(
    "launcher, seen, expected", [("srun", 1, 0), ("srun", 4, 3), ("Open MPI", 1, 0)]
)
def test_a_process_that_is_shown_one_gpu_takes_it(monkeypatch, launcher, seen, expected):
    """As srun --gpus-per-task=1 shows them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    ranks = launchers.Ranks(3, 4, 3, 4, launcher)
    assert world._gpu_of(ranks) == expected
    assert world._gpu_of(launchers.Ranks(3, 4, 3, 4, "torchrun")) == 3


def test_a_rank_whose_main_one_is_gone_stops_without_a_word_of_its_own(monkeypatch):
    def broken(*arguments, **more):
        raise RuntimeError("connection closed by peer")

    monkeypatch.setattr(world.dist, "gather", broken)
    value = torch.zeros(2)
    with pytest.raises(OtherRankFailed, match="rank 0, which takes its results, is gone"):
        World(1, 2, torch.device("cpu")).gather(value)
    with pytest.raises(RuntimeError, match="connection closed"):
        World(0, 2, torch.device("cpu")).gather(value)


def account(monkeypatch, answers, seen):
    """What rank 0 of three says when the connection breaks. answers: ranks that do, too."""
    monkeypatch.setattr(world, "SECONDS_FOR_ACCOUNTS", 0.3)
    store = HashStore()
    for rank in answers:
        store.set(f"waiting/{rank}", "step 7")
    for rank, at in seen.items():
        store.set(f"seen/{rank}", at)
    ours = World(0, 3, torch.device("cpu"), store=store)
    ours.whereabouts.at = "step 7"
    with pytest.raises(LostRank) as error, ours.watched():
        raise RuntimeError("Timed out waiting 4000ms for recv operation to complete\nmore")
    return str(error.value)


def test_a_rank_that_does_not_come_is_named(monkeypatch):
    text = account(monkeypatch, answers=[2], seen={1: "step 5", 2: "step 5"})
    assert (
        "rank 0 waits at step 7, no word from rank 1 (last seen at step 5): gone, or hanging"
        in text
    )
    assert text.endswith("(Timed out waiting 4000ms for recv operation to complete)")


def test_several_ranks_that_do_not_come_are_named(monkeypatch):
    text = account(monkeypatch, answers=[], seen={2: "step 5"})
    assert "no word from rank 1 (last seen at the start), rank 2 (last seen at step 5)" in text


def test_a_connection_that_breaks_among_living_ranks_is_no_lost_rank(monkeypatch):
    text = account(monkeypatch, answers=[1, 2], seen={})
    assert "the connection between the ranks is lost, all of them are there" in text


def test_other_errors_go_through_as_they_are():
    ours = World(0, 2, torch.device("cpu"), store=HashStore())
    with pytest.raises(RuntimeError, match="a bug") as error, ours.watched():
        raise RuntimeError("a bug")
    assert not isinstance(error.value, LostRank)
    for kind in (ValueError, OtherRankFailed, CheckpointError):
        with pytest.raises(kind, match="Timed out waiting"), ours.watched():
            raise kind("Timed out waiting")


def test_a_rank_leaves_word_of_where_it_is():
    store = HashStore()
    ours = World(1, 2, torch.device("cpu"), store=store)
    ours.whereabouts.at = "step 9"
    ours.check_in()
    assert store.get("seen/1") == b"step 9"
    World(0, 1, torch.device("cpu")).check_in()


def test_a_process_on_a_cpu_keeps_freed_memory(monkeypatch):
    asked = []
    monkeypatch.setattr(world, "keep_freed_memory", lambda: asked.append(1))
    world.start("cpu")
    assert asked == [1]
