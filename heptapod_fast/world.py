"""The ground floor: the ranks that take part, the device of this one, and its precision.

Every rank holds a contiguous block of the global batch; all else is a function of the global sample
index, so that nothing has to be broadcast or kept in step.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from heptapod_fast.allocator import keep_freed_memory
from heptapod_fast.launchers import Ranks, find_ranks

Result = TypeVar("Result")


# How long ranks wait for each other until training runs: data may have to be encoded by then.
PATIENCE_AT_START = timedelta(minutes=30)
# How long one that lost others waits for the accounts of those that are still there.
SECONDS_FOR_ACCOUNTS = 3.0
_OF_COMMUNICATION = (
    "Connection closed by peer",
    "Connection reset",
    "Connection refused",
    "Broken pipe",
    "Timed out waiting",
    "timed out",
    "NCCL",
)


class OtherRankFailed(RuntimeError):
    """Another rank failed and says why; this one stops with it and has nothing to add."""


class LostRank(RuntimeError):
    """Another rank is gone without a word, or does not come to where the others wait for it."""


@dataclass
class Whereabouts:
    """What a rank is doing, for the others to be told if one is lost. at: such as "step 12"."""

    at: str = "the start"


@dataclass(frozen=True)
class World:
    """This process among `size` ranks.

    Attributes:
        local_rank: its number on its machine.
        local_size: ranks on its machine.
        group: whom collective calls reach; None for the group of all that `start` made.
        store: what all ranks read and write, whatever becomes of the others; None for one rank.
        whereabouts: of this rank.
    """

    rank: int
    size: int
    device: torch.device
    local_rank: int = 0
    local_size: int = 1
    group: dist.ProcessGroup | None = None
    store: dist.Store | None = None
    whereabouts: Whereabouts = field(default_factory=Whereabouts, compare=False)

    @property
    def main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Sum of a tensor over ranks, in place. Collective call: every rank must reach it."""
        if self.size > 1:
            dist.all_reduce(value, group=self.group)
        return value

    def every(self, flag: Tensor) -> Tensor:
        """Whether a 0-dim bool tensor is true on every rank; the host does not wait for it.
        Collective call."""
        if self.size == 1:
            return flag
        value = flag.to(torch.int32)
        dist.all_reduce(value, op=dist.ReduceOp.MIN, group=self.group)
        return value.bool()

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is up on any rank. Collective call, between the hosts: nobody
        waits for a device."""
        if self.size == 1:
            return flags
        value = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.group)
        return tuple(bool(v) for v in value.tolist())

    def gather(self, value: Tensor) -> list[Tensor]:
        """Tensors of one shape from all ranks, on rank 0, in the order of ranks; elsewhere an empty
        list. Collective call.

        Raises:
            OtherRankFailed: rank 0 has ended, and said why.
        """
        if self.size == 1:
            return [value]
        value = value.to(self.device).contiguous()
        found = [torch.empty_like(value) for _ in range(self.size)] if self.main else None
        try:
            dist.gather(value, found, group=self.group)
        except RuntimeError as error:
            if self.main:
                raise
            text = f"rank {self.rank} stops: rank 0, which takes its results, is gone ({error})"
            raise OtherRankFailed(text) from error
        return found or []

    def barrier(self) -> None:
        """Wait for all ranks. Collective call."""
        self.any(False)

    def apart(self, patience: timedelta) -> World:
        """The same ranks for another thread: its collective calls must not mix with those of this
        one. On the hosts. Collective call.

        patience: how long they wait for each other.
        """
        if self.size == 1:
            return self
        group = dist.new_group(backend="gloo", timeout=patience)
        return replace(self, device=torch.device("cpu"), group=group)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that fails on all ranks or on none, so that none is left waiting for the others.
        Collective call: every rank must reach it, and within it nothing else is collective.

        Raises:
            OtherRankFailed: the block failed on another rank alone, or on rank 0 too, which then
                says why for all: most often they have found the same.
        """
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        failed, main_failed = self.any(error is not None, error is not None and self.main)
        is_said_elsewhere = error is None or (main_failed and not self.main)
        if failed and is_said_elsewhere:
            raise OtherRankFailed(f"rank {self.rank} stops: another rank failed, and says why")
        if error is not None:
            raise error

    def same(self, **texts: str) -> None:
        """Refuse to go on where ranks differ in what should be the same for all. Collective call.

        Args:
            texts: by the name that an error calls them by, "_" for a blank.

        Raises:
            ValueError: names the first rank that differs from rank 0, and in what.
            OtherRankFailed: on the other ranks.
        """
        digests = [hashlib.sha256(text.encode()).digest() for text in texts.values()]
        mine = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8)
        found = self.gather(mine.view(len(texts), -1))
        with self.together():
            for rank, theirs in enumerate(found):
                for name, one, other in zip(texts, found[0], theirs, strict=True):
                    if not torch.equal(one, other):
                        raise ValueError(
                            f"rank {rank} has other {name.replace('_', ' ')} than rank 0: the same "
                            "command, code and data are needed on all machines"
                        )

    def wait_at_most(self, patience: timedelta, groups: Sequence[dist.ProcessGroup] = ()) -> None:
        """From now on ranks are taken for lost that others wait for as long as this, in the main
        group and in these."""
        if self.size == 1:
            return
        for group in (dist.group.WORLD, *groups):
            dist.distributed_c10d._set_pg_timeout(patience, group)

    def fail(self, error: Exception) -> NoReturn:
        """Raise an error that all ranks have found: one of them says it.

        Raises:
            error: on rank 0.
            OtherRankFailed: on the others.
        """
        if self.main:
            raise error
        raise OtherRankFailed(f"rank {self.rank} stops: rank 0 says why") from error

    def check_in(self) -> None:
        """Leave word of where this rank is, now and then."""
        if self.store is not None:
            self.store.set(f"seen/{self.rank}", self.whereabouts.at)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A block in which the loss of another rank is an error that names it.

        Raises:
            LostRank: it is gone, or has kept this one waiting for too long.
        """
        try:
            yield
        except RuntimeError as error:
            text = str(error)
            is_of_torch = type(error) is RuntimeError or isinstance(error, dist.DistError)
            is_lost = is_of_torch and any(words in text for words in _OF_COMMUNICATION)
            if self.store is None or not is_lost:
                raise
            first_line = text.splitlines()[0][:200]
            raise LostRank(f"{self._account(self.store)} ({first_line})") from error

    def _account(self, store: dist.Store) -> str:
        """Which ranks do not answer, and where they were seen last."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        silent = others
        seen = {}
        try:
            store.set(f"waiting/{self.rank}", self.whereabouts.at)
            deadline = time.monotonic() + SECONDS_FOR_ACCOUNTS
            while silent and time.monotonic() < deadline:
                time.sleep(0.1)
                silent = [rank for rank in others if not store.check([f"waiting/{rank}"])]
            for rank in silent:
                if store.check([f"seen/{rank}"]):
                    seen[rank] = store.get(f"seen/{rank}").decode()
        except RuntimeError:  # rank 0, which may hold the store, is gone
            silent = [0]
        here = f"rank {self.rank} waits at {self.whereabouts.at}"
        if not silent:
            return f"{here}: the connection between the ranks is lost, all of them are there"
        names = [f"rank {rank} (last seen at {seen.get(rank, 'the start')})" for rank in silent]
        return f"{here}, no word from {', '.join(names)}: gone, or hanging"

    def main_first(self, work: Callable[[], Result]) -> Result:
        """work() on rank 0, then on the others, which find the files that it left. It fails on all
        ranks or on none, as with `together`. Collective call."""
        with self.together():
            if self.main:
                result = work()
        with self.together():
            if not self.main:
                result = work()
        return result


