"""VQ-16: the search for codes, the way from codes to images, the whole against float64."""

import pytest
import torch

import heptapod_fast.tokenizers.vq16 as module
from heptapod_fast.rng import Rng
from heptapod_fast.tokenizers import VQ16
from heptapod_fast.tokenizers.vq16 import nearest_codes
from tests.tokenizers.reference import ReferenceVQ16, gap, images, random_weights

IMAGES = images(4, 32)


@pytest.fixture(scope="module")
def tokenizer():
    return VQ16(random_weights("vq16"), 32)


@pytest.fixture(scope="module")
def reference():
    return ReferenceVQ16(random_weights("vq16"))


def drawn(rows, seed=0):
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))


def test_codes_are_nearest_among_unit_vectors():
    vectors = drawn(600) * torch.logspace(-6, 6, 600)[:, None]
    codebook = drawn(1000, 1) * torch.logspace(-4, 4, 1000)[:, None]  # lengths must not count
    unit = [x.double() / x.double().norm(dim=1, keepdim=True) for x in (vectors, codebook)]
    distance = (unit[0][:, None] - unit[1]).square().sum(-1)
    codes = nearest_codes(vectors, codebook)
    assert codes.dtype == torch.int64 and codes.shape == (600,)
    assert torch.equal(codes, distance.argmin(1))
    # By length rather than angle most would be others.
    assert (codes != (vectors.double() @ codebook.double().T).argmax(1)).float().mean() > 0.5


def in_order(products):
    """Sums over the last dimension, channel after channel, in plain Python floats."""
    total = 0.0
    for channel in range(products.shape[-1]):
        total = total + products[..., channel].numpy()
    return total


def defined(vectors, codebook):
    """`nearest_codes` by its definition, without a matrix product."""
    codebook = codebook.double()
    directions = codebook / torch.from_numpy(in_order(codebook * codebook)).sqrt()[:, None]
    return torch.from_numpy(in_order(vectors.double()[:, None] * directions).argmax(1))


@pytest.mark.parametrize("codes, copies", [(64, 200), (63, 7), (1, 100), (129, 3), (17, 31)])
def test_the_first_of_equal_codes(codes, copies):
    """Whatever the place of a code among the columns of a product."""
    codebook = drawn(codes).repeat(copies, 1)  # every direction several times, at one length
    found = nearest_codes(drawn(300, 1), codebook)
    assert found.max() < codes
    assert torch.equal(nearest_codes(codebook[:codes], codebook), torch.arange(codes))


def test_equal_directions_of_other_lengths_tie():
    """Powers of two change no bit of a direction."""
    codebook = torch.cat((drawn(40), 4.0 * drawn(40), 0.125 * drawn(40)))
    assert nearest_codes(drawn(200, 1), codebook).max() < 40


def test_close_calls_fall_as_defined_in_every_chunking(monkeypatch):
    codebook = drawn(2048, 2)
    codebook[1::2] = codebook[::2] + 0.01 * drawn(1024, 4)
    # Halfway between two neighbours, up to the rounding of float32, or of float64.
    unit = torch.nn.functional.normalize(codebook.double(), dim=1)
    vectors = torch.cat(((unit[:800:2] + unit[1:800:2]).float(), drawn(100, 3)))
    codes = nearest_codes(vectors, codebook)
    assert torch.equal(codes, defined(vectors, codebook))
    for size in (1, 3, 255, 256, 257):
        parts = [nearest_codes(part, codebook) for part in vectors.split(size)]
        assert torch.equal(torch.cat(parts), codes)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    assert torch.equal(nearest_codes(vectors[order], codebook), codes[order])
    monkeypatch.setattr(module, "_ROWS", 100)
    assert torch.equal(nearest_codes(vectors, codebook), codes)


def test_codes_within_a_rounding_of_each_other_fall_as_defined():
    """Thousands of codes whose cosines differ in the last bits, where products in another order
    have other winners."""
    near = drawn(1) + 1e-8 * drawn(3000, 2)  # float32 rounds many of them to one place
    vectors = torch.cat((drawn(1) * torch.logspace(-3, 3, 40)[:, None], drawn(40, 3)))
    found = nearest_codes(vectors, near)
    assert torch.equal(found, defined(vectors, near))


def test_vectors_that_are_not_finite_get_the_first_code():
    vectors = drawn(4, 1)
    vectors[1, 3], vectors[2, 0] = float("nan"), float("inf")
    codes = nearest_codes(vectors, drawn(50))
    assert codes[1] == codes[2] == 0
    assert torch.equal(codes[[0, 3]], nearest_codes(vectors[[0, 3]], drawn(50)))


