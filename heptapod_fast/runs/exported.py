"""A folder that `tools/export.py` wrote: a trained system for others to use, without its run.

FOLDER/  model.safetensors  config.json  README.md (the model card)  samples.png
         tokenizer.safetensors (a fitted codebook) or tokenizer.json (which published weights)
         export.json: what the weights are, and size and SHA-256 of every file that reading needs

Nothing in it is executed, and none of its files names another outside of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from heptapod_fast import checkpoints
from heptapod_fast.config import Config
from heptapod_fast.runs.directory import EXPORT, RunError, config_in
from heptapod_fast.runs.trained import Trained, spellings
from heptapod_fast.storage import sha256, write_json

MODEL = "model.safetensors"
CONFIG = "config.json"
CODEBOOK = "tokenizer.safetensors"
TOKENIZER_RECORD = "tokenizer.json"
CARD = "README.md"
SAMPLES = "samples.png"
FORMAT = 1  # of export.json
AGAIN = "copy the folder again, or export the run anew"


@dataclass(frozen=True)
class Stamp:
    """What a file is known by."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, file: Path) -> Stamp:
        """The stamp of a file as it is."""
        return cls(file.stat().st_size, sha256(file))


@dataclass(frozen=True)
class Index:
    """What export.json says.

    Attributes:
        made_by: name and version of what wrote it.
        system, size: as in config.json.
        weights, checkpoint, images_seen, class_names, tokenizer: see `Trained`; of the checkpoint
            its name.
        files: {name: its stamp} of every file that reading needs.
    """

    made_by: str
    system: str
    size: str
    weights: str
    checkpoint: str
    images_seen: int
    class_names: tuple[str, ...]
    tokenizer: str | None
    files: dict[str, Stamp]

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_plain(cls, plain: Any) -> Index:
        """The inverse.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: it is something else; a format of a
                later version is named.
        """
        found = dict(plain)
        version = found.pop("format")
        if version != FORMAT:
            raise ValueError(
                f"it has format {version!r}, this heptapod_fast reads {FORMAT}: update it"
            )
        names = tuple(found.pop("class_names"))
        files = {name: Stamp(**stamp) for name, stamp in found.pop("files").items()}
        index = cls(class_names=names, files=files, **found)
        index.check()
        return index

    def check(self) -> None:
        """TypeError or ValueError for values that cannot be."""
        texts = (self.made_by, self.system, self.size, self.weights, self.checkpoint)
        if not all(isinstance(text, str) for text in (*texts, *self.class_names)):
            raise TypeError("a name is no text")
        sizes = [stamp.bytes for stamp in self.files.values()]
        if not all(isinstance(number, int) for number in (self.images_seen, *sizes)):
            raise TypeError("a number is no whole number")
        if not self.class_names:
            raise ValueError("it names no classes")
        missing = {MODEL, CONFIG} - self.files.keys()
        if missing:
            raise ValueError(f"it does not list {', '.join(sorted(missing))}")


class ExportedFolder:
    """Paths of the folder, and reading it as a `Source` of a trained system."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.index = self.path / EXPORT
        self.config = self.path / CONFIG
        self.model = self.path / MODEL
        self.codebook = self.path / CODEBOOK
        self.tokenizer_record = self.path / TOKENIZER_RECORD
        self.card = self.path / CARD
        self.samples = self.path / SAMPLES

    def is_there(self) -> bool:
        """Whether the path is such a folder, be it damaged. Weights beside settings are what no run
        directory has."""
        has_weights = self.model.is_file() and self.config.is_file()
        return self.index.is_file() or has_weights

    # -------------------------------------------------------------------------------------- writing

    def seal(self, trained: Trained, config: Config, made_by: str, names: Iterable[str]) -> Index:
        """Write export.json; the files that it lists are written already.

        Args:
            names: of these files.
        """
        index = Index(
            made_by=made_by,
            system=config.system,
            size=config.size,
            weights=trained.weights,
            checkpoint=trained.checkpoint.name,
            images_seen=trained.images_seen,
            class_names=trained.class_names,
            tokenizer=trained.tokenizer,
            files={name: Stamp.of(self.path / name) for name in names},
        )
        write_json(self.index, index.plain())
        return index

    # -------------------------------------------------------------------------------------- reading

    def read_index(self) -> Index:
        """What export.json says. RunError if it is not there or says something else."""
        if not self.index.is_file():
            raise RunError(
                f"{self.path} has {MODEL} and no {EXPORT}: expected a run directory, or a folder "
                "as tools/export.py RUN_DIR --out FOLDER writes it (weights alone are for "
                "--init-from)"
            )
        try:
            return Index.from_plain(json.loads(self.index.read_text()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(
                f"{self.index} cannot be read ({type(error).__name__}: {error}): {AGAIN}"
            ) from error

    def read_config(self) -> Config:
        """See `Source.read_config`."""
        self.refuse_damage(self.read_index(), only=CONFIG)
        return config_in(self.config)

    def open(self, checkpoint: int | None = None, ema: str | None = None) -> Trained:
        """See `Source.open`: the weights that the folder holds; other ones are refused."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        index = self.read_index()
        if checkpoint is not None and checkpoints.name_of(checkpoint) != index.checkpoint:
            raise RunError(
                f"--checkpoint {checkpoint}: {self.path} holds {index.checkpoint} alone; leave "
                "--checkpoint out, or name the run"
            )
        if ema is not None and index.weights not in spellings(ema):
            raise RunError(
                f"--ema {ema}: {self.path} holds {index.weights} alone; leave --ema out, or name "
                "the run"
            )
        self.refuse_damage(index)
        try:
            tensors = load_file(self.model)
        except SafetensorError as error:
            raise RunError(
                f"{self.model} cannot be read ({error}), expected safetensors: {AGAIN}"
            ) from error
        return Trained(
            tensors=tensors,
            where=str(self.model),
            weights=index.weights,
            checkpoint=Path(index.checkpoint),
            images_seen=index.images_seen,
            class_names=index.class_names,
            tokenizer=index.tokenizer,
        )

    def published_weights(self) -> str | None:
        """Where published weights of its tokenizer are looked for: in the folder itself, under the
        name that their file had. None where that is not known."""
        if not self.tokenizer_record.is_file():
            return None
        try:
            name = json.loads(self.tokenizer_record.read_text())["weights"]
            # Of a path, which none is, no more than its name: what lies elsewhere is not read.
            return None if name is None else str(self.path / Path(name).name)
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{self.tokenizer_record} cannot be read: {error}; {AGAIN}") from error

    def damage(self, index: Index, only: str | None = None) -> list[str]:
        """What is wrong with the files that export.json lists; empty if nothing is.

        only: look at this file alone.
        """
        found = []
        for name, expected in index.files.items():
            if only not in (None, name):
                continue
            file = self.path / name
            if not file.is_file():
                found.append(f"{name} is missing")
                continue
            size = file.stat().st_size
            if size != expected.bytes:
                found.append(f"{name} has {size:,} bytes, expected {expected.bytes:,}")
            elif sha256(file) != expected.sha256:
                found.append(f"{name} has another SHA-256 than {EXPORT} says: it was changed")
        return found

    def refuse_damage(self, index: Index, only: str | None = None) -> None:
        """RunError lists what `damage` finds."""
        wrong = self.damage(index, only)
        if wrong:
            raise RunError(f"{self.path} is damaged: {'; '.join(wrong)}; {AGAIN}")
