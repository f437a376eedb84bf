"""The k-means codebook: nearest codes, quality, determinism, refusals."""

import pytest
import torch

import heptapod_fast.tokenizers.patch_vq as module
from heptapod_fast.data import Logograms
from heptapod_fast.tokenizers import PatchVQ, load_tokenizer, to_unit
from heptapod_fast.tokenizers.patch import patchify

SOURCE = Logograms(24, 2000)
IMAGES = SOURCE.images(torch.arange(2000))
TOKENIZER = PatchVQ.fit(SOURCE, 24, 4)


def test_codes_are_the_nearest(monkeypatch):
    images = to_unit(IMAGES[:40])
    codes = TOKENIZER.encode(images)
    assert codes.shape == (40, 36) and codes.dtype == torch.int64
    patches = patchify(images, 4).double()
    square = (patches[:, :, None] - TOKENIZER.codebook_VE.double()).square().sum(-1)
    chosen = square.gather(2, codes[..., None])[..., 0]
    assert (chosen - square.amin(-1)).max() < 1e-4
    monkeypatch.setattr(module, "_BLOCK", 1000)  # seven patches at a time
    assert torch.equal(TOKENIZER.encode(images), codes)


def test_decode_gives_the_codebook_patches():
    codes = torch.randint(0, 128, (2, 36), generator=torch.Generator().manual_seed(0))
    images = TOKENIZER.decode(codes)
    assert images.shape == (2, 3, 24, 24)
    assert torch.equal(images[1, :, 4:8, 8:12].flatten(), TOKENIZER.codebook_VE[codes[1, 8]])
    assert torch.equal(TOKENIZER.encode(images), codes)
    with pytest.raises(ValueError, match=r"expected tokens \(B, 36\)"):
        TOKENIZER.decode(codes[:, :35])


def test_fit_is_deterministic_and_seeded():
    assert PatchVQ.fit(IMAGES, 24, 4).fingerprint == TOKENIZER.fingerprint
    assert PatchVQ.fit(IMAGES, 24, 4, seed=1).fingerprint != TOKENIZER.fingerprint


def test_the_codebook_is_good_and_used():
    fresh = Logograms(24, 1000, seed=5).images(torch.arange(1000))
    codes = TOKENIZER.encode(to_unit(fresh))
    assert codes.unique().numel() == 128
    error = (TOKENIZER.decode(codes) - to_unit(fresh)).square().mean().sqrt()
    # Measured 0.148; codes that are random patches give 0.21.
    assert error < 0.16


def test_clusters_are_found_exactly():
    # Eight plain colours: with eight codes nothing may be lost, however uneven the counts are.
    colours = torch.randint(0, 256, (8, 3), generator=torch.Generator().manual_seed(1))
    which = torch.cat((torch.zeros(500, dtype=torch.int64), torch.arange(8)))
    images = colours[which].to(torch.uint8)[:, :, None, None].expand(-1, -1, 8, 8).contiguous()
    tokenizer = PatchVQ.fit(images, 8, 4, codes=8)
    unit = to_unit(images)
    assert (tokenizer.decode(tokenizer.encode(unit)) - unit).abs().max() < 1e-5


def test_seeding_prefers_distant_patches():
    near = 0.001 * torch.rand(91, 2, generator=torch.Generator().manual_seed(0))
    far = torch.tensor([[9.0, 0.0], [0.0, 9.0]])
    for seed in range(10):
        seeds = module._seed_codes(torch.cat((near, far)), 3, seed)
        assert sorted(int(s.norm() + 0.5) for s in seeds) == [0, 9, 9]


def test_fewer_distinct_patches_than_codes_are_coded_without_loss():
    images = torch.zeros(10, 3, 8, 8, dtype=torch.uint8)
    images[:5] = 200
    tokenizer = PatchVQ.fit(images, 8, 4, codes=7)
    assert tokenizer.spec.vocabulary == 7
    codes = tokenizer.encode(to_unit(images))
    assert codes.unique().numel() == 2
    torch.testing.assert_close(tokenizer.decode(codes), to_unit(images), rtol=0, atol=1e-6)


def test_empty_codes_move_to_the_worst_points():
    points = torch.tensor([[0.0], [0.1], [5.0], [9.0]])
    codebook = torch.tensor([[0.0], [-50.0], [-60.0]])
    moved = module._lloyd(points, torch.ones(4), codebook, None)
    index, square = module._nearest(points, moved)
    assert index.unique().numel() == 3 and square.sum() < 0.02


def test_equal_patches_are_counted():
    rows = torch.tensor([[1, 2], [2, 1], [1, 2], [0, 0], [1, 2]], dtype=torch.uint8)
    distinct, counts = module._distinct(rows)
    found = {tuple(row.tolist()): int(n) for row, n in zip(distinct, counts, strict=True)}
    assert found == {(1, 2): 3, (2, 1): 1, (0, 0): 1}


def test_fit_refuses_other_shapes():
    with pytest.raises(ValueError, match="--image-size"):
        PatchVQ.fit(IMAGES[:10], 32, 4)
    with pytest.raises(ValueError, match="uint8"):
        PatchVQ.fit(to_unit(IMAGES[:10]), 24, 4)
    with pytest.raises(ValueError, match="--patch-size"):
        PatchVQ.fit(IMAGES[:10], 24, 5)
    with pytest.raises(ValueError, match="finite codebook"):
        PatchVQ(torch.full((4, 48), torch.nan), 24, 4)


def test_save_and_load(tmp_path):
    TOKENIZER.save(tmp_path / "codebook.safetensors")
    again = load_tokenizer("patch-vq", tmp_path / "codebook.safetensors", image_size=24, codes=128)
    assert again.fingerprint == TOKENIZER.fingerprint and again.spec == TOKENIZER.spec
    images = to_unit(IMAGES[:5])
    assert torch.equal(again.encode(images), TOKENIZER.encode(images))
    with pytest.raises(ValueError, match="codes 128.*--codes 64"):
        load_tokenizer("patch-vq", tmp_path / "codebook.safetensors", codes=64)
    with pytest.raises(ValueError, match="needs --tokenizer-weights"):
        load_tokenizer("patch-vq")


def test_progress_is_reported():
    calls = []
    PatchVQ.fit(IMAGES[:200], 24, 4, codes=16, progress=lambda *at: calls.append(at))
    assert calls[0] == (1, module.ITERATIONS) and calls == sorted(calls)
