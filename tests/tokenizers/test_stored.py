"""What a cache stores of a tokenizer: asked of the class, by the spec alone."""

import pytest
import torch

from heptapod_fast.rng import Rng
from heptapod_fast.tokenizers import (
    FITTED,
    KL16,
    NAMES,
    PRETRAINED,
    TOKENIZERS,
    VQ16,
    Patch,
    PatchVQ,
    StoredArray,
    token_spec,
)
from tests.tokenizers.reference import images, random_weights


def test_every_name_has_a_class():
    assert set(TOKENIZERS) == set(NAMES)
    assert all(kind.name == name for name, kind in TOKENIZERS.items())
    assert PRETRAINED.keys() | FITTED.keys() | {"patch"} == TOKENIZERS.keys()
    assert {name for name, kind in TOKENIZERS.items() if kind.has_codebook} == FITTED.keys()


@pytest.mark.parametrize(
    "name, patch_size, expected",
    [
        (
            "kl16",
            None,
            {
                "mean": StoredArray("float16", (16, 2, 2), varies=True),
                "std": StoredArray("float16", (16, 2, 2), varies=True, is_deviation=True),
            },
        ),
        ("vq16", None, {"codes": StoredArray("uint16", (4,))}),
        ("patch", 4, {"mean": StoredArray("float16", (48, 8, 8))}),
        ("patch-vq", 4, {"codes": StoredArray("uint16", (64,))}),
    ],
)
def test_arrays_follow_from_the_spec(name, patch_size, expected):
    spec = token_spec(name, 32, patch_size)
    assert TOKENIZERS[name].stored_arrays(spec) == expected


@pytest.fixture(scope="module", params=NAMES)
def tokenizer(request):
    """Each of them, for images of 32 pixels."""
    if request.param == "patch":
        return Patch(32, 4)
    if request.param == "patch-vq":
        generator = torch.Generator().manual_seed(0)
        return PatchVQ(torch.rand(20, 48, generator=generator) * 2 - 1, 32, 4)
    kind = {"kl16": KL16, "vq16": VQ16}[request.param]
    return kind(random_weights(request.param), 32)


def test_tokens_come_back_without_the_tokenizer(tokenizer):
    spec = tokenizer.spec
    pixels = images(3, 32)
    stored = tokenizer.to_stored(pixels)
    arrays = tokenizer.stored_arrays(spec)
    assert {name: tuple(value.shape[1:]) for name, value in stored.items()} == {
        name: array.shape for name, array in arrays.items()
    }
    tokens = TOKENIZERS[spec.name].from_stored(spec, stored)
    expected = tokenizer.encode(pixels)
    assert tokens.dtype == expected.dtype
    torch.testing.assert_close(tokens, expected)


def test_only_posteriors_are_drawn_from(tokenizer):
    spec = tokenizer.spec
    stored = tokenizer.to_stored(images(3, 32))
    kind = TOKENIZERS[spec.name]
    index = torch.arange(5, 8)
    plain = kind.from_stored(spec, stored)
    drawn = kind.from_stored(spec, stored, Rng(1), index)
    assert torch.equal(plain, drawn) == (spec.name != "kl16")
    assert torch.equal(drawn, kind.from_stored(spec, stored, Rng(1), index))
