"""Runs on kl16 and on vq16, from images to samples, with random weights of the published names."""

import json

import pytest
import torch
from safetensors.torch import save_file

from heptapod_fast.tokenizers.autoencoder import file_shapes
from tests.running import command, flags, refused


@pytest.fixture(scope="module", params=["kl16", "vq16"])
def weights(request, tmp_path_factory):
    """(name, a file of random weights)."""
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / f"{request.param}.safetensors"
    save_file(
        {
            key: torch.randn(shape, generator=generator) * 0.02
            for key, shape in file_shapes(request.param).items()
        },
        path,
    )
    return request.param, path


def test_from_images_to_samples(weights, tmp_path):
    name, path = weights
    out = tmp_path / "run"
    # codes belongs to patch-vq.
    settings = dict(
        out=out,
        tokenizer=name,
        tokenizer_weights=path,
        image_size=32,
        codes=None,
        patch_size=None,
        logogram_count=8,
        images=16,
        batch=8,
        device="cpu",
    )
    if name == "kl16":
        settings |= dict(diffusion_blocks=1, diffusion_width=16)
    arguments = [a for a in flags(**settings)]
    result = command("train", *arguments)
    assert result.code == 0, result.err
    about = json.loads((out / "tokenizer.json").read_text())
    assert about["tokenizer"] == name and len(about["weights_sha256"]) == 64
    assert not (out / "tokenizer.safetensors").exists()
    moved = path.rename(path.with_name("moved.safetensors"))
    try:
        sample = ["sample", out, "--count", "2", "--out", tmp_path / "grid.png", "--device", "cpu"]
        sample += ["--diffusion-steps", "2"] if name == "kl16" else []
        refused(command(*sample), str(path), "no such file", "--tokenizer-weights")
        assert command(*sample, "--tokenizer-weights", moved).code == 0
        assert (tmp_path / "grid.png").exists()
    finally:
        moved.rename(path)


def test_missing_weights_are_refused_before_images_are_read(tmp_path):
    result = command(
        "train", "--size", "B", "--data", tmp_path, "--out", tmp_path / "run", "--device", "cpu"
    )
    refused(result, "--tokenizer kl16 needs --tokenizer-weights FILE", "github.com/LTH14/mar")
