"""Where the records of a run go: metrics.jsonl always, TensorBoard and Weights & Biases if asked.

A record is a flat dictionary of numbers with "images", how many were trained on. A sink that fails
costs records, never the run.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import os
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from heptapod_fast.config import Config

Record = dict[str, Any]
OF_SAMPLES = "evaluation/"  # how the names of numbers of samples begin
Say = Callable[[str], None]


class Sink(Protocol):
    """Takes records. `name` is what warnings call it."""

    name: str

    def write(self, record: Record) -> None:
        """Take one record; may raise anything."""
        ...

    def close(self) -> None:
        """Write what is still held back; may raise anything."""
        ...


class JsonLines:
    """metrics.jsonl: one JSON object a line."""

    def __init__(self, path: Path):
        self.path = path
        self.name = str(path)

    def rewind(self, images: int) -> list[Record]:
        """Drop records behind `images`: the run continues from there and will write them again.

        Returns:
            What was dropped.
        """
        if not self.path.exists():
            return []
        records = read_metrics(self.path)
        self._replace([record for record in records if record["images"] <= images])
        return [record for record in records if record["images"] > images]

    def amend(self, more: Record) -> None:
        """Add to the last record."""
        *earlier, last = read_metrics(self.path)
        self._replace([*earlier, last | more])

    def _replace(self, records: list[Record]) -> None:
        """Write all records anew, or none."""
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
        temporary.rename(self.path)

    def write(self, record: Record) -> None:
        """Append one record; numbers that are not finite become null, which JSON has."""
        plain = {name: value if is_plain(value) else None for name, value in record.items()}
        append(self.path, (json.dumps(plain) + "\n").encode())

    def close(self) -> None:
        """Nothing is held back."""


def is_plain(value: Any) -> bool:
    """Whether JSON has such a value."""
    return not isinstance(value, float) or math.isfinite(value)


class TensorBoard:
    """Event files in RUN_DIR/tensorboard.

    Args:
        folder: where they are; a resumed run adds a file to those of its earlier sessions.
        images: what was trained on so far. Records behind it, of a session that ended before it
            could save, are superseded.
    """

    name = "tensorboard"

    def __init__(self, folder: Path, images: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=images + 1)

    def write(self, record: Record) -> None:
        """Every number of a record as a scalar over images."""
        for name, value in record.items():
            if name != "images" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, record["images"])
        self._writer.flush()

    def close(self) -> None:
        """See Sink.close."""
        self._writer.close()


class WeightsAndBiases:
    """A run of the project "heptapod_fast" (or WANDB_PROJECT).

    Its id is kept in RUN_DIR/wandb.json, so that a resumed run goes on as the same one, wherever
    its directory was moved.
    """

    name = "wandb"

    def __init__(self, folder: Path, config: Config):
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "heptapod_fast"),
            id=self._id(folder / "wandb.json"),
            name=folder.name,
            resume="allow",
            dir=str(folder),
            config=json.loads(config.to_json()),
        )
        # The x axis of every chart; W&B's own count of calls goes on when a run is rewound.
        self._run.define_metric("*", step_metric="images")

    @staticmethod
    def _id(file: Path) -> str:
        if file.exists():
            return json.loads(file.read_text())["id"]
        fresh = uuid.uuid4().hex[:16]
        file.write_text(json.dumps({"id": fresh}) + "\n")
        return fresh

    def write(self, record: Record) -> None:
        """One record."""
        self._run.log(record)

    def close(self) -> None:
        """See Sink.close."""
        self._run.finish()


_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


def check_sinks(names: Iterable[str]) -> None:
    """Refuse sinks whose package is not installed, before anything else happens.

    Raises:
        ValueError: says what to install.
    """
    for name in names:
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise ValueError(
                f"--log {name}: {_PACKAGES[name]} is not installed: pip install "
                "'heptapod_fast[log]'"
            )


class Recorder:
    """Hands every record to all sinks; each that fails is reported once.

    metrics.jsonl is tried again with every record. A sink of another kind that fails is left out
    for the rest of the session.
    """

    def __init__(self, metrics: JsonLines, say: Say):
        self.metrics = metrics
        self.say = say
        self._others: list[Sink] = []
        self._failing = False

    def add(self, open_sink: Callable[[], Sink], name: str) -> None:
        """Open another sink; one that cannot be opened is reported and left out."""
        try:
            self._others.append(open_sink())
        except Exception as error:  # a sink's library may raise anything, and is not worth a run
            self._lost(name, error)

    def write(self, record: Record) -> None:
        """One record to all sinks."""
        try:
            self.metrics.write(record)
        except OSError as error:
            if not self._failing:
                self.say(
                    f"WARNING: cannot write {self.metrics.name}: {error}; records are lost until "
                    "it works"
                )
            self._failing = True
        else:
            self._failing = False
        for sink in list(self._others):
            try:
                sink.write(record)
            except Exception as error:
                self._others.remove(sink)
                self._lost(sink.name, error)

    def close(self) -> None:
        """The end of a session."""
        for sink in self._others:
            try:
                sink.close()
            except Exception as error:
                self._lost(sink.name, error)
        self._others = []

    def _lost(self, name: str, error: Exception) -> None:
        self.say(
            f"WARNING: --log {name}: {type(error).__name__}: {error}; training goes on without it, "
            "all records are in metrics.jsonl"
        )


def append(path: Path, data: bytes) -> None:
    """Add to the end of a file, all or nothing: half a line would spoil the next one."""
    with open(path, "ab", buffering=0) as stream:
        before = stream.seek(0, os.SEEK_END)
        try:
            if stream.write(data) < len(data):
                raise OSError(errno.ENOSPC, "the disk is full", str(path))
        except OSError:
            stream.truncate(before)
            raise


def read_metrics(path: Path) -> list[Record]:
    """All records; a last line cut off by a crash is left out. ValueError names a broken line."""
    records = []
    lines = path.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or "images" not in record:
                raise ValueError('it has no "images"')
            records.append(record)
        except ValueError as error:
            if number < len(lines):
                raise ValueError(
                    f"{path}:{number} is not a record of a run: {error}; mend or remove that line"
                ) from error
    return records
