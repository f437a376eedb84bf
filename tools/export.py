"""Weights of a run for other code: `python tools/export.py RUN_DIR --out FOLDER`."""

from __future__ import annotations

from dataclasses import dataclass

from _cli import main, parse, tyro

from heptapod_fast.runs.export import export_run


@dataclass(frozen=True)
class Arguments:
    """Write a run's weights to a file: its first moving average, or what --ema says."""

    run: tyro.conf.Positional[str]
    """Run directory."""
    out: str
    """FOLDER (model.safetensors in it), FILE.safetensors, or FILE.pt ({"model": weights} as
    PyTorch saves it; of llamagen and npp runs the layout of LlamaGen's published files)."""
    ema: str | None = None
    """A moving average by its decay, or "none" for the raw weights; default: the run's first. Of a
    run with --ema post-hoc also a length, as 0.15."""
    checkpoint: int | None = None
    """Step of the checkpoint; default: the newest."""


def work() -> int:
    """Read, write, say what was written."""
    arguments = parse(Arguments)
    done = export_run(arguments.run, arguments.out, arguments.checkpoint, arguments.ema)
    print(
        f"written: {done.path}, {done.values:,} values, {done.weights} of {done.checkpoint} "
        f"({done.images_seen:,} images)"
    )
    print(f"start another run from it with: python tools/train.py --init-from {done.path} ...")
    return 0


if __name__ == "__main__":
    main(work)
