"""Sample from a trained run: `python tools/sample.py RUN_DIR --out grid.png`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from _cli import main
from _sampling import SamplingArguments, parse_sampling, samples_of
from torch import Tensor


@dataclass(kw_only=True)
class Arguments(SamplingArguments):
    """Sample images from a run's moving average."""

    classes: str | None = None
    """Class numbers separated by commas; default: all, or the first ten of more than 64."""
    count: int | None = None
    """Images in total, spread evenly over the classes; default: 8 per class."""
    out: str | None = None
    """Grid to write; default: RUN_DIR/samples/sample-STEP-SEED.png."""
    save_images: str | None = None
    """Folder for single PNG images."""
    save_npz: str | None = None
    """File for arr_0 (B, H, W, 3) uint8 and labels, as ADM's evaluator reads it."""


def chosen_classes(text: str | None, available: int) -> list[int]:
    """--classes as numbers. ValueError on anything else or out of range."""
    if text is None:
        return list(range(available if available <= 64 else 10))
    try:
        classes = [int(word) for word in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--classes {text}: expected numbers with commas, as 0,1,2") from error
    bad = [c for c in classes if not 0 <= c < available]
    if bad:
        raise ValueError(
            f"--classes {text}: {bad} out of range, this run has {available} classes, "
            f"0 to {available - 1}"
        )
    return classes


def work() -> int:
    """Parse, load, sample, write."""
    arguments, given = parse_sampling(Arguments)
    for flag, path, ending in (
        ("--out", arguments.out, ".png"),
        ("--save-npz", arguments.save_npz, ".npz"),
    ):
        if path is not None and not path.endswith(ending):
            raise ValueError(f"{flag} {path}: expected a name that ends in {ending}")
    from heptapod_fast.pictures import save_grid
    from heptapod_fast.sampling.generate import spread, together

    loaded = arguments.load()
    options = loaded.system.options(**given)
    classes = chosen_classes(arguments.classes, len(loaded.class_names))
    count = 8 * len(classes) if arguments.count is None else arguments.count
    arguments.check_count(count)
    labels = spread(classes, count)
    images = together(samples_of(loaded, labels, arguments, options))
    step = loaded.checkpoint.name
    name = f"sample-{step}-seed{arguments.seed}.png"
    out = arguments.out or Path(arguments.run) / "samples" / name
    save_grid(images, out, columns=max(1, min(8, -(-count // len(classes)))))
    drawn = ", ".join(loaded.class_names[c] for c in dict.fromkeys(labels.tolist()))
    print(
        f"{count} images of classes {drawn} after {loaded.images_seen:,} training images, weights "
        f"of {loaded.weights}: {out}"
    )
    save_singles(arguments, images, labels)
    return 0


def save_singles(arguments: Arguments, images: Tensor, labels: Tensor) -> None:
    """--save-images and --save-npz."""
    from heptapod_fast.pictures import save_png
    from heptapod_fast.tokenizers import to_uint8

    pixels = to_uint8(images).permute(0, 2, 3, 1).contiguous()
    if arguments.save_images:
        for i, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
            save_png(image, Path(arguments.save_images) / f"{i:06d}-class{label}.png")
        print(f"single images: {arguments.save_images}")
    if arguments.save_npz:
        import numpy as np

        Path(arguments.save_npz).parent.mkdir(parents=True, exist_ok=True)
        np.savez(arguments.save_npz, arr_0=pixels.numpy(), labels=labels.numpy())
        print(f"arrays: {arguments.save_npz}")


if __name__ == "__main__":
    main(work)
