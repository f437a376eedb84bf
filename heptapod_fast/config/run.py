"""Where a run is kept, what it says, and what it runs on."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Literal

from heptapod_fast.config.settings import (
    Settings,
    at_least,
    last_part,
    more_than,
    names_among,
    setting,
)

SINKS = ("tensorboard", "wandb")


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings):
    """The run: its directory, what it writes, what it runs on."""

    out: str | None = setting(
        "Run directory; default: runs/NAME-HASH made from the settings.", may_change=True
    )
    init_from: str | None = setting(
        "Start from the weights of another run (its moving average), or of a file (.safetensors, "
        ".pt): what fits is taken, the rest drawn anew; classes are matched by name.",
        before=None,
    )
    checkpoint_every: int = setting(
        "Images between checkpoints.", rule=at_least(1), may_change=True
    )
    keep_checkpoints: int = setting(
        "Newest checkpoints that are kept.", default=2, rule=at_least(1), may_change=True
    )
    sample_every: int = setting(
        "Images between sample grids; 0 turns them off.", rule=at_least(0), may_change=True
    )
    evaluate_every: int = setting(
        "Images between measurements (--evaluate-metrics), into metrics.jsonl and the report; 0 "
        "turns them off.",
        default=0,
        rule=at_least(0),
        may_change=True,
    )
    evaluate_metrics: str | None = setting(
        "What is measured then, separated by commas, of the metrics of tools/evaluate.py; default: "
        "symmetry for logograms, relation for pairs, else fid,is.",
        may_change=True,
        before=None,
    )
    evaluate_count: int = setting(
        "Samples of a measurement, spread evenly over the classes.",
        default=400,
        rule=at_least(2),
        may_change=True,
    )
    evaluate_reference: str | None = setting(
        "What samples are compared with, a folder or an .npz; default: the training images.",
        may_change=True,
        before=None,
    )
    evaluate_inception: str | None = setting(
        "File of Inception's weights for fid and its relatives; default: a small classifier of the "
        "training images.",
        may_change=True,
        before=None,
    )
    evaluate_inception_sha256: str | None = setting(
        "How the SHA-256 of --evaluate-inception begins, if it is not the published file.",
        may_change=True,
        before=None,
    )
    log_every: int = setting(
        "Images between progress lines and records of metrics.jsonl.",
        rule=at_least(1),
        may_change=True,
    )
    log: str = setting(
        "Where records go beside metrics.jsonl: tensorboard, wandb, or both with a comma.",
        default="",
        rule=names_among(SINKS),
        may_change=True,
    )
    minutes: float | None = setting(
        "Stop after this time, saved; the same command goes on. For queues with a time limit.",
        rule=more_than(0),
        may_change=True,
    )
    max_skips: int = setting(
        "Steps with a bad gradient that are skipped, each made up for by 50 good ones, before the "
        "run goes back to its last good checkpoint.",
        default=20,
        rule=at_least(0),
        may_change=True,
    )
    max_rollbacks: int = setting(
        "How often a run goes back to a good checkpoint, and on from there with the images that "
        "come next, before it gives up.",
        default=3,
        rule=at_least(0),
        may_change=True,
    )
    allow_data_change: bool = setting(
        "Continue a run although its data or tokenizer is not what it was.",
        default=False,
        may_change=True,
    )
    device: Literal["auto", "cpu", "cuda"] = setting(
        "Where to train.", default="auto", may_change=True
    )
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = setting(
        "How several ranks share the model: a copy on each (ddp), its state spread over all (fsdp) "
        "or over the ranks of each machine (hsdp); auto takes ddp where it fits.",
        default="auto",
        may_change=True,
    )
    shard_ranks: int | None = setting(
        "Ranks over which hsdp spreads one copy; default: those of one machine.",
        rule=at_least(1),
        may_change=True,
    )
    sync_checkpoints: bool = setting(
        "Wait until a checkpoint is on the disk, instead of writing a copy of it while training "
        "goes on.",
        default=False,
        may_change=True,
    )
    rank_timeout: float = setting(
        "Seconds that ranks wait for one of them in training before they take it for lost; the "
        "first step of a session may take longer.",
        default=300.0,
        rule=more_than(0),
        may_change=True,
    )
    precision: Literal["auto", "bf16", "fp32"] = setting(
        "Mixed precision: activations in bf16 where the hardware has it (auto), master weights "
        "stay fp32.",
        default="auto",
        may_change=True,
    )
    kernels: Literal["auto", "triton", "reference"] = setting(
        "Implementation of every operation that has a Triton kernel, attention aside.",
        default="auto",
        may_change=True,
    )
    attention: Literal["auto", "triton", "flash", "sdpa", "reference"] = setting(
        "Implementation of attention: our kernels, the flash-attn package, PyTorch's, plain "
        "matmuls. The kernels and flash repeat their gradients bit for bit; sdpa on CUDA need not.",
        default="auto",
        may_change=True,
    )
    adamw_ema: Literal["auto", "reference", "cpu", "cuda"] = setting(
        "Implementation of the optimizer step.", default="auto", may_change=True
    )
    recompute: Literal["auto", "off", "selective", "full"] = setting(
        "Activations that the backward pass makes again instead of keeping them: none, those "
        "between products, or all of a block; auto is the first of these that fits into memory. "
        "Results are the same, bit for bit.",
        default="auto",
        may_change=True,
    )

    cuda_graph: Literal["auto", "on", "off"] = setting(
        "Capture the steps of a GPU in CUDA graphs, which spares the launching of every kernel: "
        "auto where that can be, on one GPU and with ddp. Results are the same, bit for bit.",
        default="auto",
        may_change=True,
    )

    compile: Literal["auto", "on", "off"] = setting(
        "Compile the blocks by torch.compile, which takes a while at the first step and may round "
        "otherwise; auto does on a GPU.",
        default="off",
        may_change=True,
    )

    @property
    def sinks(self) -> tuple[str, ...]:
        """Names in `log`."""
        return tuple(self.log.split(",")) if self.log else ()

    def portable(self) -> RunSettings:
        """See `Settings.portable`."""
        return replace(
            self,
            out=None,
            init_from=last_part(self.init_from),
            evaluate_reference=last_part(self.evaluate_reference),
            evaluate_inception=last_part(self.evaluate_inception),
        )

    def resolve(self, defaults: RunSettings) -> RunSettings:
        """Every setting that was not given, from the size's defaults.

        Raises:
            ValueError: a setting that cannot be; names the flag.
        """
        self.check()
        settings = self.filled(defaults)
        if settings.init_from is None:
            return settings
        # One run, however the path is spelt.
        return replace(settings, init_from=os.path.normpath(settings.init_from))
