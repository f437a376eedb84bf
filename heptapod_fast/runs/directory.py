"""The run directory: what is in it, and who may write to it.

RUN_DIR/  config.json  metrics.jsonl  sessions.jsonl  samples/  checkpoints/
          tokenizer.safetensors (a fitted codebook) or tokenizer.json (which published weights)
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from pathlib import Path
from typing import IO

from heptapod_fast import checkpoints, storage
from heptapod_fast.config import Config, flag
from heptapod_fast.config.reading import run_dir_of_version_1
from heptapod_fast.data.entries import is_debris
from heptapod_fast.storage import InUseError
from heptapod_fast.systems import read_config

logger = logging.getLogger(__name__)
EXPORT = "export.json"  # what tells a folder of `runs/exported.py`, which is no place for a run


class RunError(RuntimeError):
    """A run directory that cannot be used as asked."""


def this_process() -> str:
    """Who holds the lock, for those who meet it."""
    return f"process {os.getpid()} on {socket.gethostname()}"


class RunDir:
    """Paths of a run; `claim` makes this process its only writer."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.sessions = self.path / "sessions.jsonl"  # what each start ran on, how long it took
        self.samples = self.path / "samples"
        self.checkpoints = self.path / "checkpoints"
        self.averages = self.path / "averages"  # snapshots, of `--ema post-hoc`
        self.codebook = self.path / "tokenizer.safetensors"
        self.tokenizer_record = self.path / "tokenizer.json"
        self._lock: IO[str] | None = None
        self._is_new = False  # whether `claim` made the directory, and has it

    @classmethod
    def of(cls, config: Config) -> RunDir:
        """The directory of a resolved configuration: --out, or a name made from the settings.

        A run that an earlier version has begun keeps the name that it gave it.
        """
        path = Path(config.run_dir())
        if config.run.out is None and not path.exists():
            earlier = Path(run_dir_of_version_1(config))
            if earlier.exists():
                return cls(earlier)
        return cls(path)

    def claim(self, config: Config) -> list[str]:
        """Create the directory, lock it, and check that it holds no other run.

        Returns:
            The settings that differ from the last start and may, as "--images 200000 (was 100000)".

        Raises:
            RunError: another process holds it, it belongs to another configuration, or it cannot be
                written.
        """
        meant = self.meant()
        if meant:
            raise RunError(f"--out {self.path} is no place for a run: {meant}")
        if (self.path / EXPORT).exists():
            raise RunError(
                f"--out {self.path} is no place for a run: it holds an exported one ({EXPORT}); "
                "choose another --out, and name it with --init-from to start from its weights"
            )
        try:
            is_new = self._make()
            self._lock = open(self.path / ".lock", "a+")
        except OSError as error:
            raise self._unwritable(error) from error
        self._take_lock(self._lock)
        self._is_new = is_new
        changed = self._compare(config)
        self._write_config(config)
        try:
            os.truncate(self._lock.fileno(), 0)
            os.write(self._lock.fileno(), this_process().encode())
            for folder in (self.samples, self.checkpoints):
                folder.mkdir(exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        checkpoints.clean(self.checkpoints)
        checkpoints.clean(self.averages)
        return changed

    def _make(self) -> bool:
        """Make the directory. Whether it was not there before."""
        try:
            self.path.mkdir(parents=True)
        except FileExistsError:
            return False
        return True

    def _take_lock(self, lock: IO[str]) -> None:
        try:
            warning = storage.lock(lock)
        except InUseError as error:
            lock.seek(0)
            other = lock.read().strip() or "another process"
            lock.close()
            raise RunError(
                f"{self.path} is in use by {other}: wait for it, stop it, or choose another --out"
            ) from error
        if warning:
            logger.warning("WARNING: %s", warning)

    def _unwritable(self, error: OSError) -> RunError:
        return RunError(
            f"cannot write to the run directory {self.path}: {error} (--out names another)"
        )

    def finished(self, images: int) -> int:
        """Images of the newest checkpoint if it verifies and holds `images` or more, else 0."""
        seen = checkpoints.peek(self.checkpoints).get("images", 0)
        if seen < images:
            return 0
        newest = checkpoints.listed(self.checkpoints)[-1]
        return 0 if checkpoints.damage(newest) else seen

    def release(self) -> None:
        """Let others write."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def withdraw(self) -> None:
        """Undo `claim` where it made the directory and nothing has been put there since: a start
        that failed leaves nothing behind. The lock stays with this process until `release`."""
        if not self._is_new:
            return
        files = {self.config, self.path / ".lock"}
        folders = {self.samples, self.checkpoints}
        with contextlib.suppress(OSError):  # why the start failed is what matters
            found = set(self.path.iterdir())
            is_filled = any(any(folder.iterdir()) for folder in found & folders)
            if is_filled or not found <= files | folders:
                return
            for file in found & files:
                file.unlink()
            for folder in found & folders:
                folder.rmdir()
            self.path.rmdir()

    def _compare(self, config: Config) -> list[str]:
        """Settings that may differ and do; RunError where others differ."""
        if not self.config.exists():
            self._refuse_foreign_files()
            return []
        before = self.read_config()
        # Checkpoints know the contents of a set, so that it may lie somewhere else by now, or be
        # unpacked.
        is_moved = before.data.kind == config.data.kind
        fatal = []
        harmless = []
        for name, now, then, may_change in config.differences(before):
            text = f"{flag(name)} {now} (was {'none' if then in (None, '') else then})"
            if may_change or (is_moved and name == "data"):
                harmless.append((name, text))
            else:
                fatal.append(text)
        if fatal and not self._began():
            self.codebook.unlink(missing_ok=True)  # fitted with the other settings
            return []
        if fatal:
            raise RunError(
                f"{self.path} holds a run with other settings: {'; '.join(fatal)}. Repeat its "
                "settings to continue it, or choose another --out"
            )
        return [text for name, text in harmless if name != "out"]

    def _refuse_foreign_files(self) -> None:
        """A folder with something else in it is no run directory."""
        of_a_start_cut_off = {".lock", self.config.with_suffix(".tmp").name}
        there = {path.name for path in self.path.iterdir()} - of_a_start_cut_off
        foreign = sorted(name for name in there if not is_debris(name))
        if foreign:
            raise RunError(
                f"{self.path} is not a run directory but holds {', '.join(foreign[:5])}: "
                "choose another --out"
            )

    def meant(self) -> str:
        """Which run this path, which is none, is about, as the end of an error: of one of its
        checkpoints it is said that the run is to be named. Empty where it is about none."""
        for above in self.path.absolute().parents[:3]:
            is_of_run = self.path.absolute().is_relative_to(above / self.checkpoints.name)
            if is_of_run and (above / self.config.name).is_file():
                return f"it belongs to the run directory {self._as_given(above)}: name that"
        return ""

    def _as_given(self, above: Path) -> Path:
        """A folder above this path, spelt as the path was."""
        if self.path.is_absolute():
            return above
        return Path(os.path.relpath(above))

    def _began(self) -> bool:
        """Whether there is anything to lose: a start that failed leaves no more than settings."""
        if self.metrics.exists():
            return True
        return self.checkpoints.is_dir() and any(self.checkpoints.iterdir())

    def _write_config(self, config: Config) -> None:
        temporary = self.config.with_suffix(".tmp")
        try:
            temporary.write_text(config.to_json())
            temporary.rename(self.config)
        except OSError as error:
            raise RunError(f"cannot write {self.config}: {error.strerror or error}") from error

    def read_config(self) -> Config:
        """The settings of the run. RunError if there are none or they cannot be read."""
        if not self.config.exists():
            meant = self.meant()
            there = "" if self.path.exists() else "; there is no such folder"
            raise RunError(
                f"{self.path} is not a run directory: it has no config.json"
                + (f"; {meant}" if meant else there)
            )
        return config_in(self.config)

    def published_weights(self) -> str | None:
        """Where the published weights of its tokenizer were when it began; None where it does not
        say."""
        if not self.tokenizer_record.exists():
            return None
        return json.loads(self.tokenizer_record.read_text())["weights"]


def config_in(file: Path) -> Config:
    """The settings in a config.json. RunError if they cannot be read."""
    try:
        return read_config(file.read_text())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{file} cannot be read: {error}") from error
