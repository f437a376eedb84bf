"""Token sources: right image, right label, right view, as pure functions of the index."""

import pytest
import torch

from heptapod_fast.data import (
    Batch,
    Logograms,
    SyntheticTokens,
    TokenizedImages,
    TokenSource,
    sample_ids,
)
from heptapod_fast.rng import Rng
from heptapod_fast.tokenizers import Patch, PatchVQ, to_unit, token_spec

SOURCE = Logograms(24, 300)
VQ = PatchVQ.fit(SOURCE, 24, 4, codes=32)
PATCH = Patch(24, 4)


def expected_tokens(tokenizer, index, seed, flip):
    images = SOURCE.images(sample_ids(index, len(SOURCE), seed))
    if flip:
        for row, g in enumerate(index):
            if int(Rng(seed).bits("flip", g[None], 1)) & 1:
                images[row] = images[row].flip(-1)
    return tokenizer.encode(to_unit(images))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("tokenizer", [VQ, PATCH], ids=["vq", "patch"])
def test_batches_are_the_encoded_images(tokenizer, flip):
    tokens = TokenizedImages(SOURCE, tokenizer, seed=3, flip=flip)
    assert isinstance(tokens, TokenSource)
    assert (tokens.num_images, tokens.num_classes) == (300, 5)
    assert tokens.class_names == SOURCE.class_names
    index = torch.arange(270, 340)  # crosses an epoch
    batch = tokens.batch(index)
    expected = expected_tokens(tokenizer, index, 3, flip)
    assert batch.tokens.dtype == expected.dtype and torch.equal(batch.tokens, expected)
    assert batch.labels.dtype == torch.int64 and torch.equal(batch.index, index)
    assert torch.equal(batch.labels, SOURCE.labels[sample_ids(index, 300, 3)])


def test_a_sample_does_not_depend_on_its_batch():
    tokens = TokenizedImages(SOURCE, VQ, seed=0, flip=True)
    index = torch.arange(290, 310)
    together = tokens.batch(index)
    for row, g in enumerate(index):
        alone = tokens.batch(g[None])
        assert torch.equal(alone.tokens[0], together.tokens[row])
        assert int(alone.labels) == int(together.labels[row])


def test_flips_are_even_and_change_between_epochs():
    flipped = TokenizedImages(SOURCE, PATCH, seed=1, flip=True)
    straight = TokenizedImages(SOURCE, PATCH, seed=1)
    index = torch.arange(600)
    same = (flipped.batch(index).tokens == straight.batch(index).tokens).flatten(1).all(dim=1)
    assert 230 < int(same.sum()) < 370
    mirror = straight.tokenizer.decode(straight.batch(index).tokens).flip(-1)
    assert torch.equal(flipped.tokenizer.decode(flipped.batch(index).tokens)[~same], mirror[~same])


def test_codes_are_compact_and_progress_is_reported():
    calls = []
    tokens = TokenizedImages(SOURCE, VQ, seed=0, progress=lambda *at: calls.append(at))
    assert tokens._codes.dtype == torch.int16 and tokens._codes.shape == (300, 36)
    assert calls[-1] == (300, 300)


def test_fingerprints_tell_data_tokenizer_and_flip_apart():
    other = PatchVQ.fit(SOURCE, 24, 4, codes=16)
    sources = [
        TokenizedImages(SOURCE, VQ, 0),
        TokenizedImages(SOURCE, VQ, 0, flip=True),
        TokenizedImages(SOURCE, other, 0),
        TokenizedImages(Logograms(24, 299), VQ, 0),
    ]
    assert len({s.fingerprint for s in sources}) == 4
    assert TokenizedImages(SOURCE, VQ, seed=7).fingerprint == sources[0].fingerprint


def test_sizes_must_match():
    with pytest.raises(ValueError, match="32 pixels.*takes 24.*--image-size"):
        TokenizedImages(Logograms(32, 5), VQ, 0)


def test_batch_moves():
    batch = TokenizedImages(SOURCE, VQ, 0).batch(torch.arange(4)).to("meta")
    assert isinstance(batch, Batch) and len(batch) == 4
    assert {t.device.type for t in (batch.tokens, batch.labels, batch.index)} == {"meta"}


@pytest.mark.parametrize("name, shape", [("vq16", (256,)), ("kl16", (256, 16))])
def test_synthetic_tokens(name, shape):
    spec = token_spec(name, 256)
    source = SyntheticTokens(spec, 1000, seed=0)
    assert isinstance(source, TokenSource) and source.num_classes == len(source.class_names) == 1000
    index = torch.arange(5000, 7000)
    batch = source.batch(index)
    assert batch.tokens.shape == (2000, *shape)
    assert torch.equal(source.batch(index[7:9]).tokens, batch.tokens[7:9])
    assert torch.equal(source.batch(index[7:9]).labels, batch.labels[7:9])
    assert batch.labels.min() >= 0 and batch.labels.max() < 1000
    assert batch.labels.unique().numel() > 700
    if name == "vq16":
        assert batch.tokens.dtype == torch.int64
        assert batch.tokens.min() >= 0 and 16000 < batch.tokens.max() < 16384
    else:
        assert abs(batch.tokens.mean()) < 0.01 and abs(batch.tokens.std() - 1) < 0.01
    assert not torch.equal(SyntheticTokens(spec, 1000, seed=1).batch(index).labels, batch.labels)
