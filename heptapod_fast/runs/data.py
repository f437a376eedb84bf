"""The images and the tokens that a run is trained on, opened."""

from __future__ import annotations

from pathlib import Path

from heptapod_fast.config import Config, decided
from heptapod_fast.config.data import refuse_missing_data
from heptapod_fast.data.cache.format import Cache, CacheError, open_cache, refuse_other
from heptapod_fast.data.cache.reader import CacheTokens, choose_mode
from heptapod_fast.data.decoding import open_decoder
from heptapod_fast.data.embedded import EMBEDDED_SETS, embedded_images
from heptapod_fast.data.files import PREPROCESSING
from heptapod_fast.data.images import ImageFolder
from heptapod_fast.data.sources import ImageSource
from heptapod_fast.data.tokens import SyntheticTokens, TokenizedImages, TokenSource
from heptapod_fast.progress import Progress
from heptapod_fast.tokenizers import PRETRAINED, Tokenizer, hint
from heptapod_fast.world import World


def open_images(
    config: Config, show_progress: bool = True, in_memory: bool = True
) -> ImageSource | None:
    """The images behind --data; None for synthetic tokens and caches.

    in_memory: keep the decoded images of a folder or an archive, for training; else they are
        decoded again each time that they are asked for.

    Raises:
        FileNotFoundError, ValueError: name the flag at fault.
    """
    data = config.data
    if data.data == "synthetic" or data.is_cache:
        return None
    if data.data and data.tokenizer in PRETRAINED:
        _refuse_missing_weights(config)  # before any image is decoded
    if data.data in EMBEDDED_SETS:
        return embedded_images(
            data.data,
            data.image_size,
            decided(data.logogram_count, "logogram_count"),
            config.recipe.seed,
            data.num_classes,
        )
    refuse_missing_data(data)
    listing = Progress("reading the archive's contents", "MiB")
    return ImageFolder(
        decided(data.data, "data"),
        data.image_size,
        max_broken=data.max_broken,
        decoder=open_decoder(data.decoder),
        allow_upscale=data.allow_upscale,
        progress=Progress("decoding") if show_progress else None,
        listing_progress=listing if show_progress else None,
        in_memory=in_memory,
    )


def _refuse_missing_weights(config: Config) -> None:
    weights = config.data.tokenizer_weights
    if weights is None or not Path(weights).exists():
        found = "" if weights is None else f"{weights}: no such file. "
        raise FileNotFoundError(found + hint(config.data.tokenizer))


def open_run_cache(config: Config) -> Cache | None:
    """The cache behind --data, None where it is none.

    Raises:
        CacheError: it was made with other settings than the run's; says what it has and which flag
            asks for something else.
    """
    if not config.data.is_cache:
        return None
    cache = open_cache(decided(config.data.data, "data"))
    _check_cache(config, cache)
    return cache


def _check_cache(config: Config, cache: Cache) -> None:
    data = config.data
    refuse_other(cache, vars(data))
    about = cache.manifest["tokenizer"]
    preprocessing = cache.manifest["preprocessing"]
    if not preprocessing.startswith(PREPROCESSING):
        raise _other_version(cache, "preprocessing", preprocessing, PREPROCESSING)
    for name, here in cache.tokenizer.constants.items():
        found = about.get(name, here)
        if found != here:
            raise _other_version(cache, f"a {name} of tokens of", found, here)
    if data.flip and cache.views < 2:
        raise CacheError(
            f"--flip: {cache.path} was made without --flip, it has no mirrored images: train with "
            "--no-flip, or build it anew with --flip"
        )
    if cache.tokenizer.has_codebook and data.tokenizer_weights is not None:
        raise CacheError(
            f"--tokenizer-weights {data.tokenizer_weights}: {cache.path} has its own codebook; "
            "leave --tokenizer-weights out"
        )


def _other_version(cache: Cache, what: str, found: object, here: object) -> CacheError:
    return CacheError(
        f"{cache.path} was made with {what} {found}, this version has {here}: build it anew with "
        "tools/cache.py"
    )


def open_tokens(
    config: Config,
    world: World,
    images: ImageSource | None,
    tokenizer: Tokenizer | None,
    cache: Cache | None,
    reserved: int,
) -> TokenSource:
    """Tokens of a cache, of the images, or synthetic ones.

    reserved: bytes of a GPU's memory that training needs beside a cache.
    """
    data = config.data
    seed = config.recipe.seed
    if cache is not None:
        return _open_cached(config, world, cache, reserved)
    if images is None:
        classes = decided(data.num_classes, "num_classes")
        return SyntheticTokens(config.spec, classes, seed, device=world.device)
    assert tokenizer is not None  # images never come without one
    return TokenizedImages(
        images,
        tokenizer,
        seed,
        flip=data.flip,
        device=world.device,
        progress=Progress("tokenising") if world.main else None,
    )


def _open_cached(config: Config, world: World, cache: Cache, reserved: int) -> CacheTokens:
    """Tokens of a cache; all ranks fail together where one finds damage. Collective call."""
    with world.together():
        mode, why = choose_mode(cache, world.device, config.data.cache_mode, reserved)
    # Ranks that share the reading must do it the same way.
    (streamed,) = world.any(mode == "stream")
    if streamed and mode != "stream":
        mode = "stream"
        why = "another rank has no room for it"
    with world.together():
        source = CacheTokens(
            cache,
            config.recipe.seed,
            config.data.flip,
            world.device,
            mode,
            why,
            (world.local_rank, world.local_size),
            Progress("reading the cache", "files") if world.main else None,
        )
    return source
