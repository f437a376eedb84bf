"""Runs of llamagen and npp through the loop and the command lines."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from heptapod_fast import load_run
from heptapod_fast.rng import Rng
from heptapod_fast.tokenizers.autoencoder import file_shapes
from heptapod_fast.train.records import read_metrics
from heptapod_fast.train.session import Ending
from tests.caches import image_folder
from tests.running import NO_HEAD, command, final_files, flags, refused, start_here, train_here

LLAMAGEN = NO_HEAD | {"system": "llamagen", "label_dropout": 0.25, "dropout": 0.1}
# Patches of 3 x 3 up to image 24, of 2 x 2 up to image 48, then single codes.
NPP = NO_HEAD | {
    "system": "npp",
    "label_dropout": 0.25,
    "dropout": 0.1,
    "patches": (3, 2, 1),
    "shares": (0.25, 0.25, 0.5),
    "images": 96,
    "warmup": 0.5,
}
# Borders at images 21 and 42, which steps of 8 pass over.
UNEVEN = NPP | {"shares": (0.22, 0.22, 0.56)}


@pytest.fixture(scope="module")
def npp(tmp_path_factory):
    """A finished run through three segments."""
    out = tmp_path_factory.mktemp("npp")
    train_here(out, **NPP)
    return out


@pytest.fixture(scope="module")
def llamagen(tmp_path_factory):
    """A finished run."""
    out = tmp_path_factory.mktemp("llamagen")
    train_here(out, **LLAMAGEN)
    return out


def test_segments_follow_each_other(npp):
    records = read_metrics(npp / "metrics.jsonl")
    assert [record["phase"] for record in records] == (
        ["patch 3"] * 3 + ["patch 2"] * 3 + ["patch 1"] * 6
    )
    # Linear over half of each, then flat, and over the last fifth down to 1e-5.
    peak = 8e-3 * 8 / 256
    rates = [record["lr"] for record in records]
    assert rates[:3] == rates[3:6] == pytest.approx([peak * 8 / 12, peak, 1e-5])
    falling = 1e-5 + (peak - 1e-5) * (1 - 40 / 48) / 0.2
    assert rates[6:] == pytest.approx([peak / 3, peak * 2 / 3, peak, peak, falling, 1e-5])


# In the first segment, on both sides of a border (a step from 16 ends at 24), in the last.
@pytest.mark.parametrize("stop_at", [8, 16, 24, 40, 48, 72])
def test_it_resumes_anywhere_bit_for_bit(npp, tmp_path, stop_at):
    _, state, ending = train_here(tmp_path, stop_at=stop_at, **NPP)
    assert (ending, state.images) == (Ending.STOPPED, stop_at + 8)
    _, state, ending = train_here(tmp_path, **NPP)
    assert (ending, state.images) == (Ending.FINISHED, 96)
    assert final_files(tmp_path) == final_files(npp)


def test_more_images_move_the_borders_and_that_is_said(npp, tmp_path):
    """Of 96 images the last were single codes, of 192 they belong to the second segment."""
    out = tmp_path / "run"
    shutil.copytree(npp, out)
    said = []
    start_here(out, said.append, **NPP | {"images": 192})
    (line,) = [line for line in said if "would be in phase" in line]
    assert "96 images so far was trained in phase patch 1" in line
    assert "with --images 192 it would be in phase patch 2" in line
    said.clear()
    start_here(out, said.append, **NPP)
    assert not any("would be in phase" in line for line in said)


def test_borders_within_a_step(tmp_path):
    """A step belongs to the segment that it begins in; the first of the next begins at 24."""
    train_here(tmp_path / "whole", **UNEVEN)
    records = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    found = [(record["images"], record["phase"]) for record in records]
    assert found[2:4] == [(24, "patch 3"), (32, "patch 2")]
    assert found[5:7] == [(48, "patch 2"), (56, "patch 1")]
    for stop_at in (8, 16, 24, 40):
        out = tmp_path / f"stopped-{stop_at}"
        train_here(out, stop_at=stop_at, **UNEVEN)
        train_here(out, **UNEVEN)
        assert final_files(out) == final_files(tmp_path / "whole")


def test_micro_batches_do_not_change_it(tmp_path):
    """Beyond the order of sums: the weights move a thousand times as far."""
    settings = NPP | {"precision": "fp32", "lr_per_256": 0.1}
    one, state = start_here(tmp_path / "start", **settings)
    start = {name: value.clone() for name, value in one.system.state_dict().items()}
    whole, _, _ = train_here(tmp_path / "whole", **settings)
    parts, _, _ = train_here(tmp_path / "parts", micro_batch=2, **settings)
    for name, value in parts.system.state_dict().items():
        moved = float((whole.system.state_dict()[name] - start[name]).abs().max())
        difference = float((whole.system.state_dict()[name] - value).abs().max())
        assert moved > 0 and difference < 0.02 * moved, name


def test_a_finished_run_is_a_llamagen_run(npp, tmp_path):
    """Its weights, taken by the other system, draw the same images."""
    trained = load_run(npp, device="cpu", ema="none").system
    session, _ = start_here(tmp_path, init_from=str(npp), **LLAMAGEN)
    taken = session.system.eval()
    for name, value in load_run(npp, device="cpu").system.state_dict().items():
        assert torch.equal(taken.state_dict()[name], value), name
    taken.load_state_dict(trained.state_dict())
    classes = torch.arange(4) % taken.num_classes
    samples = [
        system.sample(classes, Rng(3), system.options(guidance=2.0)) for system in (trained, taken)
    ]
    assert torch.equal(*samples)


def test_it_samples_guided(tmp_path):
    """After so many large steps that classes differ."""
    run = tmp_path / "run"
    train_here(run, **LLAMAGEN | {"images": 400, "lr_per_256": 0.3, "checkpoint_every": 400})
    drawn = {}
    for name, words in {
        "none": (),
        "constant": ("--guidance", 100.0),
        "linear": ("--guidance", 100.0, "--guidance-schedule", "linear"),
    }.items():
        out = tmp_path / f"{name}.png"
        result = command("sample", run, "--classes", "0,1", *words, "--out", out)
        assert result.code == 0, result.err
        drawn[name] = out.read_bytes()
    assert len(set(drawn.values())) == 3


def test_it_is_evaluated_and_reported(npp, tmp_path):
    out = tmp_path / "numbers.json"
    result = command("evaluate", npp, "--count", 10, "--guidance", 2.0, "--out", out)
    assert result.code == 0, result.err
    assert json.loads(out.read_text())["options"]["guidance"] == 2.0
    result = command("evaluate", npp, "--count", 10, "--out", out)
    assert json.loads(out.read_text())["options"]["guidance"] == 1.0  # tiny's own
    for tool in ("report", "verify"):
        result = command(tool, npp)
        assert result.code == 0, result.err
    page = (npp / "report.md").read_text()
    assert "# npp tiny on logograms" in page
    rates = json.loads((npp / "report.json").read_text())["images_per_second_of_phases"]
    assert list(rates) == ["patch 3", "patch 2", "patch 1"]
    records = read_metrics(npp / "metrics.jsonl")
    of_first = sorted(record["images_per_second"] for record in records[:3])
    assert rates["patch 3"] == of_first[1]
    assert "| images per second of phases | patch 3 " in page


def test_from_published_codes_to_samples(tmp_path):
    """Images, a cache of vq16 codes made with random weights of the published names, a run, a
    picture."""
    images = image_folder(tmp_path / "images", count=12, size=64)
    weights = tmp_path / "vq16.safetensors"
    shapes = file_shapes("vq16").items()
    save_file({name: 0.02 * torch.randn(shape) for name, shape in shapes}, weights)
    cache = tmp_path / "codes.zarr"
    made = command(
        *("cache", "--data", images, "--image-size", 64, "--out", cache),
        *("--tokenizer", "vq16", "--tokenizer-weights", weights),
    )
    assert made.code == 0, made.err
    of_a_cache = {"tokenizer": None, "codes": None, "logogram_count": None, "image_size": None}
    settings = NPP | of_a_cache | {"data": cache, "batch": 4, "images": 16, "log_every": 4}
    settings |= {"patches": (2, 1), "shares": (0.5, 0.5), "checkpoint_every": 8}
    run = tmp_path / "run"
    trained = command("train", *flags(**settings | {"out": run}))
    assert trained.code == 0, trained.err
    assert load_run(run, device="cpu").system.spec.vocabulary == 16_384
    drawn = command("sample", run, "--classes", "0,1", "--count", 2, "--out", tmp_path / "grid.png")
    assert drawn.code == 0, drawn.err
    assert (tmp_path / "grid.png").exists()


def test_a_dry_run_shows_the_segments():
    result = command("train", *flags(**NPP | {"images": 9600}), "--dry-run")
    assert result.code == 0, result.err
    for line in (
        "patch 3, images 0 to 2,400",
        "patch 2, images 2,400 to 4,800",
        "patch 1, images 4,800 to 9,600",
    ):
        assert line in result.out


def test_bad_input_is_refused_with_the_reason(llamagen, tmp_path):
    classes = load_run(llamagen, device="cpu").system.num_classes
    refused(
        command("sample", llamagen, "--positions-per-step", 4),
        "--positions-per-step 4",
        "predicts one next token",
    )
    refused(
        command("sample", llamagen, "--classes", classes),
        f"'{classes}' is no class of this run, which has {classes}",
    )
    train_here(tmp_path / "sure", **LLAMAGEN | {"label_dropout": 0.0, "images": 16})
    refused(
        command("sample", tmp_path / "sure", "--guidance", 2.0),
        "--guidance 2: this run was trained with --label-dropout 0",
    )

    npp = NPP | {"out": tmp_path / "never"}
    refused(
        command("train", *flags(**npp | {"patches": (4, 1), "shares": (0.5, 0.5)})),
        "patches of 4 x 4 (4 1): expected sides that divide the grid of 6 x 6",
    )
    refused(
        command("train", *flags(**npp | {"shares": (0.25, 0.25, 0.25)})),
        "--shares 0.25 0.25 0.25: expected numbers that add up to 1, these make 0.75",
    )
    refused(
        command("train", *flags(**npp | {"images": 24, "shares": (0.1, 0.1, 0.8)})),
        "--images 24 leave no step of 8 to patches of 2 x 2",
    )
    refused(
        command("train", *flags(**LLAMAGEN | {"tokenizer": "patch", "codes": None})),
        "--tokenizer patch: this system predicts codes",
    )
    refused(
        command("train", *flags(**LLAMAGEN | {"init_from": llamagen, "width": 64})),
        "layers.0.attention.wqkv.weight: (192, 64) here, (96, 32) there",
    )
    assert not (tmp_path / "never").exists()
