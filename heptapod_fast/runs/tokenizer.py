"""The tokenizer of a run: which one it is, and where its weights or its codebook are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from heptapod_fast.config import Config
from heptapod_fast.data.cache.format import CODEBOOK, Cache
from heptapod_fast.data.sources import ImageSource
from heptapod_fast.runs.directory import RunDir, RunError
from heptapod_fast.storage import write_json
from heptapod_fast.tokenizers import FITTED, PRETRAINED, Pretrained, Tokenizer, load_tokenizer


class TokenizerFiles(Protocol):
    """Where the tokenizer of a trained system is kept.

    Attributes:
        codebook: file of a fitted one.
        tokenizer_record: which published weights, as JSON.
    """

    codebook: Path
    tokenizer_record: Path

    def published_weights(self) -> str | None:
        """Where the published weights ought to be; None where that was not recorded."""
        ...


def open_tokenizer(
    config: Config,
    run: TokenizerFiles,
    images: ImageSource | None = None,
    progress: Callable[[int, int], None] | None = None,
    cache: Cache | None = None,
) -> Tokenizer | None:
    """The run's tokenizer: the file it was started with, the one given, the one of the cache, or
    one fitted on `images`.

    A fitted or given codebook is saved with the run, so that the run stays readable on its own; of
    published weights tokenizer.json says which file they were, with its hash.

    Returns:
        None where only the shape of its tokens is known: published weights that synthetic tokens
        and caches do without.

    Raises:
        FileNotFoundError, ValueError: weights that are missing or of another tokenizer.
        RunError: weights that the cache was not made with, or a codebook that was damaged since
            the run saved it.
    """
    data = config.data
    sizes: dict[str, Any] = {"image_size": data.image_size, "patch_size": data.patch_size}
    if data.tokenizer in PRETRAINED:
        if data.data == "synthetic":
            return None
        if cache is not None:
            return _pretrained_of_cache(config, cache, sizes)
        return _pretrained_of_run(config, run, sizes, is_new=images is not None)
    if data.tokenizer not in FITTED:
        return load_tokenizer(data.tokenizer, **sizes)
    return _fitted(config, run, sizes | {"codes": data.codes}, images, progress, cache)


def _fitted(
    config: Config,
    run: TokenizerFiles,
    settings: dict[str, Any],
    images: ImageSource | None,
    progress: Callable[[int, int], None] | None,
    cache: Cache | None,
) -> Tokenizer | None:
    """A tokenizer whose codebook is fitted on the data."""
    data = config.data
    if cache is not None:
        cache.verify([CODEBOOK])
        return load_tokenizer(data.tokenizer, cache.path / CODEBOOK, **settings)
    if run.codebook.exists():
        return _codebook_of_run(config, run, settings)
    if data.tokenizer_weights is not None:
        tokenizer = load_tokenizer(data.tokenizer, data.tokenizer_weights, **settings)
    elif images is None:
        return None
    else:
        tokenizer = FITTED[data.tokenizer].fit(
            images,
            data.image_size,
            data.patch_size,
            codes=config.spec.vocabulary,
            seed=config.recipe.seed,
            progress=progress,
        )
    tokenizer.save(run.codebook)
    return tokenizer


def _codebook_of_run(config: Config, run: TokenizerFiles, settings: dict[str, Any]) -> Tokenizer:
    """RunError if the codebook that was saved with the run is damaged or of other sizes."""
    try:
        return load_tokenizer(config.data.tokenizer, run.codebook, **settings)
    except ValueError as error:
        raise RunError(
            f"{run.codebook} is damaged, or another run's: restore it from a copy; only where the "
            "run has no checkpoint yet, delete it, and it is fitted anew"
        ) from error


def _pretrained_of_cache(config: Config, cache: Cache, sizes: dict[str, Any]) -> Tokenizer | None:
    """The weights given, or those of the cache; None if those are not there any more and none are
    given: training needs tokens only."""
    weights = config.data.tokenizer_weights
    about = cache.manifest["tokenizer"]
    try:
        tokenizer = load_tokenizer(config.data.tokenizer, weights or about["weights"], **sizes)
    except (OSError, ValueError):
        if weights is not None:
            raise
        return None
    if tokenizer.fingerprint == about["fingerprint"]:
        return tokenizer
    if weights is None:
        return None
    raise RunError(
        f"{weights} are not the weights that {cache.path} was made with: name those with "
        "--tokenizer-weights, or leave it out and train without sample grids"
    )


def _pretrained_of_run(
    config: Config, run: TokenizerFiles, sizes: dict[str, Any], is_new: bool
) -> Tokenizer:
    """The weights given, or those that the run was started with. is_new: the run may be starting
    now, and then records which they are."""
    weights = config.data.tokenizer_weights
    record = run.tokenizer_record
    if weights is None:
        weights = run.published_weights()
    tokenizer = load_tokenizer(config.data.tokenizer, weights, **sizes)
    if is_new and not record.exists():
        write_json(record, tokenizer.describe())
    return tokenizer


def keep_tokenizer(run: RunDir, cache: Cache, tokenizer: Tokenizer | None) -> None:
    """Make the run readable without the cache: its codebook, or which weights it is about."""
    name = cache.spec.name
    if name in PRETRAINED:
        about = cache.manifest["tokenizer"] if tokenizer is None else tokenizer.describe()
        write_json(run.tokenizer_record, about)
    elif tokenizer is not None and tokenizer.has_codebook:
        tokenizer.save(run.codebook)


def saved_tokenizer(
    config: Config, files: TokenizerFiles, expected: str | None, checkpoint: Path
) -> Tokenizer | None:
    """The tokenizer that a checkpoint was trained with, None for synthetic tokens.

    Args:
        files: where it is kept.
        expected: its fingerprint, as the checkpoint has it.
        checkpoint: its path, for messages.

    Raises:
        FileNotFoundError, ValueError: published weights that are missing, or no such weights.
        RunError: it is missing, or not the same: another codebook would decode to other images.
    """
    if expected is None:
        return None
    tokenizer = open_tokenizer(config, files)
    if tokenizer is None:
        raise RunError(
            f"{files.codebook} is missing: the tokens of this run cannot be decoded without it; "
            "restore it from a copy"
        )
    if tokenizer.fingerprint == expected:
        return tokenizer
    if isinstance(tokenizer, Pretrained):
        raise RunError(
            f"{tokenizer.source} are not the weights that {checkpoint} was trained with: name "
            "those with --tokenizer-weights"
        )
    raise RunError(
        f"{files.codebook} is not what {checkpoint} was trained with: it was changed or "
        "damaged; restore it from a copy"
    )
