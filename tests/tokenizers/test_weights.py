"""Weights files of kl16 and vq16: names and shapes, all ways they are kept, all ways they break."""

import json
import math
import os
import pickle
from argparse import Namespace
from pathlib import PurePosixPath

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from heptapod_fast.tokenizers import (
    KL16,
    VQ16,
    Patch,
    convert_weights,
    load_tokenizer,
    pretrained,
)
from heptapod_fast.tokenizers.autoencoder import file_shapes
from heptapod_fast.tokenizers.weights import check, digest, read_state
from tests.tokenizers.reference import UNUSED, gap, images, random_weights, table

NAMES = {"kl16": KL16, "vq16": VQ16}
SOURCES = {
    "kl16": ["--tokenizer-weights FILE", "kl16.ckpt", "github.com/LTH14/mar"],
    "vq16": ["--tokenizer-weights FILE", "vq_ds16_c2i.pt", "FoundationVision/LlamaGen"],
}


def thin(name, **changes):
    """A state dict of the right shapes that takes no space in a file."""
    return {key: torch.zeros(1).expand(shape) for key, shape in table(name).items()} | changes


def refused(name, path, *words, error=ValueError):
    with pytest.raises(error) as caught:
        load_tokenizer(name, path)
    text = str(caught.value)
    assert all(word in text for word in (str(path), *words, *SOURCES[name])), text
    assert "\n" not in text and len(text) < 2000
    return text


@pytest.mark.parametrize("name, count", [("kl16", 66_456_019), ("vq16", 71_883_403)])
def test_names_shapes_and_counts_are_the_published_ones(name, count):
    expected = {key: shape for key, shape in table(name).items() if key not in UNUSED}
    assert file_shapes(name) == expected
    assert sum(math.prod(shape) for shape in expected.values()) == count
    network = NAMES[name](thin(name), 32).network
    assert sum(p.numel() for p in network.parameters()) == count and not list(network.buffers())


@pytest.mark.parametrize("name", NAMES)
def test_published_files_and_copies_are_the_same_tokenizer(name, tmp_path):
    weights = random_weights(name)
    tokenizer = NAMES[name](weights, 32)
    tokens = tokenizer.encode(images(2, 32))
    files = ["file.pt"]
    if name == "kl16":
        torch.save({"model": weights, "steps": 3, "args": Namespace(lr=1.0)}, tmp_path / "file.pt")
        tokenizer.save(tmp_path / "new" / "copy.safetensors")
        files.append("new/copy.safetensors")
    else:  # bare, and in the format of PyTorch before 1.6; `test_convert` has the other one
        torch.save(weights, tmp_path / "file.pt", _use_new_zipfile_serialization=False)
    for file in files:
        again = load_tokenizer(name, tmp_path / file, image_size=32, patch_size=16)
        assert again.weights_sha256 == tokenizer.weights_sha256
        assert again.fingerprint == tokenizer.fingerprint
        state = again.state()
        assert all(torch.equal(state[key], weights[key]) for key in file_shapes(name))
        assert gap(again.encode(images(2, 32)), tokens) < 1e-4
        assert again.describe()["weights"] == str(tmp_path / file)


