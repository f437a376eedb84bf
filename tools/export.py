"""A trained run for others: `python tools/export.py RUN_DIR --out FOLDER`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from _cli import main, parse, tyro

from heptapod_fast.exports.files import Exported, export_weights, is_file
from heptapod_fast.exports.folder import export_folder


@dataclass(frozen=True)
class Arguments:
    """Write a run's weights, its first moving average or what --ema says: with all that sampling
    needs and a model card into a folder, or bare into a file."""

    run: tyro.conf.Positional[str]
    """Run directory; for a file also a folder that was exported."""
    out: str
    """FOLDER (weights, settings, tokenizer, samples, model card: sample.py, evaluate.py and
    load_run read it), FILE.safetensors, or FILE.pt ({"model": weights} as PyTorch saves it; of
    llamagen and npp runs the layout of LlamaGen's published files)."""
    ema: str | None = None
    """A moving average by its decay, or "none" for the raw weights; default: the run's first. Of a
    run with --ema post-hoc also a length, as 0.15."""
    checkpoint: int | None = None
    """Step of the checkpoint; default: the newest."""
    samples: bool = True
    """Draw the samples of the model card: up to 64 images."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to draw them."""
    tokenizer_weights: str | None = None
    """File of kl16 or vq16 to draw them with, if it is not where it was in training."""


def work() -> int:
    """Read, write, say what was written."""
    arguments = parse(Arguments)
    done = write(arguments)
    print(
        f"written: {done.path}, {done.values:,} values, {done.weights} of {done.checkpoint} "
        f"({done.images_seen:,} images)"
    )
    if done.remark:
        print(f"no samples: {done.remark}")
    if not is_file(arguments.out):
        print(f"sample from it with: python tools/sample.py {done.path}")
    print(f"start another run from it with: python tools/train.py --init-from {done.path} ...")
    return 0


def write(arguments: Arguments) -> Exported:
    """The file or the folder of --out."""
    if not is_file(arguments.out):
        return export_folder(
            arguments.run,
            arguments.out,
            arguments.checkpoint,
            arguments.ema,
            arguments.samples,
            arguments.device,
            arguments.tokenizer_weights,
        )
    if arguments.tokenizer_weights is not None:
        raise ValueError(
            f"--tokenizer-weights {arguments.tokenizer_weights}: --out {arguments.out} is a file "
            "of weights alone; leave it out, or name a folder with --out"
        )
    return export_weights(arguments.run, arguments.out, arguments.checkpoint, arguments.ema)


if __name__ == "__main__":
    main(work)
