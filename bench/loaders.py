"""What bench_loader.py reads: the same random moments in three layouts, and a loader for each."""

from __future__ import annotations

import functools
import io
import itertools
import os
import random
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from heptapod_fast.data.cache import reader as reading
from heptapod_fast.data.cache.builder import Builder
from heptapod_fast.data.cache.format import open_cache
from heptapod_fast.data.cache.plan import Plan
from heptapod_fast.data.cache.reader import CacheTokens
from heptapod_fast.data.cache.site import Site, lock_cache
from heptapod_fast.data.entries import FolderFile
from heptapod_fast.data.files import ImageFiles
from heptapod_fast.data.views import Views
from heptapod_fast.tokenizers import KL16, token_spec

WINDOW = 8  # shards
BATCH, CLASSES, SEED = 256, 100, 0
BUFFER, INITIAL = 1000, 100  # WebDataset's shuffle buffer, and from when on it gives samples
PEER = "MAR npz, 2 workers"


# --------------------------------------------------------------------------------------- the data


@dataclass(frozen=True)
class Made:
    """Samples and where they lie. values: (N, 2 views, mean and std, 16, 16, 16) float16; labels:
    (N,) int64."""

    folder: Path
    values: np.ndarray
    labels: np.ndarray

    @property
    def places(self) -> dict[str, Path]:
        """Layout -> its folder."""
        return {
            "cache": self.folder / "cache.zarr",
            "npz": self.folder / "npz",
            "tar": self.folder / "tar",
        }

    @cached_property
    def known(self) -> dict[bytes, int]:
        """First bytes of a mean -> N * views index."""
        heads = np.ascontiguousarray(self.values[:, :, 0, 0, 0, :8]).reshape(-1, 8)
        return {row.tobytes(): number for number, row in enumerate(heads)}


class _Given(Builder):
    """Writes a cache as tools/cache.py does, but of moments that are there already."""

    def __init__(self, site: Site, values: np.ndarray) -> None:
        super().__init__(site)
        self._values = values

    def _decoded(self, sources):
        yield SimpleNamespace(at=0, reasons=[None] * len(sources))

    def _encode(self, batch, shard):
        for number, name in enumerate(("mean", "std")):
            shard.arrays[name][:] = self._values[shard.sources, :, number]


def write_cache(made: Made, shard_rows: int) -> None:
    names = tuple(f"{label:03d}" for label in range(CLASSES))
    files = [
        (FolderFile(made.folder, f"{names[label]}/{n:08d}.png"), int(label))
        for n, label in enumerate(made.labels)
    ]
    about = {"tokenizer": "kl16", "image_size": 256, "weights": None, "fingerprint": "random"}
    tokenizer = SimpleNamespace(
        spec=token_spec("kl16", 256),
        image_size=256,
        device=torch.device("cpu"),
        describe=lambda: about,
        stored_arrays=KL16.stored_arrays,
        has_codebook=False,
    )
    plan = Plan(
        ImageFiles(made.folder, "random", names, files),
        tokenizer,
        SimpleNamespace(preprocessing="none"),
        augmentation=Views("flip"),
        batch=BATCH,
        seed=SEED,
        shard_rows=shard_rows,
        max_broken=0,
    )
    with lock_cache(made.places["cache"]):
        site = Site(made.places["cache"], plan)
        site.begin()
        _Given(site, made.values).build(site.missing())
        site.finish()


def write_npz(made: Made) -> None:
    for n, label in enumerate(made.labels):
        folder = made.places["npz"] / f"{label:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        views = made.values[n].astype(np.float32).reshape(2, 32, 16, 16)
        np.savez(folder / f"{n:08d}.npz", moments=views[0], moments_flip=views[1])


def write_tars(made: Made, rows: int) -> None:
    made.places["tar"].mkdir()

    def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))

    for first in range(0, len(made.labels), rows):
        with tarfile.open(made.places["tar"] / f"{first // rows:05d}.tar", "w") as tar:
            for n in range(first, min(first + rows, len(made.labels))):
                stream = io.BytesIO()
                np.save(stream, made.values[n])
                add(tar, f"{n:08d}.npy", stream.getvalue())
                add(tar, f"{n:08d}.cls", str(made.labels[n]).encode())


