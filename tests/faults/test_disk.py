"""A disk that is full or cannot be written: nothing that was saved is lost."""

import resource
import shutil
import subprocess
import sys

import pytest

from heptapod_fast.checkpoints import damage, listed
from tests.running import (
    ROOT,
    command,
    environment,
    final_files,
    finish,
    flags,
    refused,
    start,
    train_here,
)

WIDE = dict(width=128, heads=4)  # a checkpoint of some megabytes


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB, where one can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)], capture_output=True
        ).returncode
    ):
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def limit_files(size):
    """For a child process: files end at `size` bytes, as on a full disk."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return limit


def test_files_that_cannot_grow_fail_clearly_and_keep_what_is_there(tmp_path):
    train_here(tmp_path, **WIDE, images=16)
    before = final_files(tmp_path)
    words = flags(out=tmp_path, **WIDE, images=32)
    done = subprocess.run(
        [sys.executable, "tools/train.py", *words],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=ROOT,
        timeout=600,
        preexec_fn=limit_files(100_000),
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "error: could not write" in done.stderr and "WARNING" in done.stdout
    assert final_files(tmp_path) == before
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.slow
def test_a_full_disk_is_survived(small_disk, tmp_path):
    settings = WIDE | dict(images=16, checkpoint_every=8, keep_checkpoints=1)
    result = finish(start("train", *flags(out=small_disk / "run", **settings)))
    assert result.code == 1, result.out
    assert "WARNING: could not write" in result.out and "error: could not write" in result.out
    assert "Traceback" not in result.out
    kept = listed(small_disk / "run" / "checkpoints")
    assert all(damage(path) == [] for path in kept)
    assert not list((small_disk / "run" / "checkpoints").glob("*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    again = finish(start("train", *flags(out=small_disk / "run", **settings)))
    assert again.code == 0 and "finished" in again.out, again.out
    finish(start("train", *flags(out=tmp_path / "plain", **settings)))
    assert final_files(small_disk / "run") == final_files(tmp_path / "plain")


def test_a_disk_that_cannot_be_written_is_refused_at_the_start(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    refused(command("train", *flags(out=small_disk / "run")), "Read-only file system", "--out")


def test_a_full_disk_at_the_start_is_refused(small_disk):
    with open(small_disk / "fill", "wb") as stream, pytest.raises(OSError):
        while True:
            stream.write(b"x" * 2**16)
            stream.flush()
    result = command("train", *flags(out=small_disk / "run"))
    refused(result, "run")
