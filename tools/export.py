"""Weights of a run for other code: `python tools/export.py RUN_DIR --out FOLDER`."""

from __future__ import annotations

from dataclasses import dataclass

from _cli import main, parse, tyro

from heptapod_fast.runs import load_run
from heptapod_fast.runs.export import export_file, export_weights


@dataclass(frozen=True)
class Arguments:
    """Write a run's weights to a file: its first moving average, or what --ema says."""

    run: tyro.conf.Positional[str]
    """Run directory."""
    out: str
    """FOLDER (model.safetensors in it), FILE.safetensors, or FILE.pt ({"model": weights} as
    PyTorch saves it, the layout of LlamaGen's published files)."""
    ema: str | None = None
    """A moving average by its decay, or "none" for the raw weights; default: the run's first."""
    checkpoint: int | None = None
    """Step of the checkpoint; default: the newest."""


def work() -> int:
    """Load, write, say what was written."""
    arguments = parse(Arguments)
    path = export_file(arguments.out)
    loaded = load_run(
        arguments.run, arguments.checkpoint, arguments.ema, device="cpu", precision="fp32"
    )
    values = export_weights(loaded, path)
    print(
        f"written: {path}, {values:,} values, {loaded.weights} of {loaded.checkpoint} "
        f"({loaded.images_seen:,} images)"
    )
    print(f"start another run from it with: python tools/train.py --init-from {path} ...")
    return 0


if __name__ == "__main__":
    main(work)
