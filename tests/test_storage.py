"""Locks, with and without a file system that has them."""

import errno
import os

import pytest

from heptapod_fast import storage
from heptapod_fast.data.cache.format import CacheError
from heptapod_fast.data.cache.site import lock_cache
from heptapod_fast.runs import RunDir, RunError
from tests.running import tiny_config

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


@pytest.fixture
def no_locks(monkeypatch, request):
    """A file system that answers every flock with an error."""

    def flock(file, how):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(storage.fcntl, "flock", flock)
    return request.param


def test_a_lock_is_held_until_the_file_is_closed(tmp_path):
    with open(tmp_path / "lock", "a+") as first:
        assert storage.lock(first) == ""
        with open(tmp_path / "lock", "a+") as second, pytest.raises(storage.InUseError):
            storage.lock(second)
    with open(tmp_path / "lock", "a+") as third:
        assert storage.lock(third) == ""


@pytest.mark.parametrize("no_locks", NO_LOCKS, indirect=True)
def test_a_file_system_without_locks_is_no_other_process(tmp_path, no_locks, caplog):
    kind = storage.file_system(tmp_path)
    directory = RunDir(tmp_path / "run")
    directory.claim(tiny_config(tmp_path / "run"))
    directory.release()
    lock_cache(tmp_path / "c.zarr").close()
    assert len(caplog.records) == 2
    for text in (record.getMessage() for record in caplog.records):
        assert "has no locks" in text and f"({kind})" in text and os.strerror(no_locks) in text


@pytest.mark.parametrize("no_locks", [errno.EAGAIN], indirect=True)
def test_in_use_is_in_use(tmp_path, no_locks):
    with pytest.raises(RunError, match="is in use by another process"):
        RunDir(tmp_path / "run").claim(tiny_config(tmp_path / "run"))
    with pytest.raises(CacheError, match="is being built by another process"):
        lock_cache(tmp_path / "c.zarr")


def test_a_folder_appears_whole(tmp_path):
    left_by_a_killed_process = tmp_path / ".out.unfinished"
    left_by_a_killed_process.mkdir()
    (left_by_a_killed_process / "old").write_text("?")
    (tmp_path / "out").mkdir()  # empty: nothing is lost
    with storage.whole_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("!")
        assert list((tmp_path / "out").iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), storage.whole_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("!")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_folder_takes_nobodys_place(tmp_path):
    with pytest.raises(OSError), storage.whole_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("years of work")
    assert (tmp_path / "out" / "mine").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_sha256_is_what_sha256sum_prints(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert storage.sha256(tmp_path / "abc").startswith("ba7816bf8f01cfea")


def test_the_kind_of_a_file_system(tmp_path, monkeypatch):
    table = tmp_path / "mounts"
    table.write_text(
        "root / ext4 rw 0 0\n"
        f"server:/x {tmp_path} nfs4 rw 0 0\n"
        f"o2ib:/fs {tmp_path}/my\\040disk lustre rw 0 0\n"
        f"later {tmp_path}/a overlay rw 0 0\n"
        f"last {tmp_path}/a tmpfs rw 0 0\n"
    )

    class Fake(type(tmp_path)):
        def read_text(self, *args, **options):
            return table.read_bytes().decode()

    real = storage.Path
    monkeypatch.setattr(
        storage, "Path", lambda path: Fake(path) if path == "/proc/mounts" else real(path)
    )
    kinds = {"": "nfs4", "b": "nfs4", "my disk/x": "lustre", "a/b": "tmpfs"}
    assert {name: storage.file_system(tmp_path / name) for name in kinds} == kinds
    assert storage.file_system(real("/")) == "ext4"
