"""The run directory: what is in it, who may write to it, and how a run is read back.

RUN_DIR/  config.json  metrics.jsonl  sessions.jsonl  samples/  checkpoints/
          tokenizer.safetensors (if fitted)
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import torch

from heptapod_fast.config import MAY_CHANGE, Config, flag, is_cache
from heptapod_fast.data.cache_format import CODEBOOK, Cache
from heptapod_fast.data.sources import ImageSource
from heptapod_fast.storage import write_json
from heptapod_fast.systems import System, build_system
from heptapod_fast.tokenizers import (
    PRETRAINED,
    PatchVQ,
    Tokenizer,
    load_tokenizer,
    token_spec,
)
from heptapod_fast.train import checkpoint as checkpoints
from heptapod_fast.train.optimizer import ema_name
from heptapod_fast.train.parallel import choose_device


class RunError(RuntimeError):
    """A run directory that cannot be used as asked."""


def holder() -> str:
    """Who holds the lock, for those who meet it."""
    return f"process {os.getpid()} on {socket.gethostname()}"


class RunDir:
    """Paths of a run; `claim` makes this process its only writer."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.sessions = self.path / "sessions.jsonl"  # what each start ran on
        self.samples = self.path / "samples"
        self.checkpoints = self.path / "checkpoints"
        self.tokenizer = self.path / "tokenizer.safetensors"
        self._lock = None

    def claim(self, config: Config) -> list[str]:
        """Create the directory, lock it, and check that it holds no other run.

        Returns the settings that differ from the last start and may, as "--images 200000 (was
        100000)". Raises RunError when another process holds it, when it belongs to another
        configuration, or when it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "a+")
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.seek(0)
            other = self._lock.read().strip() or "another process"
            self._lock.close()
            raise RunError(
                f"{self.path} is in use by {other}: wait for it, stop it, or choose another --out"
            ) from error
        changed = self._compare(config)
        self._write_config(config)
        try:
            os.truncate(self._lock.fileno(), 0)
            os.write(self._lock.fileno(), holder().encode())
            for folder in (self.samples, self.checkpoints):
                folder.mkdir(exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        checkpoints.clean(self.checkpoints)
        return changed

    def keep_tokenizer(self, cache: Cache, tokenizer: Tokenizer | None) -> None:
        """Make the run readable without the cache: its codebook, or which weights it is about."""
        if cache.spec.name == "patch-vq":
            tokenizer.save(self.tokenizer)
        elif cache.spec.name in PRETRAINED:
            write_json(
                self.tokenizer.with_suffix(".json"),
                cache.manifest["tokenizer"] if tokenizer is None else tokenizer.describe(),
            )

    def _unwritable(self, error: OSError) -> RunError:
        return RunError(
            f"cannot write to the run directory {self.path}: {error} (--out names another)"
        )

    def finished(self, images: int) -> int:
        """Images of the newest checkpoint if it verifies and holds `images` or more, else 0."""
        seen = checkpoints.peek(self.checkpoints).get("images", 0)
        done = seen >= images and not checkpoints.problems(checkpoints.listed(self.checkpoints)[-1])
        return seen if done else 0

    def release(self) -> None:
        """Let others write."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _compare(self, config: Config) -> list[str]:
        if not self.config.exists():
            ours = {".lock", self.config.with_suffix(".tmp").name}  # of a start that was cut off
            foreign = sorted({p.name for p in self.path.iterdir()} - ours)
            if foreign:
                raise RunError(
                    f"{self.path} is not a run directory but holds {foreign[:5]}: "
                    "choose another --out"
                )
            return []
        before, now = vars(self.read_config()), vars(config)
        differences = {
            name: f"{flag(name)} {now[name]} (was {before[name]})"
            for name in now
            if now[name] != before[name]
        }
        moved = is_cache(before["data"]) and is_cache(now["data"])  # checkpoints know its contents
        fatal = [
            text
            for name, text in differences.items()
            if name not in MAY_CHANGE and not (moved and name == "data")
        ]
        if fatal and not self._began():
            self.tokenizer.unlink(missing_ok=True)  # fitted with the other settings
            return []
        if fatal:
            raise RunError(
                f"{self.path} holds a run with other settings: {'; '.join(fatal)}. "
                "Repeat its settings to continue it, or choose another --out"
            )
        return [text for name, text in differences.items() if name != "out"]

    def _began(self) -> bool:
        """Whether there is anything to lose: a start that failed leaves no more than settings."""
        return (
            self.metrics.exists() or self.checkpoints.is_dir() and any(self.checkpoints.iterdir())
        )

    def _write_config(self, config: Config) -> None:
        temporary = self.config.with_suffix(".tmp")
        try:
            temporary.write_text(config.to_json())
            temporary.rename(self.config)
        except OSError as error:
            raise RunError(f"cannot write {self.config}: {error.strerror or error}") from error

    def read_config(self) -> Config:
        """The settings of the run. RunError if there is none or it cannot be read."""
        if not self.config.exists():
            raise RunError(f"{self.path} is not a run directory: it has no config.json")
        try:
            return Config.from_json(self.config.read_text())
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{self.config} cannot be read: {error}") from error


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """--precision auto takes bf16 where the hardware multiplies it natively."""
    if name == "auto":
        native = (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if device.type == "cuda"
            else torch.cpu._is_avx512_bf16_supported()
        )
        return torch.bfloat16 if native else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def open_tokenizer(
    config: Config,
    run: RunDir,
    images: ImageSource | None = None,
    progress=None,
    cache: Cache | None = None,
) -> Tokenizer | None:
    """The run's tokenizer: the file it was started with, the one given, the one of the cache, or
    one fitted on `images`.

    None where only the shape of its tokens is known (kl16 and vq16 with synthetic data, or a cache
    whose weights are not here). A fitted or given codebook is saved with the run, so that the run
    stays readable on its own; of kl16 and vq16 tokenizer.json says which file they were, with its
    hash.
    """
    settings = dict(image_size=config.image_size, patch_size=config.patch_size)
    if config.tokenizer in PRETRAINED:
        return _open_pretrained(config, run, settings, images is not None, cache)
    if config.tokenizer == "patch":
        return load_tokenizer("patch", **settings)
    settings["codes"] = config.codes
    if cache is not None:
        cache.verify([CODEBOOK])
        return load_tokenizer("patch-vq", cache.path / CODEBOOK, **settings)
    if run.tokenizer.exists():
        return load_tokenizer("patch-vq", run.tokenizer, **settings)
    if config.tokenizer_weights is not None:
        tokenizer = load_tokenizer("patch-vq", config.tokenizer_weights, **settings)
    elif images is None:
        return None
    else:
        tokenizer = PatchVQ.fit(
            images,
            config.image_size,
            config.patch_size,
            codes=config.codes,
            seed=config.seed,
            progress=progress,
        )
    tokenizer.save(run.tokenizer)
    return tokenizer