def test_convert(tmp_path):
    torch.save({"model": thin("vq16")}, tmp_path / "vq.pt")
    sha = convert_weights("vq16", tmp_path / "vq.pt", tmp_path / "new" / "vq.safetensors")
    with safe_open(tmp_path / "new" / "vq.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["tokenizer"]) == ["vq16", {"image_size": 256}]
        assert set(file.keys()) == set(table("vq16")) - UNUSED
    # Another size of images needs no other file.
    assert (
        load_tokenizer("vq16", tmp_path / "new" / "vq.safetensors", image_size=48).weights_sha256
        == sha
    )
    refused(
        "kl16",
        tmp_path / "new" / "vq.safetensors",
        "expected kl16, found a saved vq16",
        "--tokenizer vq16",
    )
    with pytest.raises(ValueError, match="--tokenizer patch has no published weights"):
        convert_weights("patch", "a", "b")


def test_restore():
    tokenizer = KL16(thin("kl16"), 48)
    again = KL16.restore(tokenizer.settings(), tokenizer.state())
    assert again.fingerprint == tokenizer.fingerprint and again.image_size == 48


def test_the_fingerprint_tells_weights_and_sizes_apart(monkeypatch):
    monkeypatch.setattr(pretrained, "build", lambda *arguments: None)  # identity needs no network
    state = {key: value.float() for key, value in thin("kl16").items()}
    changed = state | {"quant_conv.bias": torch.full((32,), 1e-6)}
    assert digest(state) != digest(changed) == digest(dict(reversed(changed.items())))
    small, other = KL16(state, 32), KL16(changed, 32)
    large = KL16(state, 48, source="folder/kl16.ckpt")
    assert len({small.fingerprint, other.fingerprint, large.fingerprint}) == 3
    assert small.weights_sha256 == large.weights_sha256 == digest(state)
    described = json.loads(json.dumps(large.describe()))
    assert described == {
        "tokenizer": "kl16",
        "image_size": 48,
        "weights": os.path.abspath("folder/kl16.ckpt"),
        "weights_sha256": digest(state),
        "fingerprint": large.fingerprint,
        "dtype": "float32",
        "scale": 0.2325,
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_other_number_formats_are_converted(dtype):
    key, shape = "post_quant_conv.weight", (16, 16, 1, 1)
    value = (torch.arange(256).view(shape) - 7).to(dtype)
    checked = check("kl16", thin("kl16", **{key: value}))
    assert all(tensor.dtype == torch.float32 for tensor in checked.values())
    assert torch.equal(checked[key], value.float())


def test_unused_names_are_left_out():
    extra = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(2)}
    assert set(check("kl16", thin("kl16", **extra))) == set(table("kl16"))
    assert set(check("vq16", thin("vq16"))) == set(table("vq16")) - UNUSED
    without = {key: value for key, value in thin("vq16").items() if key not in UNUSED}
    assert set(check("vq16", without)) == set(without)
    with pytest.raises(ValueError, match="1 \\(loss.logvar\\)"):
        check("vq16", thin("vq16", **{"loss.logvar": torch.zeros(())}))
    with pytest.raises(ValueError, match="1 \\(quantize.codebook_used\\)"):
        check("kl16", thin("kl16", **{"quantize.codebook_used": torch.zeros(65536)}))


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", ["empty"]),
        (b"  \n<!DOCTYPE html><html>", ["web page"]),
        (b"<html><head>", ["web page"]),
        (b"version https://git-lfs.github.com/spec/v1\n", ["Git LFS pointer", "git lfs pull"]),
        (b"PK\x03\x04" + b"a" * 3000, ["damaged or truncated", "3,004 bytes"]),
        (bytes(range(256)) * 9, ["damaged or truncated", "2,304 bytes"]),
        ((40).to_bytes(8, "little") + b'{"a": nonsense', ["safetensors", "22 bytes"]),
    ],
)
def test_files_that_are_no_weights(content, words, tmp_path):
    path = tmp_path / "file.ckpt"
    path.write_bytes(content)
    for name in NAMES:
        refused(name, path, *words)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files(kind, tmp_path):
    path = tmp_path / "file"
    state = {"a": torch.randn(5000), "b": torch.randn(5000)}
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state}, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    for share in (0.02, 0.5, 0.98):
        path.write_bytes(content[: int(share * len(content))])
        refused("kl16", path, "damaged or truncated")