def make(folder: Path, samples: int, shard_rows: int) -> Made:
    """Random moments in every layout.

    Raises:
        ValueError: sizes for which the modes would not do what they are measured for.
    """
    if shard_rows % BATCH or samples % shard_rows or samples <= WINDOW * shard_rows:
        raise ValueError(
            f"--samples {samples} --shard-rows {shard_rows}: expected shards of a "
            f"multiple of {BATCH} rows, and a multiple of them in samples, more than "
            f"{WINDOW} (one window of mode stream)"
        )
    reading.WINDOW = WINDOW * shard_rows  # as many shards as of the usual size
    rng = np.random.default_rng(SEED)
    values = np.empty((samples, 2, 2, 16, 16, 16), np.float16)
    for block in np.split(values, samples // BATCH):
        block[:] = rng.standard_normal(block.shape, np.float32)
    np.abs(values[:, :, 1], out=values[:, :, 1])
    made = Made(folder, values, np.arange(samples) % CLASSES)
    write_cache(made, shard_rows)
    write_npz(made)
    write_tars(made, min(2048, samples // 4))
    return made


# ----------------------------------------------------------------------------------- the contenders


def ours(made: Made, mode: str, tokens: bool, device: str) -> Iterator[tuple]:
    source = CacheTokens(
        open_cache(made.places["cache"]), SEED, flip=True, device=device, mode=mode
    )
    for first in itertools.count(0, BATCH):
        index = torch.arange(first, first + BATCH)
        if tokens:
            batch = source.batch(index)
            yield batch.tokens, batch.labels
        else:
            stored, labels = source.rows(index)
            yield stored["mean"], stored["std"], labels


class Folder(Dataset):
    """One npz per image, as MAR reads it; `__init__` finds them as torchvision's DatasetFolder."""

    def __init__(self, root: Path) -> None:
        classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        self.samples = [
            (os.path.join(root, name, file), label)
            for label, name in enumerate(classes)
            for file in sorted(os.listdir(os.path.join(root, name)))
        ]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        with np.load(path) as data:
            moments = data["moments" if torch.rand(1) < 0.5 else "moments_flip"]
        return torch.from_numpy(moments).view(2, 16, 16, 16), label


def samples_in(file: Path) -> Iterator[tuple]:
    """(one of two views, label) of every sample of a tar: an .npy of both views, then a label."""
    with tarfile.open(file, "r|") as tar:
        for member in tar:
            data = tar.extractfile(member).read()
            if member.name.endswith(".npy"):
                views = np.load(io.BytesIO(data))
            else:
                yield torch.from_numpy(views[random.getrandbits(1)]), int(data)
            tar.members.clear()


class Tars(IterableDataset):
    """Tars in random order without end, every worker its own ones, through a shuffle buffer."""

    def __init__(self, root: Path) -> None:
        self.files = sorted(root.glob("*.tar"))

    def read(self, files: list[Path]) -> Iterator[tuple]:
        while True:
            random.shuffle(files)
            for file in files:
                yield from samples_in(file)

    def __iter__(self) -> Iterator[tuple]:
        worker = torch.utils.data.get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        stream, held = self.read(self.files[number::workers]), []
        for sample in stream:
            held.append(sample)
            if len(held) < BUFFER:
                held.append(next(stream))
            if len(held) >= INITIAL:
                at = random.randrange(len(held))
                held[at], held[-1] = held[-1], held[at]
                yield held.pop()


class Endless(Sampler):
    """One random permutation after the other, so that workers go on across epochs."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self):
        while True:
            yield from torch.randperm(self.count).tolist()


def loader(made: Made, layout: str, workers: int, device: str) -> Iterator[tuple]:
    data = Folder(made.places["npz"]) if layout == "npz" else Tars(made.places["tar"])
    sampler = Endless(len(data)) if layout == "npz" else None
    for moments, labels in DataLoader(
        data,
        BATCH,
        sampler=sampler,
        num_workers=workers,
        drop_last=True,
        pin_memory=device == "cuda",
    ):
        moments = moments.to(device, non_blocking=True)
        yield moments[:, 0], moments[:, 1], labels.to(device, non_blocking=True)


def zarr_rows(made: Made, device: str) -> Iterator[tuple]:
    import zarr

    group, rng = zarr.open_group(made.places["cache"], mode="r"), np.random.default_rng(SEED)
    labels = group["labels"][:].astype(np.int64)
    while True:
        for rows in rng.permutation(len(labels)).reshape(-1, BATCH):
            rows, pick = np.sort(rows), (np.arange(BATCH), rng.integers(0, 2, BATCH))
            found = [group[name].oindex[rows][pick] for name in ("mean", "std")] + [labels[rows]]
            yield tuple(torch.from_numpy(part).to(device) for part in found)


def zarr_shards(made: Made, device: str) -> Iterator[tuple]:
    import zarr

    group, rng = zarr.open_group(made.places["cache"], mode="r"), np.random.default_rng(SEED)
    labels, size = group["labels"][:].astype(np.int64), group["mean"].shards[0]
    while True:
        for first in rng.permutation(len(labels) // size) * size:
            mean, std = (group[name][first : first + size] for name in ("mean", "std"))
            for rows in rng.permutation(size).reshape(-1, BATCH):
                pick = (rows, rng.integers(0, 2, BATCH))
                found = mean[pick], std[pick], labels[first + rows]
                yield tuple(torch.from_numpy(part).to(device) for part in found)


# name -> (layout, function of (made, device) that gives batches without end)
CONTENDERS = {
    "ours, gpu": ("cache", functools.partial(ours, mode="gpu", tokens=False)),
    "ours, ram": ("cache", functools.partial(ours, mode="ram", tokens=False)),
    "ours, stream": ("cache", functools.partial(ours, mode="stream", tokens=False)),
    PEER: ("npz", functools.partial(loader, layout="npz", workers=2)),
    "MAR npz, 0 workers": ("npz", functools.partial(loader, layout="npz", workers=0)),
    "tar, 2 workers": ("tar", functools.partial(loader, layout="tar", workers=2)),
    "tar, 0 workers": ("tar", functools.partial(loader, layout="tar", workers=0)),
    "zarr rows": ("cache", zarr_rows),
    "zarr shards": ("cache", zarr_shards),
    "ours, ram, tokens": ("cache", functools.partial(ours, mode="ram", tokens=True)),
    "ours, gpu, tokens": ("cache", functools.partial(ours, mode="gpu", tokens=True)),
}
