"""tools/sample.py killed, or out of disk space: the same command ends with the same bytes."""

import resource
import signal
import subprocess
import sys

import pytest

from tests.running import ROOT, command, environment, finish, start, train_here, wait_for

WORDS = ["--count", 20, "--batch", 4]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of 3 x 3 tokens."""
    out = tmp_path_factory.mktemp("run")
    train_here(out, image_size=12, patch_size=4, images=16)
    return out


def outputs(folder):
    """What is asked for."""
    npz, tar = folder / "s.npz", folder / "s.tar"
    return ["--out", folder / "g.png", "--save-npz", npz, "--save-tar", tar]


def files_in(folder):
    """Bytes by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(trained, tmp_path_factory):
    """Files of a job that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert command("sample", trained, *WORDS, *outputs(folder)).code == 0
    return files_in(folder)


def same_end(trained, folder, undisturbed, done):
    result = command("sample", trained, *WORDS, *outputs(folder))
    assert result.code == 0, result.err
    assert f"going on after {done} of 20 images" in result.out
    assert files_in(folder) == undisturbed


@pytest.mark.parametrize(
    "where, done",
    [("written=12", 8), ("recorded=12", 12), ("complete", 20), ("publish=s.npz", 20)],
)
def test_killed(trained, tmp_path, undisturbed, where, done):
    words = [trained, *WORDS, *outputs(tmp_path)]
    result = finish(start("sample", *words, HEPTAPOD_FAULT=f"kill9@{where}"))
    assert result.code == -signal.SIGKILL, result.out
    same_end(trained, tmp_path, undisturbed, done)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_stopped_by_a_signal(trained, tmp_path, undisturbed, number, code):
    words = [trained, *WORDS, *outputs(tmp_path)]
    process = start("sample", *words, HEPTAPOD_FAULT="sleep@written=12")
    wait_for(process, "sleeping at")
    process.send_signal(number)
    result = finish(process)
    assert result.code == code and "Traceback" not in result.out, result.out
    if number == signal.SIGINT:
        assert "stopped after 8 of 20 images, which are kept" in result.out
    same_end(trained, tmp_path, undisturbed, 8)


def test_a_disk_that_is_full(trained, tmp_path, undisturbed):
    """No file may grow beyond some of the images; then there is room again."""
    room = len(undisturbed["s.tar"]) // 2
    words = map(str, [trained, *WORDS, *outputs(tmp_path)])
    done = subprocess.run(
        [sys.executable, "tools/sample.py", *words],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=ROOT,
        timeout=600,
        preexec_fn=lambda: resource.setrlimit(
            resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY)
        ),
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "File too large" in done.stderr and "stopped after " in done.stderr
    kept = int(done.stderr.split("stopped after ")[1].split()[0])
    assert kept in (4, 8, 12, 16)
    same_end(trained, tmp_path, undisturbed, kept)