ALONE = World(0, 1, torch.device("cpu"))


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """--device auto takes CUDA where there is one. ValueError if it is asked for and missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cuda":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device (a CPU build of torch?)")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"rank {local_rank} of this machine has no GPU: there are "
            f"{torch.cuda.device_count()} (torchrun --nproc_per_node, srun --ntasks-per-node)"
        )
    return torch.device("cuda", local_rank)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """--precision auto takes bf16 where the hardware multiplies it natively."""
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with AMX and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    amx = " with AMX" if torch.cpu._is_amx_tile_supported() else ""
    return f"{names[0] if names else 'CPU'}{amx}, {torch.get_num_threads()} threads"


def processor_kind() -> str:
    """The instruction sets that decide how PyTorch rounds on this CPU, such as "AVX512 + bf16" or
    "AVX512 + bf16 + amx"; off x86 the architecture comes first: "aarch64 SVE256".

    The same program may give other last bits where this differs: vectors of another length are
    summed in another order, and libraries choose other algorithms. Equal kinds promise little more:
    libraries also look at who made the processor.
    """
    machine = platform.machine()
    kind = torch.backends.cpu.get_cpu_capability()  # ATEN_CPU_CAPABILITY can lower it
    if machine not in ("x86_64", "AMD64"):
        kind = f"{machine} {kind}"
    parts = [kind]
    if torch.cpu._is_avx512_bf16_supported():
        parts.append("bf16")
    if torch.cpu._is_amx_tile_supported():
        parts.append("amx")
    return " + ".join(parts)


# Whether this process has joined others; that is not undone by `stop`.
has_joined = False


def start(device: str = "auto", patience: timedelta = PATIENCE_AT_START) -> World:
    """The world that torchrun, srun or mpirun set up, or a world of one.

    patience: how long ranks wait for each other before they take one for lost.

    Raises:
        ValueError: a device that is not here, or one of several processes that cannot find the
            others; says what to change.
    """
    ranks = find_ranks()
    chosen = choose_device(device, _gpu_of(ranks))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    else:
        keep_freed_memory()
    store = None
    if ranks.size > 1:
        global has_joined
        has_joined = True
        where = "env://"
        if ranks.address is not None:
            host, port = ranks.address
            where = f"tcp://{host}:{port}"
        store, _, _ = next(dist.rendezvous(where, ranks.rank, ranks.size, timeout=patience))
        # What processes that torchrun has restarted since left there is not for these.
        store = dist.PrefixStore(f"attempt-{ranks.attempt}", store)
        dist.init_process_group(
            # Flags and checkpoints go between the hosts, whatever the device.
            "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", store),
            rank=ranks.rank,
            world_size=ranks.size,
            timeout=patience,
        )
    return World(ranks.rank, ranks.size, chosen, ranks.local_rank, ranks.local_size, store=store)


def _gpu_of(ranks: Ranks) -> int:
    """The number of the GPU that belongs to this process. srun and mpirun may show every process
    its own GPU alone (srun --gpus-per-task=1), which is number 0 for each."""
    shows_all = ranks.launcher in ("", "torchrun")
    if not shows_all and torch.cuda.is_available() and torch.cuda.device_count() == 1:
        return 0
    return ranks.local_rank


def stop(world: World) -> None:
    """Leave the process group."""
    if world.size > 1:
        dist.destroy_process_group()
