"""Run directories: written by training, read back by everything else."""

from heptapod_fast.runs.directory import RunDir, RunError
from heptapod_fast.runs.loading import LoadedRun, load_run

__all__ = ["LoadedRun", "RunDir", "RunError", "load_run"]
