"""Builds of caches that are killed, starved of disk, or meet another process."""

import random
import signal
import subprocess
import sys

import pytest

from heptapod_fast.data.cache.check import find_damage
from heptapod_fast.data.cache.format import BUILDING, open_cache
from heptapod_fast.storage import available_memory
from tests.caches import contents, image_folder
from tests.faults.test_disk import limit_files, small_disk  # noqa: F401  (a fixture)
from tests.running import (
    ROOT,
    command,
    environment,
    finish,
    refused,
    start,
    torchrun,
    wait_for,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("set") / "images")


def words(folder, out, **settings):
    values = {
        "data": folder,
        "image_size": 16,
        "tokenizer": "patch-vq",
        "codes": 20,
        "shard_rows": 8,
        "batch": 3,
        "out": out,
    } | settings
    found = ["--flip"]
    for name, value in values.items():
        found += [f"--{name.replace('_', '-')}", str(value)]
    return found


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "c.zarr"
    assert command("cache", *words(folder, out)).code == 0
    assert find_damage(open_cache(out)) == []
    return contents(out)


@pytest.mark.parametrize("where", ["shard=0", "shard=5", "manifest"])
def test_killed_and_built_on_by_one_process(folder, tmp_path, undisturbed, where):
    out = tmp_path / "c.zarr"
    killed = finish(start("cache", *words(folder, out), HEPTAPOD_FAULT=f"kill9@{where}"))
    assert killed.code == -signal.SIGKILL, killed.out
    assert not (out / "manifest.json").exists()
    refused(command("verify", out), "was interrupted: repeat the command")
    refused(command("train", "--size", "tiny", "--data", out), "was interrupted")
    done = command("cache", *words(folder, out))
    assert done.code == 0, done.err
    assert contents(out) == undisturbed
    if where == "shard=5":
        assert "going on  5 shards are done" in done.out


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(1, 2), (2, 1), (2, 3)])
def test_killed_and_built_on_by_other_ranks(folder, tmp_path, undisturbed, before, after):
    out = tmp_path / "c.zarr"
    launcher = torchrun(before) if before > 1 else (sys.executable,)
    killed = finish(
        start("cache", *words(folder, out), launcher=launcher, HEPTAPOD_FAULT="kill9@shard=4")
    )
    assert killed.code != 0, killed.out
    done = [p.name for p in (out / BUILDING).glob("shard-*.json")]
    assert "shard-00004.json" not in done and done
    launcher = torchrun(after) if after > 1 else (sys.executable,)
    again = finish(start("cache", *words(folder, out), launcher=launcher))
    assert again.code == 0, again.out
    assert f"going on  {len(done)} shards are done" in again.out
    assert contents(out) == undisturbed


@pytest.mark.slow
def test_killed_at_any_time(folder, tmp_path, undisturbed):
    """kill -9 while zarr writes files, while records are written, again and again."""
    out, delays = tmp_path / "c.zarr", random.Random(1)
    for _ in range(6):
        process = start("cache", *words(folder, out))
        try:
            process.wait(1.5 + 1.5 * delays.random())
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
    assert command("cache", *words(folder, out)).code == 0
    assert contents(out) == undisturbed