class Trap:
    """Makes a folder when it is unpickled by one who executes what files say."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_file_is_never_run(tmp_path):
    trap, path = Trap(tmp_path / "sprung"), tmp_path / "file.pt"
    for zipped in (True, False):
        torch.save(
            {"model": thin("vq16"), "extra": trap}, path, _use_new_zipfile_serialization=zipped
        )
        refused("vq16", path, "mkdir", "could run code")
    path.write_bytes(pickle.dumps(trap, protocol=2))
    refused("vq16", path)
    assert not (tmp_path / "sprung").exists()
    torch.save({"model": thin("vq16"), "args": PurePosixPath("a")}, path)
    refused("vq16", path, "pathlib.PurePosixPath", "save its tensors alone")


def test_missing_files_and_folders(tmp_path):
    for name in NAMES:
        refused(name, tmp_path / "none", "no such file", error=FileNotFoundError)
        refused(name, tmp_path, "a folder")
        with pytest.raises(ValueError) as error:
            load_tokenizer(name)
        assert all(word in str(error.value) for word in (f"--tokenizer {name}", *SOURCES[name]))


def test_contents_that_are_no_state_dict(tmp_path):
    path = tmp_path / "file.pt"
    torch.save([torch.zeros(2)], path)
    refused("kl16", path, "found an empty or other object (list)")
    torch.save({"model": {}}, path)
    refused("kl16", path, "empty or other object (dict)")
    torch.save({"epoch": 3, "state_dict": {"a": torch.zeros(1)}}, path)
    refused("kl16", path, 'bare or under "model"', "2 (epoch, state_dict)")
    torch.save({"model": {"a": 3}}, path)
    refused("kl16", path, "found 1 (a)")


def test_weights_of_something_else(tmp_path):
    path = tmp_path / "file.pt"
    torch.save({"model": thin("kl16")}, path)
    text = refused(
        "vq16",
        path,
        "missing",
        "unknown",
        "these are the weights of --tokenizer kl16",
        "LlamaGen's VQ-16 tokenizer, which has 343 tensors",
    )
    assert text.count("encoder.down.0") == 12 and ", ...)" in text  # the first ones only
    torch.save({"model": thin("vq16")}, path)
    refused("kl16", path, "these are the weights of --tokenizer vq16", "which has 312 tensors")
    ldm = {f"decoder.up.4.attn.{i}.q.weight": torch.zeros(512, 512, 1, 1) for i in range(3)}
    torch.save(thin("kl16", **ldm), path)
    refused("kl16", path, "unknown 3 (decoder.up.4.attn.0.q.weight", "LDM's kl-f16")
    for key, words in (
        ("diffloss.net.input_proj.weight", "MAR model"),
        ("tok_embeddings.weight", "LlamaGen's GPT"),
        ("encoder.down_blocks.0.resnets.0.conv1.weight", "diffusers"),
        ("backbone.blocks.0.norm1.weight", "checkpoint of a training run"),
    ):
        save_file({key: torch.zeros(3)}, path)
        refused("kl16", path, "missing 312 (", f"unknown 1 ({key})", words)
    Patch(24, 4).save(path)
    refused("vq16", path, "found a saved patch tokenizer", "--tokenizer patch")


def test_names_shapes_and_numbers_that_are_wrong(tmp_path):
    path = tmp_path / "file.pt"
    state = thin("kl16", **{"quant_conv.weight": torch.zeros(8, 32, 1, 1)})
    del state["decoder.conv_out.bias"], state["encoder.mid.attn_1.q.weight"]
    torch.save(state, path)
    refused(
        "kl16",
        path,
        "missing 2 (encoder.mid.attn_1.q.weight, decoder.conv_out.bias)",
        "of another shape 1 (quant_conv.weight (8, 32, 1, 1) instead of (32, 32, 1, 1))",
    )
    broken = {
        "quant_conv.bias": torch.full((32,), math.nan),
        "decoder.conv_out.bias": torch.tensor([0.0, math.inf, 0.0]),
    }
    torch.save(thin("kl16", **broken), path)
    refused("kl16", path, "not finite 2 (decoder.conv_out.bias, quant_conv.bias)")
    torch.save(thin("kl16", **{"quant_conv.bias": torch.zeros(32, dtype=torch.complex64)}), path)
    refused("kl16", path, "no plain numbers 1 (quant_conv.bias torch.complex64)")
    empty = torch.empty(32, device="meta")
    with pytest.raises(ValueError, match="no plain numbers 1 .quant_conv.bias"):
        KL16(thin("kl16", **{"quant_conv.bias": empty}), 48)


def test_wrapped_weights_say_what_to_take_out(tmp_path):
    path = tmp_path / "file.pt"
    torch.save({f"module.{key}": value for key, value in thin("kl16").items()}, path)
    refused("kl16", path, "unknown 312", 'the names begin with "module."; save the tensors')
    torch.save({"state_dict": thin("kl16"), "epoch": 3}, path)
    refused("kl16", path, "tensors are under 1 (state_dict): save them alone")


def test_weights_are_copied():
    state = thin("kl16", **{"quant_conv.bias": torch.ones(32)})
    tokenizer = KL16(dict(state), 48, torch.bfloat16)
    state["quant_conv.bias"].zero_()
    assert tokenizer.network.quant_conv.bias.eq(1).all()
    parameter = torch.nn.Parameter(torch.ones(32))
    KL16(thin("kl16", **{"quant_conv.bias": parameter}), 48, torch.bfloat16)
    assert parameter.requires_grad and parameter.dtype == torch.float32


def test_settings(tmp_path):
    path = tmp_path / "kl16.ckpt"
    torch.save(thin("kl16"), path)
    assert load_tokenizer("kl16", path).image_size == 256
    tokenizer = load_tokenizer("kl16", path, torch.bfloat16, image_size=512, patch_size=None)
    assert (tokenizer.dtype, tokenizer.spec.grid) == (torch.bfloat16, 32)
    with pytest.raises(ValueError, match="fixed patch size of 16, found --patch-size 8"):
        load_tokenizer("kl16", path, patch_size=8)
    with pytest.raises(ValueError, match="--image-size 40 is not a multiple"):
        load_tokenizer("kl16", "none", image_size=40)
    with pytest.raises(ValueError, match=r"unknown \['codes'\]"):
        load_tokenizer("kl16", path, codes=3)


def test_what_read_state_returns(tmp_path):
    torch.save({"model": {"a": torch.ones(2).half()}}, tmp_path / "file")
    state = read_state("kl16", str(tmp_path / "file"))
    assert list(state) == ["a"] and state["a"].dtype == torch.float16
