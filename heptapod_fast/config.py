"""Every setting of a run, its default, and what is refused.

`Config` is what the command line fills in: `None` means "follow the size". `resolve()` returns the
same object with every `None` replaced and every contradiction refused; nothing downstream knows a
default.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

CONTINUOUS = ("kl16", "patch")


@dataclass(frozen=True)
class Preset:
    """One size. B, L and H: Heptapod paper, Table 3; depth is the backbone's, the head's is equal.

    micro_batch is the most that a rank takes at once unless told otherwise (it fits 80 GB).
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
    data=None, tokenizer="kl16", image_size=256, images=1_024_933_600, batch=2048, density=1,
    lr_per_256=1e-4, lr_schedule="constant", warmup=0.125, dropout=0.1, embedding_std=0.02,
    sample_every=10_000_000,
    checkpoint_every=1_281_167, log_every=102_400,
)
_TINY = dict(
    data="logograms", tokenizer="patch-vq", image_size=24, images=180_000, batch=64,
    density=2, lr_per_256=8e-3, lr_schedule="cosine", warmup=0.02, dropout=0.0,
    embedding_std=1.0,
    sample_every=30_000, checkpoint_every=30_000, log_every=1_600,
)
PRESETS = {
    "tiny": Preset(3, 128, 4, 3, 256, 256, _TINY),
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
    """logograms | synthetic | IMAGE_FOLDER (class = subfolder; flat = one class)."""
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
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Activations: bf16 where the hardware has it (masters stay fp32)."""
    attention: Literal["auto", "reference", "sdpa"] = "auto"
    """Implementation of attention."""
    adamw_ema: Literal["auto", "reference", "cpu", "cuda"] = "auto"
    """Implementation of the optimizer step."""

    def resolve(self) -> Config:
        """Fill in what follows from the size and refuse contradictions.

        Raises ValueError naming the flag at fault. Idempotent.
        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        _refuse_unknown(values)
        _refuse_foreign(values)
        preset = PRESETS[self.size]
        for name, default in preset.defaults.items():
            if values[name] is None:
                values[name] = default
        _resolve_tokens(values, self)
        _resolve_model(values, preset)
        _resolve_recipe(values, self)
        return dataclasses.replace(self, **values)

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
        name = "-".join((self.system, self.size, data.split("/")[-1], self.tokenizer,
                         f"{self.image_size}px"))
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
# from here on; device, precision and implementations change rounding.
MAY_CHANGE = frozenset({
    "out", "images", "checkpoint_every", "keep_checkpoints", "sample_every", "log_every", "device",
    "precision", "attention", "adamw_ema", "micro_batch", "max_broken",
    "max_skips", "minutes", "allow_data_change",
})

_HEAD_FLAGS = ("head", "head_depth", "window", "density", "steps", "loss_weight")
_DIFFUSION_FLAGS = ("diffusion_blocks", "diffusion_width", "diffusion_repeat", "diffusion_loss")


def flag(name: str) -> str:
    """The command-line form of a field's name."""
    return "--" + name.replace("_", "-")


def _refuse(values: dict, names: tuple[str, ...], why: str) -> None:
    for name in names:
        if values[name] is not None:
            raise ValueError(f"{flag(name)} {values[name]} {why}")


def _refuse_unknown(values: dict) -> None:
    """Names that are not among the choices of their setting."""
    for name, hint in get_type_hints(Config).items():
        choices = [c for part in (hint, *get_args(hint)) for c in get_args(part)
                   if isinstance(c, str)]
        if choices and values[name] is not None and values[name] not in choices:
            raise ValueError(f"{flag(name)} {values[name]}: expected one of {', '.join(choices)}")


def _refuse_foreign(values: dict) -> None:
    """Flags that mean nothing for the chosen system."""
    if values["system"] != "heptapod":
        _refuse(values, _HEAD_FLAGS,
                f"belongs to the 2D head; --system {values['system']} has none")


def _resolve_tokens(values: dict, given: Config) -> None:
    tokenizer = values["tokenizer"]
    if values["tokenizer"] in ("kl16", "vq16"):
        if values["patch_size"] not in (None, 16):
            raise ValueError(f"--patch-size {values['patch_size']}: {tokenizer} has 16 px patches")
        values["patch_size"] = 16
    elif values["patch_size"] is None:
        values["patch_size"] = 16 if values["image_size"] >= 128 else 4
    if tokenizer == "patch-vq":
        values["codes"] = 128 if values["codes"] is None else values["codes"]
        if not 2 <= values["codes"] <= 65536:
            raise ValueError(f"--codes {values['codes']}: expected 2 to 65536")
    else:
        _refuse(values, ("codes",),
                f"sets the codebook of patch-vq, not of --tokenizer {tokenizer}")
    if tokenizer == "patch":
        _refuse(values, ("tokenizer_weights",), "given, but --tokenizer patch has no weights")
    if tokenizer not in CONTINUOUS:
        _refuse(values, _DIFFUSION_FLAGS, f"needs continuous tokens; {tokenizer} is discrete")
    if values["data"] != "logograms":
        _refuse(values, ("logogram_count",), "needs --data logograms")
    elif values["logogram_count"] is None:
        values["logogram_count"] = 50_000
    if values["data"] == "synthetic" and values["num_classes"] is None:
        values["num_classes"] = 1000
    if values["flip"] is None:
        values["flip"] = (tokenizer in ("kl16", "vq16") and values["image_size"] == 256
                          and values["size"] != "tiny" and values["data"] != "synthetic")
    elif values["flip"] and values["data"] == "synthetic":
        raise ValueError("--flip: synthetic tokens have no images to mirror")
    for name in ("image_size", "patch_size", "num_classes", "logogram_count"):
        if values[name] is not None and values[name] < 1:
            raise ValueError(f"{flag(name)} {values[name]}: expected at least 1")
    size, patch = values["image_size"], values["patch_size"]
    if size % patch:
        below, above = size // patch * patch, -(-size // patch) * patch
        divisors = [p for p in range(1, size + 1) if size % p == 0]
        nearest = sorted(divisors, key=lambda p: abs(p - patch))[:2]
        raise ValueError(
            f"--image-size {size} is not a multiple of the patch of {patch} px: the nearest image "
            f"sizes are {max(below, patch)} and {above}"
            + ("" if tokenizer in ("kl16", "vq16")
               else f", the nearest --patch-size {nearest[0]} or {nearest[-1]}"))


def _resolve_model(values: dict, preset: Preset) -> None:
    total = 2 * preset.depth
    grid = values["image_size"] // values["patch_size"]
    if values["system"] == "heptapod":
        if values["head_depth"] is None:
            values["head_depth"] = preset.depth
        if values["depth"] is None:
            values["depth"] = total - values["head_depth"]
        if values["depth"] < 1 or values["head_depth"] < 1:
            raise ValueError(
                f"--head-depth {values['head_depth']}: expected 1 to {total - 1}, so that the "
                f"backbone keeps a block (or give --depth too)")
        _resolve_head(values, grid)
    else:
        # Same parameters as Heptapod's backbone and head together.
        values["depth"] = total if values["depth"] is None else values["depth"]
        values["density"] = None
    for name in ("width", "heads"):
        values[name] = getattr(preset, name) if values[name] is None else values[name]
    for name in ("depth", "width", "heads"):
        if values[name] < 1:
            raise ValueError(f"{flag(name)} {values[name]}: expected at least 1")
    if values["width"] % values["heads"]:
        raise ValueError(f"--width {values['width']} is not a multiple of --heads "
                         f"{values['heads']}")
    if values["tokenizer"] in CONTINUOUS:
        for name in ("diffusion_blocks", "diffusion_width"):
            values[name] = getattr(preset, name) if values[name] is None else values[name]
        if values["diffusion_repeat"] is None:
            values["diffusion_repeat"] = 4
        for name in ("diffusion_blocks", "diffusion_width", "diffusion_repeat"):
            if values[name] < 1:
                raise ValueError(f"{flag(name)} {values[name]}: expected at least 1")
        values["diffusion_loss"] = values["diffusion_loss"] or "mse+vb"
    if values["embedding_std"] <= 0:
        raise ValueError(f"--embedding-std {values['embedding_std']}: expected more than 0")
    if not 0.0 <= values["dropout"] < 1.0:
        raise ValueError(f"--dropout {values['dropout']}: expected 0 <= P < 1")


def _resolve_head(values: dict, grid: int) -> None:
    tokens = grid * grid
    if values["head"] is None:
        values["head"] = "local" if values["window"] not in (None, tokens) else "global"
    if values["head"] == "global":
        if values["window"] not in (None, tokens):
            raise ValueError(f"--window {values['window']} contradicts --head global, whose window "
                             f"is the whole grid of {tokens} tokens; use --head local")
        values["window"] = tokens
    else:
        sides = [s for s in range(1, grid) if grid % s == 0]
        windows = [s * s for s in sides]
        if not windows:
            raise ValueError(f"--head local: a {grid}x{grid} grid has no smaller windows")
        if values["window"] is None:
            values["window"] = min(windows, key=lambda w: abs(math.log(w / (tokens / 4))))
        if values["window"] not in windows:
            raise ValueError(f"--window {values['window']}: a {grid}x{grid} grid divides into "
                             f"windows of {', '.join(map(str, windows))} tokens")
    if not 1 <= values["density"] <= tokens:
        raise ValueError(f"--density {values['density']}: expected 1 to {tokens} steps per "
                         "sequence")
    values["steps"] = values["steps"] or "antithetic"
    values["loss_weight"] = values["loss_weight"] or "position"


def _resolve_recipe(values: dict, given: Config) -> None:
    for name in ("images", "batch", "micro_batch", "checkpoint_every", "keep_checkpoints",
                 "log_every"):
        if values[name] is not None and values[name] < 1:
            raise ValueError(f"{flag(name)} {values[name]}: expected at least 1")
    if values["sample_every"] < 0:
        raise ValueError(f"--sample-every {values['sample_every']}: expected 0 or more")
    if not 0.0 <= values["warmup"] < 1.0:
        raise ValueError(f"--warmup {values['warmup']}: expected a share 0 <= W < 1 of the images")
    if values["clip"] < 0 or values["lr_per_256"] <= 0 or values["weight_decay"] < 0:
        raise ValueError("--clip and --weight-decay: expected 0 or more; --lr-per-256: more than 0")
    if not all(0.0 <= d < 1.0 for d in values["ema"]) or len(values["ema"]) > 4:
        raise ValueError(f"--ema {values['ema']}: expected up to four decays 0 <= D < 1")
    if len(set(values["ema"])) != len(values["ema"]):
        raise ValueError(f"--ema {values['ema']}: a decay is named twice")
    if not 0 <= given.seed < 2**63:
        raise ValueError(f"--seed {given.seed}: expected 0 to 2**63 - 1")


def share_of_batch(config: Config, world_size: int) -> tuple[int, int]:
    """(sequences per rank, micro-batches per step) of a resolved config.

    Raises ValueError naming --batch or --micro-batch when they do not divide, or when antithetic
    pairs would be split.
    """
    batch, micro = config.batch, config.micro_batch
    if batch % world_size:
        raise ValueError(f"--batch {batch} does not divide over {world_size} ranks: the nearest "
                         f"are {batch // world_size * world_size} and "
                         f"{-(-batch // world_size) * world_size}")
    share = batch // world_size
    divisors = [d for d in range(1, share + 1) if share % d == 0]
    pairs = config.steps == "antithetic"
    if micro is None:
        fitting = [d for d in divisors if d <= PRESETS[config.size].micro_batch
                   and not (pairs and d % 2)]
        micro = max(fitting, default=share)
    if share % micro:
        nearest = sorted(sorted(divisors, key=lambda d: abs(d - micro))[:2])
        raise ValueError(f"--micro-batch {micro} does not divide the {share} sequences of a rank: "
                         f"the nearest are {' and '.join(map(str, nearest))}")
    if pairs and micro % 2:
        raise ValueError(f"a micro-batch of {micro} is odd, but --steps antithetic works on pairs: "
                         "use an even --micro-batch (and an even --batch per rank), or "
                         "--steps uniform")
    return share, share // micro
