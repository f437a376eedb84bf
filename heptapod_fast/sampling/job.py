"""A sampling job that can be killed: run again, it goes on behind the last batch that is safe in
all of its outputs, and ends in the same bytes.

Beside the outputs lies a journal, a line of JSON for each step:

    {"job": {"--seed": 0, ...}, "parts": [".a.npz.1a2b3c4d.part", ...]}
    {"images": 256, "marks": [{"bytes": 50331835, "crc32": 7654321}, ...]}
    {"images": 512, "marks": [...]}
    {"images": 512, "whole": true}

The first says what the bytes depend on, the next how much is on the disk in all outputs, the last
that but for the names all is done. What outputs hold behind the last line is cut off. A job of
other settings is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch
from torch import Tensor

from heptapod_fast import faults
from heptapod_fast.sampling.outputs import Mark, Output
from heptapod_fast.storage import InUseError, lock, sync

Say = Callable[[str], None]


class Job:
    """Outputs that are there once all images are in them, and what is kept of them until then.

    Args:
        outputs: in an order that is always the same.
        total: images of the whole job.
        settings: all that the outputs' bytes depend on, which goes into JSON, by the flags that say
            it; None for a job that is not worth a journal and leaves nothing when it fails.
        journal: where it is kept.
        start_over: begin anew, whatever lies there.
        say: takes a line for the user.

    Attributes:
        done: images that are safe in all outputs.
    """

    def __init__(
        self,
        outputs: Sequence[Output],
        total: int,
        settings: Mapping[str, Any] | None = None,
        journal: Path | None = None,
        start_over: bool = False,
        say: Say = print,
    ) -> None:
        self.outputs = outputs
        self.total = total
        self.done = 0
        self._is_whole = False
        # As JSON gives it back: lists for tuples.
        self._settings = json.loads(json.dumps(settings or {}))
        self._journal = None if journal is None else Journal(journal, say)
        self._start_over = start_over
        self._say = say

    def __enter__(self) -> Self:
        """Open all outputs, where an earlier process was stopped or at the start.

        Raises:
            ValueError: an unfinished job of other settings lies there, or one of which something is
                missing; says what to do.
            OSError: nothing can be written there, or another process is at work there.
        """
        name = "job"
        if self._journal is not None:
            name = hashlib.sha256(json.dumps(self._settings).encode()).hexdigest()[:8]
        for output in self.outputs:
            output.belong_to(name)
        marks: list[Mark] = [{} for _ in self.outputs]
        if self._journal is not None:
            earlier = self._journal.open()
            try:
                marks = self._take_up(self._journal, earlier) or marks
            except BaseException:
                self._journal.close()
                raise
        if self._is_whole:
            return self
        try:
            for output, mark in zip(self.outputs, marks, strict=True):
                output.begin(self.done, mark)
        except BaseException:
            self._let_go()
            raise
        return self

    def _take_up(self, journal: Journal, lines: list[dict[str, Any]]) -> list[Mark] | None:
        """What the last line of a journal says; None where the job begins, which is written."""
        last = lines[-1] if lines else {}
        done = last.get("images", 0)
        if done and not self._start_over:
            self._refuse_other(journal, lines[0]["job"], done)
            self.done = done
            self._is_whole = "whole" in last
            return last.get("marks")
        journal.clear()
        for part in lines[0]["parts"] if lines else ():
            (journal.path.parent / part).unlink(missing_ok=True)
        parts = [part for output in self.outputs for part in output.parts]
        journal.write({"job": self._settings, "parts": [journal.relative(part) for part in parts]})
        return None

    def _refuse_other(self, journal: Journal, theirs: Mapping[str, Any], done: int) -> None:
        mine = self._settings
        names = [n for n in {**mine, **theirs} if mine.get(n) != theirs.get(n)]
        if not names:
            return
        different = "; ".join(
            f"{name} is {_short(mine.get(name))}, there {_short(theirs.get(name))}"
            for name in names
        )
        raise ValueError(
            f"{journal.path}: an unfinished job of other settings lies there, {done:,} images are "
            f"drawn: {different}. Give the same settings to go on with it, name other files, or "
            "remove what there is of it with --start-over"
        )

    def record(self, done: int) -> None:
        """All outputs have taken the first `done` images."""
        faults.point(f"written={done}")
        if self._journal is None:
            return
        marks = [output.mark() for output in self.outputs]
        self._journal.write({"images": done, "marks": marks})
        self.done = done
        faults.point(f"recorded={done}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._stop(error)
            return
        try:
            self._finish()
        except BaseException as failed:
            self._stop(failed)
            raise

    def _finish(self) -> None:
        """Nothing but names is changed once the journal says that all is whole, so that this can be
        cut off anywhere."""
        if not self._is_whole:
            for output in self.outputs:
                output.complete()
            for output in self.outputs:
                for part in output.parts:
                    sync(part)
            faults.point("complete")
            if self._journal is not None:
                self._journal.write({"images": self.total, "whole": True})
                self.done = self.total
        for output in self.outputs:
            faults.point(f"publish={output.path.name}")
            output.publish()
        if self._journal is not None:
            self._journal.remove()

    def _let_go(self) -> None:
        """Keep what was recorded, and nothing of a job that has not come to that."""
        for output in self.outputs:
            if self.done:
                output.close()
            else:
                output.discard()
        if self._journal is None:
            return
        if self.done:
            self._journal.close()
        else:
            self._journal.remove()

    def _stop(self, error: BaseException) -> None:
        """Let go, and say what was kept."""
        self._let_go()
        if not self.done:
            return
        text = (
            f"stopped after {self.done:,} of {self.total:,} images, which are kept: the same "
            "command goes on from there"
        )
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(text) from None
        self._say(text)


class Journal:
    """Lines of JSON in a file that one process at a time writes, each flushed to the disk."""

    def __init__(self, path: Path, say: Say) -> None:
        self.path = path
        self._say = say
        self._file: IO[str] | None = None

    def relative(self, path: Path) -> str:
        """A path as seen from the journal's folder, so that both can be moved together."""
        return os.path.relpath(path.absolute(), self.path.parent.absolute())

    def open(self) -> list[dict[str, Any]]:
        """The lines that are there. One that was cut off, and what stands behind it, is removed.

        Raises:
            InUseError: another process has it open.
            OSError: it cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self._file = open(self.path, "a+", encoding="latin-1", newline="\n")
            try:
                warning = lock(self._file)
            except InUseError:
                self._file.close()
                raise InUseError(f"{self.path}: another process is writing these files") from None
            # A job that was finishing may have removed it between the two.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):
                    break
            self._file.close()
        if warning:
            self._say(f"WARNING: {warning}")
        sync(self.path.parent)
        self._file.seek(0)
        whole = 0
        lines = []
        for text in self._file.read().splitlines(keepends=True):
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
            if not text.endswith("\n"):
                lines.pop()
                break
            whole += len(text)
        self._file.truncate(whole)
        return lines

    def clear(self) -> None:
        """Remove all lines."""
        assert self._file is not None  # opened
        self._file.truncate(0)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line."""
        assert self._file is not None  # opened
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        sync(self.path)

    def close(self) -> None:
        """Let another process have it."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a disk that is full
                self._file.close()

    def remove(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)
        self.close()


def _short(value: object) -> str:
    text = "not given" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, its first 16 hexadecimal digits."""
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(f"{name}/{value.dtype}/{tuple(value.shape)}\n".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]
