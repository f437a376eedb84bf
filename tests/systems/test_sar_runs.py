"""Runs of SAR, and of others with flow matching, through the loop and the command lines."""

from __future__ import annotations

import json

import pytest

from heptapod_fast import load_run
from heptapod_fast.systems import configure
from heptapod_fast.train.session import Ending
from tests.running import command, final_files, flags, refused, train_here

NETWORK = {"head_depth": None, "codes": None, "diffusion_blocks": 1, "diffusion_width": 16}
SAR = NETWORK | {"system": "sar", "diffusion_repeat": 2, "dropout": 0.1}
FEW = ("--diffusion-steps", 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run: patches, flow, anti-diagonals."""
    out = tmp_path_factory.mktemp("sar")
    train_here(out, **SAR)
    return out


def test_the_defaults_are_the_documented_ones():
    settings = configure("tiny", "sar").model
    assert (settings.grouping, settings.injection) == ("next-neighbor", "average")
    assert settings.token_loss == "flow" and settings.diffusion_loss is None
    assert configure("tiny", "sar").data.tokenizer == "patch"


@pytest.mark.parametrize("stop_at", [16, 40])
def test_it_resumes_bit_for_bit(trained, tmp_path, stop_at):
    _, state, ending = train_here(tmp_path, stop_at=stop_at, **SAR)
    assert (ending, state.images) == (Ending.STOPPED, stop_at + 8)
    train_here(tmp_path, **SAR)
    assert final_files(tmp_path) == final_files(trained)


@pytest.mark.parametrize(
    "given",
    [
        {"grouping": "next-row"},
        {"grouping": "next-layer", "injection": "nearest"},
        {"token_loss": "ddpm"},
        {"injection": "shared"},
    ],
    ids=lambda given: " ".join(map(str, given.values())),
)
def test_other_kinds_train_and_sample(tmp_path, given):
    train_here(tmp_path / "run", **SAR | {"images": 16} | given)
    out = tmp_path / "grid.png"
    result = command("sample", tmp_path / "run", "--classes", "0,1", *FEW, "--out", out)
    assert result.code == 0, result.err
    assert out.exists()


def test_discrete_tokens_train_and_sample(tmp_path):
    settings = SAR | dict.fromkeys(("diffusion_blocks", "diffusion_width", "diffusion_repeat"))
    settings |= {"tokenizer": "patch-vq", "codes": 16, "images": 16}
    train_here(tmp_path / "run", **settings)
    result = command("sample", tmp_path / "run", "--classes", "0,1", "--out", tmp_path / "grid.png")
    assert result.code == 0, result.err


def test_it_samples_guided(tmp_path):
    """After so many large steps that classes differ."""
    run = tmp_path / "run"
    train_here(run, **SAR | {"images": 400, "lr_per_256": 0.1, "checkpoint_every": 400})
    drawn = {}
    for name, words in {
        "none": (),
        "cfg": ("--guidance", 50),
        "x": ("--guidance-x", 50),
        "z": ("--guidance-z", 50),
        "x and z": ("--guidance-x", 50, "--guidance-z", 50),
        "heun": ("--diffusion-sampler", "heun"),
    }.items():
        out = tmp_path / f"{name}.png"
        result = command("sample", run, "--classes", "0,1", *FEW, *words, "--out", out)
        assert result.code == 0, result.err
        drawn[name] = out.read_bytes()
    assert len(set(drawn.values())) == len(drawn)


def test_it_is_evaluated_reported_and_verified(trained, tmp_path):
    out = tmp_path / "numbers.json"
    words = ("--count", 10, "--guidance-x", 1.5, *FEW, "--out", out)
    result = command("evaluate", trained, *words)
    assert result.code == 0, result.err
    numbers = json.loads(out.read_text())
    options = numbers["options"]
    scales = options["guidance"], options["guidance_x"], options["guidance_z"]
    assert scales == (1.0, 1.5, 1.0)
    for tool in ("report", "verify"):
        result = command(tool, trained)
        assert result.code == 0, result.err


def test_a_dry_run_says_steps_and_streams():
    result = command("train", *flags(**SAR), "--dry-run")
    assert result.code == 0, result.err
    assert "11 groups of 1 to 6" in result.out
    assert "two" in result.out


@pytest.mark.parametrize("system", ["heptapod", "1d-raster"])
def test_flow_matching_for_the_others(tmp_path, system):
    settings = NETWORK | {"system": system, "tokenizer": "patch", "token_loss": "flow"}
    settings |= {"images": 16, "diffusion_repeat": 2}
    if system == "heptapod":
        settings["head_depth"] = 1
    train_here(tmp_path / "run", **settings)
    result = command(
        *("sample", tmp_path / "run", "--classes", "0", *FEW, "--diffusion-sampler", "heun"),
        *("--out", tmp_path / "grid.png"),
    )
    assert result.code == 0, result.err
    refused(
        command("sample", tmp_path / "run", "--diffusion-sampler", "ddpm"),
        "--diffusion-sampler ddpm: tokens of this run are drawn by euler or heun",
    )


def test_ddpm_is_what_it_was():
    """The names of runs that exist do not change."""
    plain = configure("tiny", tokenizer="patch")
    assert configure("tiny", tokenizer="patch", token_loss="ddpm") == plain
    assert "token_loss" not in plain.identity()["model"]


def test_bad_input_is_refused_with_the_reason(trained):
    refused(
        command("train", *flags(**SAR | {"injection": "shift"}), "--dry-run"),
        "--injection shift takes every group from the one before",
        "--grouping next-token or next-row",
    )
    refused(
        command("train", *flags(**SAR | {"diffusion_loss": "mse"}), "--dry-run"),
        "--diffusion-loss mse needs --token-loss ddpm",
    )
    refused(
        command("train", *flags(tokenizer="patch-vq", token_loss="flow"), "--dry-run"),
        "--token-loss flow needs continuous tokens",
    )
    refused(command("sample", trained, "--positions-per-step", 4), "groups of --grouping")
    refused(command("sample", trained, "--guidance", 2, "--guidance-x", 2, *FEW), "give it alone")
    assert load_run(trained, device="cpu").system.num_classes == 5
