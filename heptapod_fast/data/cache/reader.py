"""Training batches from a cache of tokens: on the GPU, in shared memory, or streamed.

The three modes differ in where the rows are when a batch asks for them, in nothing else:

    gpu      the whole cache is a tensor on the device; a batch is one gather there
    ram      its files are mapped and read once at the start: the page cache holds them once for all
             processes of a machine, also for the next start
    stream   they are mapped, and a thread reads the shards of the next window ahead of time

Every byte is checked against the manifest when it is read. The order is `WindowedOrder`'s in every
mode, so that all modes, ranks and micro-batches see the same samples.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from heptapod_fast.data.cache.format import Cache, CacheError, size_damage
from heptapod_fast.data.order import WindowedOrder
from heptapod_fast.data.tokens import Batch
from heptapod_fast.rng import Rng
from heptapod_fast.storage import available_memory

MODES = ("auto", "gpu", "ram", "stream")
WINDOW = 65_536  # images, in whole shards: 8 of the usual ones, 2 GB of moments with mirror images
READERS = 4  # threads that read and verify
BLOCK = 1024  # samples; small enough that PyTorch wakes no other thread
_SHARE = 0.9  # of free memory that a cache may fill
_MAP_FIXED = 0x10  # <sys/mman.h>: at exactly this address; Python's mmap cannot
_READ = 2**22  # bytes that are copied and checked at once


class CacheTokens:
    """A cache as a `TokenSource`.

    Args:
        cache: from `open_cache`.
        seed: seed of the order, of the flips (stream "flip") and of kl16's posterior.
        flip: draw one of the views, all with equal probability; else the first one.
        device: where batches are returned.
        mode: gpu, ram, stream, or auto, the first of them that fits (`choose_mode`).
        why: the reason for the mode, for a caller that has chosen it; default `choose_mode`'s.
        share: (k, n) reads only every n-th shard from k on at the start in mode ram, where n
            processes of a machine share the reading.
        progress: called as progress(bytes read, bytes in all) at the start.

    Attributes:
        mode, why: gpu, ram or stream, and the reason for it.
        num_images, num_classes, class_names, fingerprint: see `TokenSource`. Images that could not
            be read when the cache was made are not among them.

    Raises:
        CacheError: damaged files, no other view for `flip`, or none without it.
        ValueError: the mode cannot be had here.
    """

    def __init__(
        self,
        cache: Cache,
        seed: int,
        flip: bool = False,
        device: torch.device | str = "cpu",
        mode: str = "auto",
        why: str | None = None,
        share: tuple[int, int] = (0, 1),
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if flip and cache.views < 2:
            raise CacheError(
                f"--flip: {cache.path} was built without mirrored images; build it "
                "with --flip, or train with --no-flip"
            )
        if not flip and not cache.augmentation.has_plain:
            raise CacheError(
                f"--no-flip: {cache.path} holds crops ({cache.augmentation}) and no plain view, it "
                "can only be trained on with --flip, which draws one of them"
            )
        self.cache = cache
        self.seed = seed
        self.flip = flip
        self.device = torch.device(device)
        self.mode, reason = choose_mode(cache, self.device, mode)
        self.why = why or reason
        rows = np.delete(np.arange(cache.rows), cache.broken_rows)
        self.num_images = len(rows)
        self.class_names = cache.class_names
        self.num_classes = len(cache.class_names)
        identity = f"{cache.fingerprint}/flip={int(flip)}"
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        # Image ids count the rows that could be read; shards hold fewer where some could not.
        self._rows = torch.from_numpy(rows)
        shard_rows = cache.manifest["shard_rows"]
        sizes = np.bincount(rows // shard_rows, minlength=cache.shards)
        self._order = WindowedOrder(sizes.tolist(), seed, window=-(-WINDOW // shard_rows))
        self._labels = torch.from_numpy(_labels(cache)).long().to(self.device)
        # Drawn for many samples at once: by themselves, batches cost as much to draw as to copy.
        self._block = lru_cache(maxsize=4)(
            lambda k: self._draw(torch.arange(k * BLOCK, (k + 1) * BLOCK))
        )
        # What `check` looks at: whether all tokens given so far were finite, asked of the device
        # only then, and the samples that they were of.
        self._unchecked: list[Tensor] = []
        self._finite = torch.ones((), dtype=torch.bool, device=self.device)
        self._hosts = {name: HostArray(cache, name) for name in cache.arrays}
        self._reader: _Ahead | None = None
        if self.mode == "stream":
            self._reader = _Ahead(self._order, partial(read_shards, cache, self._hosts))
        self._arrays = self._open(share, progress)

    def batch(self, index: Tensor) -> Batch:
        """(B,) int64 global sample indices -> the batch on `device`; a pure function."""
        index = index.detach().to("cpu").long()
        stored, labels = self.rows(index)
        there = index.to(self.device, non_blocking=True)
        cache = self.cache
        tokens = cache.tokenizer.from_stored(cache.spec, stored, Rng(self.seed), there)
        if tokens.is_floating_point():
            self._unchecked.append(index)
            self._finite = self._finite & tokens.isfinite().all()
        return Batch(tokens, labels, there)

    def check(self) -> None:
        """Raises CacheError if tokens given since the last call were not finite, and names their
        images. Waits for the device."""
        given = self._unchecked
        is_finite = bool(self._finite)
        self._unchecked = []
        self._finite = torch.ones((), dtype=torch.bool, device=self.device)
        if not is_finite:
            for index in given:
                self._refuse_not_finite(index)

    def _refuse_not_finite(self, index: Tensor) -> None:
        """CacheError if a stored value of these samples is not finite."""
        stored, _ = self.rows(index)
        for name, values in stored.items():
            bad = ~values.flatten(1).isfinite().all(1).cpu()
            if bad.any():
                sample = int(index[bad][0])
                image = self.sources(index[bad][:1])[0]
                raise CacheError(
                    f"{self.cache.path}: {name} is not finite for {int(bad.sum())} samples of "
                    f"a batch, of which sample {sample} is image {image} of the sorted files; "
                    f"python tools/verify.py {self.cache.path} lists all. Build it anew"
                )

    def rows(self, index: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """(B,) int64 global sample indices on the CPU -> stored rows (B, ...) of every array in
        the dtype of the cache, and labels (B,), on `device`."""
        if self._reader is not None:
            self._reader.ready(index)
        rows, places = self._choose(index)
        labels = self._labels[rows.to(self.device, non_blocking=True)]
        return {name: self._gather(flat, places) for name, flat in self._arrays.items()}, labels

    def _choose(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) samples -> their rows (B,), and the places of their views among all views of all
        rows (B,)."""
        if not len(index):
            return index, index
        first = int(index[0])
        stop = int(index[-1]) + 1
        is_range = stop - first == len(index) and bool((index.diff() == 1).all())
        if not is_range:
            return self._draw(index)
        blocks = [self._block(k) for k in range(first // BLOCK, (stop - 1) // BLOCK + 1)]
        rows, places = blocks[0]
        if len(blocks) > 1:
            rows = torch.cat([block[0] for block in blocks])
            places = torch.cat([block[1] for block in blocks])
        at = first % BLOCK
        return rows[at : at + len(index)], places[at : at + len(index)]

    def _draw(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """What `_choose` gives, drawn for these samples alone."""
        rows = self._rows[self._order.ids(index)]
        places = rows * self.cache.views
        if self.flip:
            places = places + Rng(self.seed).bits("flip", index, 1)[:, 0] % self.cache.views
        return rows, places

    def sources(self, index: Tensor) -> list[int]:
        """For global sample indices, which files they are: positions in the sorted list of the
        images that the cache was made from."""
        rows = self._choose(index)[0].numpy()
        return self.cache.read_index("source_index")[rows].tolist()

    def _gather(self, flat: Tensor, places: Tensor) -> Tensor:
        """(N * V, ...) and (B,) places on the CPU -> (B, ...) on `device`."""
        if flat.device.type != "cpu":
            return flat.index_select(0, places.to(self.device, non_blocking=True))
        # numpy gathers with one thread: several wait for the same memory, busily.
        host = flat.numpy()
        wanted = places.numpy()
        if self.device.type == "cpu":
            return torch.from_numpy(np.take(host, wanted, axis=0))
        pinned = torch.empty(len(places), *flat.shape[1:], dtype=flat.dtype, pin_memory=True)
        np.take(host, wanted, axis=0, out=pinned.numpy(), mode="clip")
        return pinned.to(self.device, non_blocking=True)

    def _open(
        self, share: tuple[int, int], progress: Callable[[int, int], None] | None
    ) -> dict[str, Tensor]:
        """Every array as (N * V, ...), all views of a row side by side."""
        cache = self.cache
        hosts = self._hosts
        mapped = {name: host.tensor for name, host in hosts.items()}
        if self.mode == "stream":
            return mapped
        if self.mode == "ram":
            mine, readers = share
            read_shards(cache, hosts, range(mine, cache.shards, readers), progress)
            return mapped
        found = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
            for name, tensor in mapped.items()
        }
        for shard in range(cache.shards):
            read_shards(cache, hosts, [shard])
            first, stop = cache.extent(shard)
            places = slice(first * cache.views, stop * cache.views)
            for name, tensor in mapped.items():
                found[name][places].copy_(tensor[places])
            if progress is not None:
                progress(shard + 1, cache.shards)
        return found


def choose_mode(
    cache: Cache, device: torch.device, mode: str, reserved: int = 0
) -> tuple[str, str]:
    """gpu, ram or stream, and why.

    reserved: bytes of a GPU's memory that are needed beside the cache.

    Raises:
        ValueError: a mode that is unknown, or that cannot be had on this device.
    """
    size = f"{cache.nbytes / 1e6:.1f} MB"
    if cache.nbytes >= 1e9:
        size = f"{cache.nbytes / 1e9:.2f} GB"
    if mode not in MODES:
        raise ValueError(f"--cache-mode {mode}: expected one of {', '.join(MODES)}")
    if mode == "gpu" and device.type != "cuda":
        raise ValueError(
            f"--cache-mode gpu: training runs on {device.type}; use ram, stream or auto"
        )
    if mode != "auto":
        return mode, f"{size}, asked for"
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        if cache.nbytes <= _SHARE * free - reserved:
            return "gpu", (
                f"{size} fit beside the {reserved / 1e9:.0f} GB of training into "
                f"{free / 1e9:.0f} GB"
            )
    memory = available_memory()
    if memory is None or cache.nbytes <= _SHARE * memory:
        return "ram", f"{size} fit into memory"
    return "stream", f"{size} are more than {_SHARE:.0%} of the {memory / 1e9:.1f} GB free"


def read_shards(
    cache: Cache,
    hosts: dict[str, HostArray],
    shards: Iterable[int],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Reads and verifies shards with a few threads; CacheError names all that are damaged."""
    jobs = [(host, shard) for shard in shards for host in hosts.values()]
    wrong = []
    with ThreadPoolExecutor(READERS) as pool:
        for done, text in enumerate(pool.map(lambda job: job[0].damage(job[1]), jobs), 1):
            if text:
                wrong.append(text)
            if progress is not None:
                progress(done, len(jobs))
    if wrong:
        raise CacheError(cache.damage_message(wrong))


class _Ahead:
    """Reads windows of shards in a thread, one ahead of the samples that are asked for."""

    def __init__(self, order: WindowedOrder, read: Callable[[tuple[int, ...]], None]) -> None:
        self._order = order
        self._read = read
        self._pool = ThreadPoolExecutor(1)
        self._windows: dict[int, Future] = {}  # by the sample index behind their last

    def ready(self, index: Tensor) -> None:
        """Waits until the shards of these samples are read; CacheError if they are damaged."""
        first = at = int(index.min())
        last = int(index.max())
        while at <= last:
            end = self._start(at)
            self._windows[end].result()
            at = end
        self._start(at)  # the window behind them
        for end in [end for end in self._windows if end <= first]:
            del self._windows[end]

    def _start(self, index: int) -> int:
        """Begins to read the window of a sample unless that was done; returns its end."""
        shards, end = self._order.shards_at(index)
        if end not in self._windows:
            self._windows[end] = self._pool.submit(self._read, shards)
        return end


def _labels(cache: Cache) -> np.ndarray:
    """(N,) int32; CacheError for labels that no class has."""
    labels = cache.read_index("labels")
    classes = len(cache.class_names)
    if labels.min() < 0 or labels.max() >= classes:
        raise CacheError(
            f"{cache.path}: labels are {labels.min()}..{labels.max()}, expected "
            f"0..{classes - 1}; build the cache anew"
        )
    return labels


class HostArray:
    """A sharded array as one tensor over its mapped files, not yet read.

    Shards lie side by side in the address space, each mapped from the start of its file. Where they
    cannot (shards of no whole number of pages, chunks in another order), the array is verified and
    read into memory instead.

    Attributes:
        tensor: (N * V, ...), codes as int16; not to be written to.
        is_mapped: whether it is a view of the files.

    Raises:
        CacheError: damage, where the array had to be read.
    """

    def __init__(self, cache: Cache, name: str) -> None:
        self._cache = cache
        self._name = name
        stored = cache.stored[name]
        self._part = cache.manifest["shard_rows"] * cache.row_bytes(name)
        # A file can be mapped to the start of a page only.
        are_pages = cache.shards == 1 or self._part % mmap.PAGESIZE == 0
        self.is_mapped = are_pages and all(cache.in_row_order(name, k) for k in range(cache.shards))
        if self.is_mapped:
            files = [cache.path / cache.shard_file(name, k) for k in range(cache.shards)]
            self._memory = _side_by_side(files, self._part, cache.rows * cache.row_bytes(name))
        else:
            cache.verify([cache.shard_file(name, shard) for shard in range(cache.shards)])
            whole = np.concatenate([cache.read_shard(name, k) for k in range(cache.shards)])
            self._memory = np.ascontiguousarray(whole).view(np.uint8).reshape(-1)
        # PyTorch gathers int16 everywhere, uint16 not; `from_stored` makes codes of either.
        dtype = "int16" if stored.dtype == "uint16" else stored.dtype
        values = self._memory.view(dtype).reshape(cache.rows * cache.views, *stored.shape)
        self.tensor = torch.from_numpy(values)

    def damage(self, shard: int) -> str:
        """Reads a shard and compares it with the manifest, through the mapping, so that what was
        checked is what will be used. Returns what is wrong, empty if nothing is."""
        import google_crc32c

        if not self.is_mapped:  # it was checked when it was read
            return ""
        name = self._cache.shard_file(self._name, shard)
        expected = self._cache.manifest["files"][name]
        wrong = size_damage(self._cache.path, name, expected["bytes"])
        if wrong:  # what lies behind the end of a file cannot be read
            return wrong
        value = 0
        data = self._memory[shard * self._part : (shard + 1) * self._part]
        for start in range(0, len(data), _READ):
            value = google_crc32c.extend(value, data[start : start + _READ].tobytes())
        with open(self._cache.path / name, "rb") as stream:  # where the chunks are, unmapped
            stream.seek(len(data))
            value = google_crc32c.extend(value, stream.read())
        if f"{value:08x}" == expected["crc32c"]:
            return ""
        return f"{name}: checksum does not match, the file was changed or damaged"


def _side_by_side(files: list[Path], part: int, total: int) -> np.ndarray:
    """(total,) uint8: the first `part` bytes of every file, one after the other."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int64,
    )
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

    def place(address: int | None, length: int, flags: int, descriptor: int) -> int:
        found = libc.mmap(address, length, mmap.PROT_READ, flags, descriptor, 0)
        if found is None or found == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), f"cannot map {length} bytes of the cache")
        return found

    # Room for all first, then every file to its place in it.
    base = place(None, total, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    memory = (ctypes.c_uint8 * total).from_address(base)
    weakref.finalize(memory, libc.munmap, base, total)
    for number, file in enumerate(files):
        with open(file, "rb") as stream:
            first = number * part
            length = min(part, total - first)
            place(base + first, length, mmap.MAP_SHARED | _MAP_FIXED, stream.fileno())
    return np.frombuffer(memoryview(memory), np.uint8)