def test_files_that_cannot_grow(folder, tmp_path, undisturbed):
    """As on a full disk: one line, finished shards stay, and with room the build goes on."""
    out = tmp_path / "c.zarr"
    line = [sys.executable, "tools/cache.py", *words(folder, out, tokenizer="patch")]
    line = [word for k, word in enumerate(line) if "--codes" not in line[max(0, k - 1) : k + 1]]
    done = subprocess.run(
        line,
        capture_output=True,
        text=True,
        env=environment(),
        cwd=ROOT,
        timeout=120,
        preexec_fn=limit_files(9_000),
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "cannot write shard 0" in done.stderr and "when there is room" in done.stderr
    assert not (out / "manifest.json").exists()
    again = subprocess.run(
        line, capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=120
    )
    assert again.returncode == 0, again.stderr
    assert find_damage(open_cache(out)) == [] and not list(out.rglob("*.partial"))


def test_a_full_disk(folder, small_disk):  # noqa: F811
    with open(small_disk / "fill", "wb") as stream:
        stream.write(b"x" * (8 * 2**20 - 2**17))
    out = small_disk / "c.zarr"
    refused(
        command(
            "cache",
            *words(folder, out, image_size=64, patch_size=4, shard_rows=512),
            "--allow-upscale",
        ),
        "will take",
        "GB free",
        "--out",
    )


def test_a_disk_that_cannot_be_written(folder, small_disk):  # noqa: F811
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    refused(
        command("cache", *words(folder, small_disk / "c.zarr")), "Read-only file system", "--out"
    )


def test_another_process_builds(folder, tmp_path):
    out = tmp_path / "c.zarr"
    first = start("cache", *words(folder, out), HEPTAPOD_FAULT="sleep@shard=2")
    try:
        wait_for(first, "sleeping at shard=2")
        refused(command("cache", *words(folder, out)), "being built by another process")
    finally:
        first.kill()
        first.communicate()


@pytest.mark.slow
def test_a_cache_that_one_rank_cannot_read(folder, tmp_path, undisturbed):
    """All ranks end, and the rank that found it says why, once."""
    out = tmp_path / "c.zarr"
    assert command("cache", *words(folder, out)).code == 0
    raw = bytearray((out / "codes/c/3/0/0").read_bytes())
    raw[9] ^= 4
    (out / "codes/c/3/0/0").write_bytes(raw)
    result = finish(
        start(
            "train",
            "--size",
            "tiny",
            "--data",
            out,
            "--out",
            tmp_path / "run",
            "--images",
            64,
            "--device",
            "cpu",
            launcher=torchrun(2),
        ),
        600,
    )
    assert result.code != 0 and "codes/c/3/0/0: checksum" in result.out
    assert result.out.count("checksum") == 1


def test_a_cache_that_cannot_be_written_is_read(folder, small_disk, tmp_path):  # noqa: F811
    out = small_disk / "c.zarr"
    assert command("cache", *words(folder, out)).code == 0
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert command("verify", out).code == 0
    for mode in ("ram", "stream"):
        done = command(
            "train",
            "--size",
            "tiny",
            "--data",
            out,
            "--out",
            tmp_path / mode,
            "--images",
            64,
            "--sample-every",
            0,
            "--device",
            "cpu",
            "--cache-mode",
            mode,
        )
        assert done.code == 0, done.err


@pytest.mark.slow
def test_a_cache_that_one_machine_does_not_have(folder, tmp_path):
    """All ranks end within seconds, the reason comes first."""
    assert command("cache", *words(folder, tmp_path / "0" / "c.zarr")).code == 0
    (tmp_path / "1").mkdir()
    (tmp_path / "rank.py").write_text(
        "import os, runpy, sys\n"
        f"os.chdir({str(tmp_path)!r} + '/' + os.environ['RANK'])\n"
        f"sys.path.insert(0, {str(ROOT / 'tools')!r})\n"
        f"runpy.run_path({str(ROOT / 'tools' / 'train.py')!r}, run_name='__main__')\n"
    )
    line = [
        *torchrun(2),
        str(tmp_path / "rank.py"),
        "--size",
        "tiny",
        "--data",
        "c.zarr",
        "--out",
        str(tmp_path / "run"),
        "--images",
        "64",
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        line, capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=60
    )
    assert done.returncode != 0 and "error: c.zarr: no such cache; check --data" in done.stderr
    assert "Traceback" not in done.stderr.split("error: c.zarr")[0]


@pytest.mark.slow
def test_ranks_see_the_same_samples(folder, tmp_path, undisturbed):
    """Two ranks end where one does, to rounding."""
    import torch

    from tests.running import final_tensors

    out = tmp_path / "c.zarr"
    assert command("cache", *words(folder, out)).code == 0
    for ranks in (1, 2):
        launcher = torchrun(ranks) if ranks > 1 else (sys.executable,)
        run = tmp_path / f"run{ranks}"
        result = finish(
            start(
                "train",
                "--size",
                "tiny",
                "--data",
                out,
                "--out",
                run,
                "--images",
                128,
                "--sample-every",
                0,
                "--device",
                "cpu",
                "--precision",
                "fp32",
                launcher=launcher,
            ),
            240,
        )
        assert result.code == 0, result.out
    one, two = (final_tensors(tmp_path / f"run{ranks}") for ranks in (1, 2))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)


def test_memory_is_known_here():
    assert available_memory() is None or available_memory() > 10**6