def _open_pretrained(
    config: Config, run: RunDir, settings: dict, fresh: bool, cache: Cache | None
) -> Tokenizer | None:
    """kl16 or vq16. The weights are those given, those of the cache, or those of the run; for a
    cache None if they are not there any more and none are given: training needs tokens only."""
    if config.data == "synthetic":
        return None
    file, weights = run.tokenizer.with_suffix(".json"), config.tokenizer_weights
    if cache is not None:
        about = cache.manifest["tokenizer"]
        try:
            tokenizer = load_tokenizer(config.tokenizer, weights or about["weights"], **settings)
        except (OSError, ValueError):
            if weights is not None:
                raise
            return None
        if tokenizer.fingerprint == about["fingerprint"]:
            return tokenizer
        if weights is None:
            return None
        raise RunError(
            f"{weights} are not the weights that {cache.path} was made with: name those "
            "with --tokenizer-weights, or leave it out and train without sample grids"
        )
    if weights is None and file.exists():
        weights = json.loads(file.read_text())["weights"]
    tokenizer = load_tokenizer(config.tokenizer, weights, **settings)
    if fresh and not file.exists():
        write_json(file, tokenizer.describe())
    return tokenizer


def load_run(
    path: str | Path,
    checkpoint: int | None = None,
    ema: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    tokenizer_weights: str | None = None,
) -> System:
    """A trained system, ready to sample, from the newest checkpoint that verifies.

    ema: a moving average by name ("ema-0.9999", or its decay "0.9999"), default the run's first;
    "none" for the raw weights. tokenizer_weights: where those of kl16 or vq16 are now, if they are
    not where they were. The system also carries `tokenizer`, `class_names`, `images_seen`
    and `checkpoint` (its path). Raises RunError or CheckpointError saying what is missing.
    """
    run = RunDir(path)
    config = run.read_config()
    chosen = checkpoints.load_step(run.checkpoints, checkpoint)
    class_names = tuple(chosen.state["class_names"])
    spec = token_spec(config.tokenizer, config.image_size, config.patch_size, config.codes)
    target = choose_device(device)
    dtype = choose_precision(config.precision if precision == "auto" else precision, target)
    system = build_system(config, spec, len(class_names), target, fill=False)
    system.load_state_dict(chosen.read(_weights_file(config, ema)))
    system.eval().requires_grad_(False).set_dtype(dtype)
    if tokenizer_weights is not None:
        config = replace(config, tokenizer_weights=tokenizer_weights)
    tokenizer = saved_tokenizer(config, run, chosen)
    system.tokenizer = None if tokenizer is None else tokenizer.to(target)
    system.class_names, system.images_seen = class_names, chosen.state["images"]
    system.checkpoint = chosen.path
    return system


def saved_tokenizer(config: Config, run: RunDir, chosen: checkpoints.Checkpoint):
    """The tokenizer that a checkpoint was trained with, None for synthetic tokens.

    RunError if it is missing or not the same: another codebook would decode to other images.
    """
    expected = chosen.state["tokenizer"]
    if expected is None:
        return None
    tokenizer = open_tokenizer(config, run)
    if tokenizer is None:
        raise RunError(
            f"{run.tokenizer} is missing: the tokens of this run cannot be decoded "
            "without it; restore it from a copy"
        )
    if tokenizer.fingerprint != expected:
        if config.tokenizer in PRETRAINED:
            raise RunError(
                f"{tokenizer.source} are not the weights that {chosen.path} was trained "
                "with: name those with --tokenizer-weights"
            )
        raise RunError(
            f"{run.tokenizer} is not what {chosen.path} was trained with: it was "
            "changed or damaged; restore it from a copy"
        )
    return tokenizer


def _weights_file(config: Config, ema: str | None) -> str:
    names = [ema_name(decay) for decay in config.ema]
    if ema == "none" or ema is None and not names:
        return "model"
    wanted = names[0] if ema is None else ema if ema.startswith("ema-") else f"ema-{ema}"
    if wanted not in names:
        raise RunError(
            f"--ema {ema}: this run keeps {', '.join(names) or 'no average'}, and "
            "'none' for the raw weights"
        )
    return wanted
