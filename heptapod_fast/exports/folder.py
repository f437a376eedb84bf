"""A run as a folder for others: weights, settings, tokenizer, samples and a model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import heptapod_fast
from heptapod_fast.config import Config
from heptapod_fast.exports.card import Facts, card
from heptapod_fast.exports.files import Exported, write_safetensors
from heptapod_fast.exports.samples import draw_samples
from heptapod_fast.reports.run import NothingLogged, evaluation_of, history_of, numbers_of
from heptapod_fast.runs import RunError
from heptapod_fast.runs.exported import CODEBOOK, CONFIG, MODEL, TOKENIZER_RECORD, ExportedFolder
from heptapod_fast.runs.tokenizer import saved_tokenizer
from heptapod_fast.runs.trained import Trained
from heptapod_fast.runs.weights import TrainedRun
from heptapod_fast.storage import readable, whole_folder, write_json
from heptapod_fast.tokenizers import PRETRAINED, TOKENIZERS

_SHOWN = 4  # files in the way that an error names


def export_folder(
    run: str | Path,
    out: str | Path,
    checkpoint: int | None = None,
    ema: str | None = None,
    samples: bool = True,
    device: str = "auto",
    tokenizer_weights: str | None = None,
) -> Exported:
    """Write a folder that `load_run` reads (`runs/exported.py` says what is in it), or nothing.

    Args:
        run: the run's directory.
        out: the folder; not there yet, or empty.
        checkpoint, ema: which weights, as `load_run` takes them.
        samples: draw samples.png, where the tokenizer is at hand.
        device: where to draw: auto, cpu or cuda.
        tokenizer_weights: where published weights are now, if they are not where they were.

    Raises:
        RunError, CheckpointError: say what is missing, damaged, or in the way.
        FileNotFoundError, ValueError: tokenizer_weights that are not usable, or records of the run
            that cannot be read.
    """
    path = Path(out)
    refuse_what_is_there(path)
    source = TrainedRun(run)
    if ExportedFolder(run).is_there():
        raise RunError(
            f"{run} is such a folder already: copy it, or export its weights alone with --out "
            "FILE.safetensors"
        )
    config = source.read_config()
    trained = source.open(checkpoint, ema)
    portable = config.portable()
    with whole_folder(path) as unfinished:
        folder = ExportedFolder(unfinished)
        write_safetensors(portable, trained, folder.model)
        readable(folder.model)
        folder.config.write_text(portable.to_json())
        names = [MODEL, CONFIG, *write_tokenizer(config, source, trained, folder)]
        made_by = f"heptapod_fast {heptapod_fast.__version__}"
        index = folder.seal(trained, portable, made_by, names)

        weights = tokenizer_weights or config.data.tokenizer_weights or source.published_weights()
        drawn = None
        why_none = why_no_samples(config, trained, samples, weights, tokenizer_weights is not None)
        if not why_none:
            drawn = draw_samples(folder, device, weights)
        facts = Facts(
            config=portable,
            index=index,
            values=sum(value.numel() for value in trained.tensors.values()),
            drawn=drawn,
            why_none=why_none,
            tokenizer=read_record(folder),
            figures=figures_of(source, portable, trained),
            evaluation=evaluation_of(source),
        )
        folder.card.write_text(card(facts), encoding="utf-8")
    return Exported.of(trained, path, remark=why_none)


def refuse_what_is_there(path: Path) -> None:
    """RunError if the folder cannot appear at a path because of what is there."""
    if not path.exists():
        return
    advice = "move it away, or name another folder"
    if not path.is_dir():
        raise RunError(f"--out {path} exists; {advice}")
    found = sorted(entry.name for entry in path.iterdir())
    if found:
        more = ", ..." if len(found) > _SHOWN else ""
        raise RunError(f"--out {path} exists and holds {', '.join(found[:_SHOWN])}{more}; {advice}")


def write_tokenizer(
    config: Config, source: TrainedRun, trained: Trained, folder: ExportedFolder
) -> list[str]:
    """Put a fitted tokenizer into the folder, or say which published one it takes.

    Returns:
        Names of the files written; none where the settings say all of the tokenizer.

    Raises:
        RunError: the run has lost its codebook, or has another one.
    """
    if trained.tokenizer is None:
        return []
    if TOKENIZERS[config.data.tokenizer].has_codebook:
        try:
            saved_tokenizer(config, source, trained.tokenizer, trained.checkpoint)
        except RunError as error:
            raise RunError(f"{error}; --out FILE.safetensors writes weights without it") from error
        shutil.copyfile(source.codebook, folder.codebook)
        return [CODEBOOK]
    if config.data.tokenizer not in PRETRAINED:
        return []
    write_json(folder.tokenizer_record, reference(config, source, trained))
    return [TOKENIZER_RECORD]


def reference(config: Config, source: TrainedRun, trained: Trained) -> dict[str, Any]:
    """Which published weights the tokens are of: `Pretrained.describe`, and of the file its name.

    What the run says of others than the checkpoint was trained with is left out.
    """
    found: dict[str, Any] = {}
    if source.tokenizer_record.exists():
        found = json.loads(source.tokenizer_record.read_text())
    if found.get("fingerprint") != trained.tokenizer:
        found = {}
    weights = found.get("weights")
    name = None if weights is None else Path(weights).name
    return found | {
        "tokenizer": config.data.tokenizer,
        "weights": name,
        "fingerprint": trained.tokenizer,
    }


def why_no_samples(
    config: Config, trained: Trained, is_asked: bool, weights: str | None, is_given: bool
) -> str:
    """Why samples cannot be drawn, as a part of a sentence; empty if they can.

    Args:
        is_asked: somebody wants them.
        weights: where published weights of the tokenizer should be.
        is_given: somebody has said so; then it is an error if they are not there.
    """
    if not is_asked:
        return "they were left out (--no-samples)"
    if trained.tokenizer is None:
        return "the run was trained on synthetic tokens, which nothing decodes"
    if config.data.tokenizer not in PRETRAINED or is_given:
        return ""
    if weights is None or not Path(weights).exists():
        return (
            f"the weights of {config.data.tokenizer} were not at hand (--tokenizer-weights of "
            "tools/export.py says where they are)"
        )
    return ""


def read_record(folder: ExportedFolder) -> dict[str, Any] | None:
    """What was written of published weights; None where there are none."""
    if not folder.tokenizer_record.exists():
        return None
    return json.loads(folder.tokenizer_record.read_text())


def figures_of(run: TrainedRun, config: Config, trained: Trained) -> dict[str, Any] | None:
    """The figures of the run's report up to the checkpoint; None where nothing was logged."""
    try:
        history = history_of(run, trained.images_seen)
    except NothingLogged:
        return None
    return numbers_of(config, history)
