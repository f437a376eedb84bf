"""A stand-in for nsys: it notes how it was called, runs the command with stand-ins for what needs a
GPU, and answers `stats` with tables that look like nsys's."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

# Columns and lines as nsys 2025.3 prints them.
STATS = """\
Generating SQLite file /out/steps.sqlite from /out/steps.nsys-rep
Processing [/out/steps.sqlite] with [/opt/nvidia/nsight-systems/reports/cuda_gpu_kern_sum.py]...
Time (%),Total Time (ns),Instances,Avg (ns),Med (ns),Min (ns),Max (ns),StdDev (ns),Name
33.3,3000000,1,3000000.0,3000000.0,3000000,3000000,0.0,layer_norm_kernel
66.7,6000000,2,3000000.0,3000000.0,2000000,4000000,0.0,"void gemm<(int)128, float>(float *, int)"

Processing [/out/steps.sqlite] with [/opt/nvidia/nsight-systems/reports/cuda_gpu_trace.py]...
Start (ns),Duration (ns),CorrId,GrdX,GrdY,GrdZ,BlkX,BlkY,BlkZ,Reg/Trd,StcSMem (MB),DymSMem (MB),\
Bytes (MB),Throughput (MB/s),SrcMemKd,DstMemKd,Device,Ctx,GreenCtx,Strm,Name
1000000,1000000,6,,,,,,,,,,4.194,6337.593,Pinned,Device,NVIDIA H200 (0),1,,7,\
[CUDA memcpy Host-to-Device]
2000000,4000000,7,64,1,1,128,1,1,160,0.000,0.025,,,,,NVIDIA H200 (0),1,,7,\
"void gemm<(int)128, float>(float *, int)"
5000000,3000000,8,64,1,1,128,1,1,32,0.000,0.000,,,,,NVIDIA H200 (0),1,,13,layer_norm_kernel
9000000,2000000,9,64,1,1,128,1,1,160,0.000,0.025,,,,,NVIDIA H200 (0),1,,7,\
"void gemm<(int)128, float>(float *, int)"

Processing [/out/steps.sqlite] with [/opt/nvidia/nsight-systems/reports/nvtx_gpu_proj_sum.py]...
Range,Style,Total Proj Time (ns),Total Range Time (ns),Range Instances,Proj Avg (ns),\
Proj Med (ns),Proj Min (ns),Proj Max (ns),Proj StdDev (ns),Total GPU Ops,Avg GPU Ops,\
Avg Range Lvl,Avg Num Child
":backward, op_id = 9",PushPop,5000000,100,2,2500000.0,2500000.0,1,1,0.0,2,1.0,1.0,1.0
":forward, op_id = 1",PushPop,1000000,100,1,1000000.0,1000000.0,1,1,0.0,1,1.0,1.0,1.0
":forward, op_id = 5",PushPop,2000000,100,1,2000000.0,2000000.0,1,1,0.0,1,1.0,1.0,1.0
":heptapod_fast::layer_norm, seq = 3, op_id = 2",PushPop,500000,9,1,1.0,1.0,1,1,0.0,1,1.0,1.0,1.0
":heptapod_fast::layer_norm, seq = 8, op_id = 6",PushPop,1500000,9,2,1.0,1.0,1,1,0.0,2,1.0,1.0,1.0
":layer_norm: forward, B, 32896 x 768, op_id = 7",PushPop,4000000,9,1,1.0,1.0,1,1,0.0,1,1.0,1.0,1.0
":aten::add, op_id = 3",PushPop,9000000,100,2,4500000.0,4500000.0,1,1,0.0,2,1.0,1.0,1.0

"""

PROGRAM = """\
#!{python}
import contextlib, json, os, runpy, sys
from pathlib import Path

folder = Path(__file__).parent
recorded = os.environ.get("HEPTAPOD_RECORDED_BY_NSYS")
with open(folder / "calls.jsonl", "a") as stream:
    stream.write(json.dumps({{"words": sys.argv[1:], "recorded": recorded}}) + "\\n")
if sys.argv[1] == "stats":
    answer = folder / "stats.csv"
    if not answer.exists():
        sys.exit("ERROR: Database file could not be opened")
    sys.stdout.write(answer.read_text())
    sys.exit()

options = [word for word in sys.argv[2:] if word.startswith("--")]
first = next(n for n, word in enumerate(sys.argv[2:], 2) if not word.startswith("--"))
command = sys.argv[first + 1 :]  # behind the interpreter
(output,) = [word.removeprefix("--output=") for word in options if word.startswith("--output=")]

import torch

state = {{"recording": False}}

@contextlib.contextmanager
def recording():
    state["recording"] = True
    Path(output + ".nsys-rep").touch()
    yield
    state["recording"] = False

@contextlib.contextmanager
def ranges():
    assert state["recording"]
    with torch.profiler.profile() as profiler:
        yield
    seen = {{event.key: event.count for event in profiler.key_averages()}}
    (folder / "ranges.json").write_text(json.dumps(seen))

torch.cuda.profiler.profile = recording
torch.autograd.profiler.emit_nvtx = ranges
sys.argv = command
sys.path.insert(0, str(Path(command[0]).parent))
runpy.run_path(command[0], run_name="__main__")
"""


@dataclass(frozen=True)
class Fake:
    """Where the stand-in notes things. stats: what it answers."""

    folder: Path
    stats: Path

    @property
    def calls(self) -> list[dict]:
        """{"words": of the command line, "recorded": the variable that says so} of each call."""
        file = self.folder / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def ranges(self) -> dict[str, int]:
        """{name: how often} of what ran while it recorded."""
        return json.loads((self.folder / "ranges.json").read_text())


def install(folder: Path, monkeypatch) -> Fake:
    """Put it on PATH."""
    place = folder / "bin"
    place.mkdir()
    program = place / "nsys"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    (place / "stats.csv").write_text(STATS)
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")
    return Fake(place, place / "stats.csv")
