"""Smallest runs, in this process and in others, for the tests of training and of the commands."""

import contextlib
import dataclasses
import io
import os
import runpy
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from heptapod_fast.checkpoints import listed, load_verified
from heptapod_fast.config import Config
from heptapod_fast.runs import RunDir
from heptapod_fast.systems import configure
from heptapod_fast.train.loop import train
from heptapod_fast.train.session import Ending, Say, Session, State, prepare
from heptapod_fast.world import World

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "size": "tiny",
    "width": 32,
    "heads": 2,
    "depth": 1,
    "head_depth": 1,
    "batch": 8,
    "images": 64,
    "logogram_count": 64,
    "codes": 16,
    "log_every": 8,
    "checkpoint_every": 16,
    "sample_every": 0,
    "device": "cpu",
}
NO_HEAD = {"head_depth": None}  # what the 1D baselines need of TINY
CPU = World(0, 1, torch.device("cpu"))


def tiny_config(out, **settings) -> Config:
    """A resolved configuration of the smallest run."""
    return configure(**(TINY | {"out": str(out)} | settings))


def flags(**settings) -> list[str]:
    """Settings of the smallest run as flags; None leaves one out."""
    words = []
    for name, value in (TINY | settings).items():
        if value is not None:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


class Interrupting:
    """A source of tokens that calls `act` before it answers for sample `at`."""

    def __init__(self, source, at: int, act):
        self.inner, self.at, self.act = source, at, act

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def batch(self, index):
        """The batch of the real source."""
        if int(index[0]) == self.at:
            self.act()
        return self.inner.batch(index)


def silent(text: str) -> None:
    """Take a line and print nothing."""


def start_here(out, say: Say = silent, world: World = CPU, **settings) -> tuple[Session, State]:
    """A prepared session in this process, resumed if it can be."""
    config = tiny_config(out, **settings)
    directory = RunDir.of(config)
    directory.claim(config)
    try:
        return prepare(config, world, say, directory)
    finally:
        directory.release()


def start_on_gpu(out, say: Say = silent, **settings) -> tuple[Session, State]:
    """The same on the first GPU."""
    return start_here(
        out, say, World(0, 1, torch.device("cuda", 0)), **{"device": "cuda"} | settings
    )


def train_here(
    out, stop_at: int | None = None, say: Say = silent, **settings
) -> tuple[Session, State, Ending]:
    """Training in this process; SIGTERM comes in the step from image stop_at."""
    session, state = start_here(out, say, **settings)
    if stop_at is not None:
        stopping = Interrupting(
            session.source, stop_at, lambda: signal.raise_signal(signal.SIGTERM)
        )
        session = dataclasses.replace(session, source=stopping)
    return session, state, train(session, state)


def final_files(out) -> dict[str, bytes]:
    """Bytes of the newest checkpoint, file by file."""
    newest = listed(Path(out) / "checkpoints")[-1]
    return {path.name: path.read_bytes() for path in sorted(newest.iterdir())}


def final_tensors(out, file: str = "model") -> dict[str, torch.Tensor]:
    """Tensors of the newest checkpoint."""
    return load_verified(listed(Path(out) / "checkpoints")[-1]).read(file)


@dataclass
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str


def command(tool: str, *words) -> Result:
    """Run tools/TOOL.py in this process, as its command line would."""
    out, err = io.StringIO(), io.StringIO()
    argv, before = sys.argv, list(sys.path)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [f"tools/{tool}.py", *map(str, words)]
    sys.path.insert(0, str(ROOT / "tools"))
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / "tools" / f"{tool}.py"), run_name="__main__")
    except SystemExit as error:
        code = error.code or 0
    finally:
        sys.argv, sys.path[:] = argv, before
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Result(code, out.getvalue(), err.getvalue())


def environment(**extra) -> dict[str, str]:
    """For child processes: one thread each, and no accelerator."""
    return (
        os.environ
        | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
        | extra
    )


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(count: int, tool: str, *words, **extra) -> list[subprocess.Popen]:
    """Processes that find each other by their environment, with nobody who watches over them."""
    meeting = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(count))
    return [start(tool, *words, RANK=str(rank), **meeting, **extra) for rank in range(count)]


def torchrun(ranks: int) -> tuple[str, ...]:
    """A launcher on a port that is free."""
    port = free_port()
    return (
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={ranks}",
        "--master_addr=127.0.0.1",
        f"--master_port={port}",
    )


def start(
    tool: str, *words, launcher=(sys.executable,), cwd: Path = ROOT, **extra
) -> subprocess.Popen:
    """Run tools/TOOL.py in another process; stdout and stderr together. Ctrl-C reaches it also
    where tests run in the background of a shell, which lets its processes ignore that."""
    return subprocess.Popen(
        [*launcher, str(ROOT / "tools" / f"{tool}.py"), *map(str, words)],
        env=environment(**extra),
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen, seconds: float = 600) -> Result:
    """Wait for a process of `start`."""
    out, _ = process.communicate(timeout=seconds)
    return Result(process.returncode, out, out)


def wait_for(process: subprocess.Popen, text: str) -> str:
    """Read the process's output up to the line that holds `text`."""
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} never came:\n{seen}")


def refused(result: Result, *texts: str) -> None:
    """A clear error: it fails, says these things, and shows no traceback."""
    assert result.code not in (0, None), result.out
    assert "Traceback" not in result.err, result.err
    assert "Traceback" not in result.out, result.out
    for text in texts:
        assert text in result.err, result.err


def dense(block, x, **options):
    """A block as a function of tensors: the residual stream summed up."""
    from heptapod_fast.model.transformer import Stream

    return block(Stream(x), **options).value()


def fill(module):
    """Parameters none of which is 0 or 1, so that a start of zeros hides nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module
