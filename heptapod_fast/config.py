"""Every setting of a run, its default, and what is refused.

`Config` is what the command line fills in: `None` means "follow the size". `resolve()` returns the
same object with every `None` replaced and every contradiction refused; nothing downstream knows a
default.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

CONTINUOUS = ("kl16", "patch")


@dataclass(frozen=True)
class Preset:
    """One size. B, L and H: Heptapod paper, Table 3; depth is the backbone's, the head's is equal.

    micro_batch is the most that a rank takes at once unless told otherwise (80 GB by the estimate
    of --dry-run).
    """

    depth: int
    width: int
    heads: int
    diffusion_blocks: int
    diffusion_width: int
    micro_batch: int
    defaults: dict[str, Any]


# Heptapod section 5.1 and MAR's defaults (main_mar.py): 800 epochs of 1,281,167 images, batch 2048,
# AdamW 0.9/0.95, weight decay 0.02, constant rate after a warm-up of 12.5%, clip 3, EMA 0.9999.
_PAPER = dict(
    data=None,
    tokenizer="kl16",
    image_size=256,
    images=1_024_933_600,
    batch=2048,
    density=1,
    lr_per_256=1e-4,
    lr_schedule="constant",
    warmup=0.125,
    dropout=0.1,
    embedding_std=0.02,
    sample_every=10_000_000,
    checkpoint_every=1_281_167,
    log_every=102_400,
)
_TINY = dict(
    data="logograms",
    tokenizer="patch-vq",
    image_size=24,
    images=150_000,
    batch=64,
    density=2,
    lr_per_256=8e-3,
    lr_schedule="cosine",
    warmup=0.02,
    dropout=0.0,
    embedding_std=1.0,
    sample_every=30_000,
    checkpoint_every=30_000,
    log_every=1_600,
)
PRESETS = {
    "tiny": Preset(3, 128, 4, 3, 128, 256, _TINY),
    "B": Preset(12, 768, 12, 6, 1024, 128, _PAPER),
    "L": Preset(16, 1024, 16, 8, 1280, 128, _PAPER),
    "H": Preset(20, 1280, 16, 12, 1536, 64, _PAPER),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one training run; field names are the flags of `tools/train.py`."""

    size: Literal["tiny", "B", "L", "H"]
    """Preset: model, tokenizer, data and recipe follow from it."""
    system: Literal["heptapod", "1d-raster", "1d-random"] = "heptapod"
    """What is trained: Heptapod, or one of the 1D baselines it is measured against."""

    # Data and tokens
    data: str | None = None
    """logograms | synthetic | IMAGE_FOLDER (class = subfolder; flat = one class) | CACHE.zarr (from
    tools/cache.py; it decides tokenizer, image size and flip)."""
    tokenizer: Literal["kl16", "vq16", "patch", "patch-vq"] | None = None
    """Token kind: kl16 and patch are continuous, vq16 and patch-vq discrete."""
    tokenizer_weights: str | None = None
    """Weights of the tokenizer; for patch-vq a codebook fitted earlier (default: fit one)."""
    image_size: int | None = None
    """Side of the training images in pixels."""
    patch_size: int | None = None
    """Side of a patch in pixels (patch, patch-vq; kl16 and vq16 are fixed at 16)."""
    codes: int | None = None
    """Size of the patch-vq codebook."""
    num_classes: int | None = None
    """Number of classes; default: what the data has (synthetic: 1000)."""
    logogram_count: int | None = None
    """Size of the logogram training set."""
    flip: bool | None = None
    """Random horizontal flips; on only where B, L or H meet kl16 or vq16 at 256 px (it mirrors
    letters)."""
    max_broken: int = 0
    """Unreadable images that may be left out before the run is refused."""
    decoder: Literal["pillow", "dali"] = "pillow"
    """Reads the images of a folder."""
    allow_upscale: bool = False
    """Enlarge images that are far smaller than --image-size instead of refusing them."""

    # Model
    depth: int | None = None
    """Blocks of the backbone; default: the size's total less --head-depth."""
    width: int | None = None
    """Hidden size."""
    heads: int | None = None
    """Attention heads."""
    head: Literal["global", "local"] | None = None
    """2D prediction head: the whole grid, or the window that holds the next token."""
    head_depth: int | None = None
    """Blocks of the 2D head; the backbone gets the rest of the size's total (paper, Table 4)."""
    window: int | None = None
    """Tokens per window of the local head: a square number whose root divides the grid."""
    density: int | None = None
    """Supervision density n: steps per sequence that get a head pass and a loss."""
    steps: Literal["antithetic", "uniform", "mar"] | None = None
    """How supervised steps are drawn: mirrored pairs (static shapes), alone, or MAR's ratio."""
    loss_weight: Literal["position", "step"] | None = None
    """Average over supervised positions, or within each step first."""
    diffusion_blocks: int | None = None
    """Residual blocks of the diffusion MLP (continuous tokens)."""
    diffusion_width: int | None = None
    """Width of the diffusion MLP."""
    diffusion_repeat: int | None = None
    """Fresh timesteps and noises per supervised token (MAR's diffusion_batch_mul)."""
    diffusion_loss: Literal["mse+vb", "mse"] | None = None
    """MAR's MSE plus variational bound of the learned variance, or the plain MSE."""
    dropout: float | None = None
    """After the attention projection and both layers of the MLP."""
    embedding_std: float | None = None
    """Deviation of embeddings and learned tokens at the start: MAR's 0.02, and 1 for tiny, where it
    halves the images that are needed."""

    # Recipe, counted in images
    images: int | None = None
    """Images to train on in total."""
    batch: int | None = None
    """Global batch size."""
    micro_batch: int | None = None
    """Sequences per forward pass and rank; default: what divides the rank's share and fits."""
    lr_per_256: float | None = None
    """Learning rate per 256 images of batch."""
    lr_schedule: Literal["constant", "cosine"] | None = None
    """After the warm-up: constant, or half a cosine down to 1% at the end."""
    warmup: float | None = None
    """Share of the images over which the rate rises linearly from 0."""
    weight_decay: float = 0.02
    """Decoupled weight decay of MAR's decay group."""
    beta1: float = 0.9
    """AdamW's first decay rate."""
    beta2: float = 0.95
    """AdamW's second decay rate."""
    clip: float = 3.0
    """Largest norm of the gradient; 0 turns clipping off."""
    ema: tuple[float, ...] = (0.9999,)
    """Decays of the moving averages of the weights, each min(decay, (1 + step) / (10 + step))."""
    seed: int = 0
    """Seed of everything that is random."""

    # Run
    out: str | None = None
    """Run directory; default: runs/NAME-HASH made from the settings."""
    checkpoint_every: int | None = None
    """Images between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    sample_every: int | None = None
    """Images between sample grids; 0 turns them off."""
    log_every: int | None = None
    """Images between progress lines and records of metrics.jsonl."""
    minutes: float | None = None
    """Stop after this time, saved; the same command goes on. For queues with a time limit."""
    max_skips: int = 20
    """Steps with a non-finite gradient that are skipped before the run gives up."""
    allow_data_change: bool = False
    """Continue a run although its data or tokenizer is not what it was."""
    cache_mode: Literal["auto", "gpu", "ram", "stream"] = "auto"
    """Where a cache is while it is read: on the GPU, in shared memory, or streamed from disk; auto
    takes the first that fits. All give the same batches."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Activations: bf16 where the hardware has it (masters stay fp32)."""
    kernels: Literal["auto", "triton", "reference"] = "auto"
    """Implementation of every operation that has a Triton kernel, attention aside."""
    attention: Literal["auto", "triton", "flash", "sdpa", "reference"] = "auto"
    """Implementation of attention: our kernels, the flash-attn package, PyTorch's, plain matmuls.
    The kernels and flash repeat their gradients bit for bit; sdpa on CUDA need not."""
    adamw_ema: Literal["auto", "reference", "cpu", "cuda"] = "auto"
    """Implementation of the optimizer step."""

    def resolve(self) -> Config:
        """The same with every None filled in; ValueError on a contradiction, naming the flag.

        Idempotent; see resolve.py.
        """
        from heptapod_fast.resolve import resolve

        return resolve(self)

    @property
    def continuous(self) -> bool:
        """Whether tokens are vectors (diffusion loss) or codes (cross-entropy)."""
        return self.tokenizer in CONTINUOUS

    @property
    def learning_rate(self) -> float:
        """Peak rate: lr_per_256 * batch / 256."""
        return self.lr_per_256 * self.batch / 256

    @property
    def warmup_images(self) -> int:
        """Images of the linear warm-up."""
        return round(self.warmup * self.images)

    def identity(self) -> dict[str, Any]:
        """The settings that make two runs the same run (the rest may change on resuming)."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in MAY_CHANGE}

    def run_dir(self) -> str:
        """--out, or a name derived from the settings."""
        if self.out is not None:
            return self.out
        data = self.data if self.data in ("logograms", "synthetic") else str(self.data).rstrip("/")
        name = "-".join(
            (self.system, self.size, data.split("/")[-1], self.tokenizer, f"{self.image_size}px")
        )
        text = json.dumps(self.identity(), sort_keys=True)
        return f"runs/{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def to_json(self) -> str:
        """The settings as JSON, one a line."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> Config:
        """Inverse of `to_json`; ValueError on a setting that this version does not know."""
        values = json.loads(text)
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(Config)})
        if unknown:
            raise ValueError(f"config.json has settings this version does not know: {unknown}")
        values["ema"] = tuple(values["ema"])
        return Config(**values)


# Changing one of these does not make another model out of a run. --images reshapes the schedule
# from here on; device, precision and implementations change rounding. What the weights of a
# tokenizer are, checkpoints know.
MAY_CHANGE = frozenset(
    {
        "out",
        "images",
        "checkpoint_every",
        "keep_checkpoints",
        "sample_every",
        "log_every",
        "device",
        "precision",
        "kernels",
        "attention",
        "adamw_ema",
        "micro_batch",
        "max_broken",
        "max_skips",
        "minutes",
        "allow_data_change",
        "cache_mode",
        "tokenizer_weights",
    }
)


def is_cache(data: str | None) -> bool:
    """Whether --data names a cache of tokens."""
    return data is not None and data.rstrip("/").endswith(".zarr")


def flag(name: str) -> str:
    """The command-line form of a field's name."""
    return "--" + name.replace("_", "-")