def test_fast_products_do_not_change_codes(monkeypatch):
    codebook, vectors = drawn(4096, 2), drawn(500, 3)
    codes = nearest_codes(vectors, codebook)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(nearest_codes(vectors, codebook), codes)
    finally:
        torch.set_float32_matmul_precision(before)


def test_blocks_bound_the_memory(monkeypatch):
    rows = []
    true_matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: rows.append(len(a)) or true_matmul(a, b)
    )
    nearest_codes(drawn(700), drawn(50, 1))
    assert rows == [256, 256, 188]


def test_whole_network_against_float64(tokenizer, reference):
    codes = tokenizer.encode(IMAGES)
    assert codes.shape == (4, 4) and codes.dtype == torch.int64 and codes.unique().numel() > 4
    products = reference.vectors(IMAGES) @ reference.unit_codebook().T
    best = products.max(-1)
    assert torch.equal(codes, best.indices)
    decoded = tokenizer.decode(codes)
    assert decoded.shape == (4, 3, 32, 32) and decoded.dtype == torch.float32
    assert gap(decoded, reference.decode(codes, 2)) < 1e-4
    assert torch.equal(tokenizer.decode(codes.int()), decoded)
    assert torch.equal(tokenizer.encode(IMAGES, Rng(0)), codes)  # nothing to draw


def test_vectors_before_the_search(tokenizer, reference):
    found = tokenizer._encoded(IMAGES).flatten(2).transpose(1, 2)
    assert gap(torch.nn.functional.normalize(found, dim=-1), reference.vectors(IMAGES)) < 1e-4


def test_other_sizes(reference):
    tokenizer = VQ16(random_weights("vq16"), 48)
    x = images(1, 48, seed=3)
    codes = tokenizer.encode(x)
    assert torch.equal(codes, (reference.vectors(x) @ reference.unit_codebook().T).argmax(-1))
    assert gap(tokenizer.decode(codes), reference.decode(codes, 3)) < 1e-4


def test_chunks(tokenizer, monkeypatch):
    codes = tokenizer.encode(IMAGES)
    decoded = tokenizer.decode(codes)
    monkeypatch.setattr(tokenizer, "chunk_pixels", 1)
    # Vectors differ by the rounding of convolutions; these images are no close calls.
    assert torch.equal(tokenizer.encode(IMAGES), codes)
    assert gap(tokenizer.decode(codes), decoded) < 1e-4
    assert tokenizer.encode(IMAGES[:0]).shape == (0, 4)
    assert tokenizer.decode(codes[:0]).shape == (0, 3, 32, 32)


def test_bf16_is_close(tokenizer):
    half = VQ16(random_weights("vq16"), 32, torch.bfloat16)
    assert gap(half._encoded(IMAGES), tokenizer._encoded(IMAGES)) < 0.1
    codes = tokenizer.encode(IMAGES)
    assert (half.encode(IMAGES) == codes).float().mean() >= 0.75
    assert gap(half.decode(codes), tokenizer.decode(codes)) < 0.15
    assert half.codebook_VC.dtype == torch.float32
    assert half.fingerprint == tokenizer.fingerprint


def test_the_codebook_is_normalised_for_decoding(tokenizer):
    weights = dict(random_weights("vq16"))
    weights["quantize.embedding.weight"] = 3.0 * weights["quantize.embedding.weight"]
    codes = torch.tensor([[0, 1, 16383, 77]])
    assert gap(VQ16(weights, 32).decode(codes), tokenizer.decode(codes)) < 1e-4


def test_refusals(tokenizer):
    with pytest.raises(ValueError, match=r"codes in 0\.\.16383, found 0\.\.16384"):
        tokenizer.decode(torch.tensor([[0, 1, 16384, 2]]))
    with pytest.raises(ValueError, match=r"found -1\.\.2"):
        tokenizer.decode(torch.tensor([[0, 1, -1, 2]]))
    with pytest.raises(ValueError, match="integer codes, found torch.float32"):
        tokenizer.decode(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="integer codes, found torch.bool"):
        tokenizer.decode(torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"expected tokens \(B, 4\)"):
        tokenizer.decode(torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="to_unit"):
        tokenizer.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="--image-size"):
        tokenizer.encode(torch.zeros(1, 3, 48, 32))
