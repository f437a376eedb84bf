"""Checkpoints that are written while training goes on.

    begin    copies the state to buffers on the host, and lets a thread write them
    failed   whether what it wrote has failed; asked between steps
    settle   waits for the thread

The thread of every rank calls `checkpoints.save`, which is collective, through a process group of
its own: training's messages go on beside it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heptapod_fast import checkpoints, shards
from heptapod_fast.checkpoints import CheckpointError
from heptapod_fast.ops import sharded
from heptapod_fast.world import World

Files = Mapping[str, Mapping[str, Tensor]]

# How long ranks wait for each other while one of them writes.
PATIENCE = timedelta(hours=1)
GRACE_SECONDS = 60


class Saver:
    """Writes one checkpoint at a time.

    Args:
        in_background: False: `begin` returns when all is on the disk, and needs no copy.

    Attributes:
        world: the ranks, in a group of their own that waits long.
    """

    def __init__(self, world: World, in_background: bool = True):
        self.in_background = in_background
        self.world = world.apart(PATIENCE)
        self._device = world.device
        self._buffers = HostBuffers(world)
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None

    def begin(self, folder: Path, files: Files, state: dict[str, Any], keep: int) -> None:
        """Start to write a checkpoint; the arguments are those of `checkpoints.save`. Waits for the
        one before. Training may change the tensors as soon as it returns. Collective call.

        Raises:
            CheckpointError: on every rank: the one before was not written, or this one, where it
                is not written in the background.
        """
        self.settle()
        if not self.in_background:
            self.write(folder, files, state, keep)
            return
        copies = self._buffers.copy(files)
        self._thread = threading.Thread(
            target=self._write,
            args=(lambda: checkpoints.save(folder, copies, state, keep, self.world),),
            name="checkpoint",
            # A process that ends because another rank is gone must not wait for it here.
            daemon=True,
        )
        self._thread.start()

    def write(self, folder: Path, files: Files, state: dict[str, Any], keep: int | None) -> None:
        """Write now, after what is being written. Collective call.

        Raises:
            CheckpointError: on every rank; not of the one before.
        """
        if self._thread is not None:
            self._thread.join()
        checkpoints.save(folder, files, state, keep, self.world)

    def _write(self, save: Callable[[], object]) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # a thread begins with the first GPU
        try:
            save()
        except CheckpointError as error:
            self._error = error
        except BaseException as error:
            self._error = CheckpointError(f"{type(error).__name__}: {error}")

    @property
    def failed(self) -> bool:
        """Whether the last one could not be written, as far as this rank knows by now."""
        return self._error is not None

    def settle(self) -> None:
        """Wait until nothing is being written.

        Raises:
            CheckpointError: what was could not be; said once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error = self._error
        self._error = None
        if error is not None:
            raise error

    def close(self) -> None:
        """The end of a session, which may be an error: what is being written gets a minute."""
        if self._thread is not None:
            self._thread.join(GRACE_SECONDS)


class HostBuffers:
    """Copies of tensors on the host, in memory that stays: the second copy finds its pages there.

    Args:
        world: the ranks, on the device of the tensors.
    """

    def __init__(self, world: World):
        self._world = world
        self._device = world.device
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._meshes: dict[Any, Any] = {}

    def copy(self, files: Files) -> dict[str, dict[str, Tensor]]:
        """The same names with tensors on the host, valid until the next call; DTensors as such,
        with a copy of this rank's part. What other ranks write (`shards.share`) is not copied.
        Collective call where a mesh is seen for the first time."""
        copies: dict[str, dict[str, Tensor]] = {}
        for file, tensors in files.items():
            copies[file] = dict(tensors)
            for name in shards.share(tensors, self._world):
                tensor = tensors[name]
                part = sharded.local(tensor.detach(), "a checkpoint", name)
                buffer = self._buffer((file, name), part)
                buffer.copy_(part, non_blocking=True)
                copies[file][name] = self._like(tensor, buffer)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return copies

    def _buffer(self, key: tuple[str, str], part: Tensor) -> Tensor:
        if key not in self._buffers:
            is_pinned = self._device.type == "cuda"
            self._buffers[key] = torch.empty(part.shape, dtype=part.dtype, pin_memory=is_pinned)
        return self._buffers[key]

    def _like(self, tensor: Tensor, buffer: Tensor) -> Tensor:
        """A DTensor of the buffer where the tensor is one."""
        layout = sharded.layout(tensor)
        if layout is None:
            return buffer
        from torch.distributed.tensor import DTensor

        mesh, placements = layout
        return DTensor.from_local(
            buffer,
            self._on_the_host(mesh),
            placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )

    def _on_the_host(self, mesh: Any) -> Any:
        """The same ranks in the same order, on the host."""
        from torch.distributed.device_mesh import DeviceMesh

        if mesh.device_type == "cpu":
            return mesh
        if mesh not in self._meshes:
            self._meshes[mesh] = DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)
        return self._meshes[mesh]
