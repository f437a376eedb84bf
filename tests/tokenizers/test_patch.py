"""Raw patches, token shapes, the pixel maps, and saving and loading."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heptapod_fast.tokenizers import Patch, load_tokenizer, to_uint8, to_unit, token_spec


@settings(max_examples=30, deadline=None)
@given(grid=st.integers(1, 5), patch=st.integers(1, 6), batch=st.integers(0, 3))
def test_decode_is_the_exact_inverse(grid, patch, batch):
    tokenizer = Patch(grid * patch, patch)
    images = 3 * torch.randn(batch, 3, grid * patch, grid * patch)
    tokens = tokenizer.encode(images)
    assert tokens.shape == (batch, grid**2, 3 * patch**2)
    assert torch.equal(tokenizer.decode(tokens), images)


def test_token_and_channel_order():
    images = torch.arange(3 * 6 * 6).float().view(1, 3, 6, 6)
    tokens = Patch(6, 2).encode(images)
    # Token 5 is grid row 1, column 2; channels are colour, row, column.
    expected = images[0, :, 2:4, 4:6].flatten()
    assert torch.equal(tokens[0, 5], expected)


def test_pixel_maps():
    pixels = torch.arange(256, dtype=torch.uint8)
    unit = to_unit(pixels)
    assert unit.dtype == torch.float32 and unit[0] == -1 and abs(float(unit[255]) - 1) < 1e-6
    assert torch.equal(to_uint8(unit), pixels)
    assert to_uint8(torch.tensor([-3.0, 0.001, 5.0, 0.0])).tolist() == [0, 128, 255, 128]
    before = torch.tensor([0.5])
    to_uint8(before)
    assert before == 0.5


@pytest.mark.parametrize(
    "name, size, patch, codes, expected",
    [
        ("kl16", 256, None, None, ("continuous", 16, 16, 0)),
        ("vq16", 256, 16, None, ("discrete", 16, 0, 16384)),
        ("vq16", 384, None, None, ("discrete", 24, 0, 16384)),
        ("patch", 24, 4, None, ("continuous", 6, 48, 0)),
        ("patch-vq", 24, 4, None, ("discrete", 6, 0, 128)),
        ("patch-vq", 32, 8, 512, ("discrete", 4, 0, 512)),
    ],
)
def test_specs(name, size, patch, codes, expected):
    spec = token_spec(name, size, patch, codes)
    assert (spec.kind, spec.grid, spec.channels, spec.vocabulary) == expected
    assert spec.num_tokens == expected[1] ** 2


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("vae", 256), ["--tokenizer 'vae'", "kl16, vq16, patch, patch-vq"]),
        (("kl16", 250), ["--image-size 250", "240 or 256", "another --tokenizer"]),
        (("vq16", 256, 8), ["fixed patch size of 16", "--patch-size 8"]),
        (("patch", 30, 4), ["--image-size 28 or 32", "--patch-size 3 or 5"]),
        (("patch", 3, 4), ["--image-size 4,", "--patch-size 3"]),
        (("patch", 24), ["needs --patch-size"]),
        (("patch", 24, 0), ["1 or more"]),
        (("patch", 24, 4, 128), ["--codes 128", "patch-vq"]),
        (("patch-vq", 24, 4, 1), ["--codes must be 2 or more"]),
    ],
)
def test_refused_specs(arguments, words):
    with pytest.raises(ValueError) as error:
        token_spec(*arguments)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_load_and_save(tmp_path):
    tokenizer = load_tokenizer("patch", image_size=24, patch_size=4)
    tokenizer.save(tmp_path / "new" / "patch.safetensors")
    again = load_tokenizer("patch", tmp_path / "new" / "patch.safetensors")
    assert again.fingerprint == tokenizer.fingerprint != Patch(24, 6).fingerprint
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["patch.safetensors"]
    with pytest.raises(ValueError, match="patch_size 4.*--patch-size 6"):
        load_tokenizer("patch", tmp_path / "new" / "patch.safetensors", patch_size=6)


def test_load_refusals(tmp_path):
    with pytest.raises(ValueError, match="unknown --tokenizer 'x'"):
        load_tokenizer("x")
    with pytest.raises(ValueError, match=r"missing \['patch_size'\], unknown \['codes'\]"):
        load_tokenizer("patch", image_size=24, codes=3)
    with pytest.raises(FileNotFoundError, match="--tokenizer-weights"):
        load_tokenizer("patch-vq", tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="not a readable safetensors"):
        load_tokenizer("patch-vq", tmp_path / "text")
    Patch(24, 4).save(tmp_path / "patch")
    with pytest.raises(ValueError, match="expected a saved patch-vq tokenizer, found patch"):
        load_tokenizer("patch-vq", tmp_path / "patch")


def test_wrong_shapes():
    tokenizer = Patch(24, 4)
    with pytest.raises(ValueError, match="--image-size"):
        tokenizer.encode(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="to_unit"):
        tokenizer.encode(torch.zeros(1, 3, 24, 24, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"expected tokens \(B, 36, 48\)"):
        tokenizer.decode(torch.zeros(1, 36, 47))
