"""Ranks: who takes part, which part of the batch is whose, and the sums over all.

Data parallel in its plainest form: every rank holds the whole model, takes a contiguous block of
the global batch and adds its gradients to everybody's. All else is a function of the global sample
index, so nothing has to be broadcast or kept in step.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among `size` ranks; `local`: its number on its machine, and how many it has."""

    rank: int
    size: int
    device: torch.device
    local: tuple[int, int] = (0, 1)

    @property
    def main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def sum_gradients(self, parameters: list[Tensor]) -> None:
        """Add up the gradients of all ranks, in place and in one message."""
        if self.size == 1:
            return
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        parts = flat.split([p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad.copy_(part.view_as(parameter))

    def sum(self, value: Tensor) -> Tensor:
        """Sum of a tensor over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is up on any rank."""
        if self.size == 1:
            return flags
        value = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return tuple(bool(v) for v in value.tolist())

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """--device auto takes CUDA where there is one. ValueError if it is asked for and missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no CUDA device (a CPU build of torch?)")
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"rank {local_rank} of this machine has no GPU: there are "
                f"{torch.cuda.device_count()} (torchrun --nproc_per_node)"
            )
        return torch.device("cuda", local_rank)
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with AMX and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    amx = " with AMX" if torch.cpu._is_amx_tile_supported() else ""
    return f"{names[0] if names else 'CPU'}{amx}, {torch.get_num_threads()} threads"


def start(device: str = "auto", patience: timedelta = timedelta(minutes=10)) -> World:
    """The world that torchrun set up, or a world of one.

    patience: how long ranks wait for each other before they take one for lost.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    chosen = choose_device(device, local[0])
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size > 1:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=patience)
    return World(rank, size, chosen, local)


def stop(world: World) -> None:
    """Leave the process group."""
    if world.size > 1:
        dist.destroy_process_group()
