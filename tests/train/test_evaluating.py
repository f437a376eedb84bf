"""--evaluate-every: the numbers of tools/evaluate.py while a run trains, without a trace in it."""

import hashlib
import json
from datetime import timedelta

import pytest
import torch
from PIL import Image

from heptapod_fast.evaluation import fidelity, small
from heptapod_fast.evaluation.symmetry import SymmetryAccuracy
from heptapod_fast.reports.run import report_run
from heptapod_fast.train.records import read_metrics
from heptapod_fast.world import PATIENCE_AT_START, World
from tests.running import (
    command,
    final_tensors,
    finish,
    flags,
    refused,
    start,
    tiny_config,
    torchrun,
    train_here,
)

EVERY = dict(images=48, evaluate_every=16, evaluate_count=20)


def measured(out):
    """{images: {name: number}}"""
    return {
        record["images"]: {
            name.removeprefix("evaluation/"): value
            for name, value in record.items()
            if name.startswith("evaluation/")
        }
        for record in read_metrics(out / "metrics.jsonl")
        if any(name.startswith("evaluation/") for name in record)
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run that was measured three times."""
    out = tmp_path_factory.mktemp("run")
    train_here(out, seed=3, evaluate_metrics="symmetry,likelihood", **EVERY)
    return out


def test_numbers_are_those_of_the_command(trained, tmp_path):
    found = measured(trained)
    assert list(found) == [16, 32, 48]
    out = tmp_path / "e.json"
    bits = []
    for weights in ("none", "ema-0.9999"):  # the raw weights are not what is measured
        words = ("--count", 20, "--seed", 3, "--ema", weights, "--out", out)
        result = command("evaluate", trained, "--metrics", "symmetry,likelihood", *words)
        assert result.code == 0, result.err
        numbers = json.loads(out.read_text())
        bits.append(numbers["bits_per_token"])
    assert found[48]["bits_per_token"] == pytest.approx(bits[1], rel=1e-6)
    assert abs(bits[0] - bits[1]) > 1e-5 * bits[1]
    assert found[48]["symmetry_accuracy"] == numbers["symmetry_accuracy"]
    assert found[48]["copy_distance"] == pytest.approx(numbers["copy_distance"], abs=1e-6)
    assert not any("fold" in name for name in found[48])  # single classes are left out


def test_training_is_what_it_is_without(trained, tmp_path):
    train_here(tmp_path / "plain", seed=3, images=48)
    expected, found = final_tensors(tmp_path / "plain"), final_tensors(trained)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not measured(tmp_path / "plain")


def test_a_report_has_a_table_and_a_chart(trained):
    page = report_run(trained).read_text()
    assert "## Samples while it trained" in page and "![numbers of samples" in page
    assert (trained / "evaluations.png").stat().st_size > 5000
    rows = json.loads((trained / "report.json").read_text())["evaluations"]
    assert [row["images"] for row in rows] == [16, 32, 48]
    with Image.open(trained / "evaluations.png") as chart:
        assert chart.width < 1600 and chart.height > 500  # two rows of panels
    assert rows[1]["symmetry_accuracy"] == measured(trained)[32]["symmetry_accuracy"]


@pytest.mark.parametrize(
    "stop_at, before",
    [
        (16, [16]),
        (8, []),  # in the step that reaches 16, whose numbers are left to the session after
    ],
)
def test_a_run_that_goes_on_measures_each_once(trained, tmp_path, stop_at, before):
    out = tmp_path / "run"
    same = dict(seed=3, evaluate_metrics="symmetry,likelihood", **EVERY)
    train_here(out, stop_at=stop_at, **same)
    assert list(measured(out)) == before
    train_here(out, **same)
    assert measured(out) == measured(trained)


def test_fid_by_the_small_extractor_looks_at_the_reference_once(tmp_path, monkeypatch):
    monkeypatch.setattr(small, "STEPS", 10)
    looked = []
    of_reference = fidelity.Fidelity._features_of_reference
    monkeypatch.setattr(
        fidelity.Fidelity,
        "_features_of_reference",
        lambda self, reference: looked.append(1) or of_reference(self, reference),
    )
    train_here(tmp_path, evaluate_metrics="fid,kid,likelihood", **EVERY)
    found = measured(tmp_path)
    assert len(found) == 3 and len(looked) == 1
    for numbers in found.values():
        assert numbers["fid"] > 0 and "kid" in numbers and numbers["bits_per_token"] > 0
        assert "reference_images" not in numbers
    assert found[16]["fid"] != found[48]["fid"]


def test_ranks_share_it(trained, tmp_path):
    """Of a state that is spread over them, measured as a whole by one."""
    words = flags(out=tmp_path, seed=3, evaluate_metrics="symmetry,likelihood", **EVERY)
    result = finish(start("train", *words, "--parallel", "fsdp", launcher=torchrun(2)))
    assert result.code == 0, result.out
    assert result.out.count("evaluated ") == 3
    found = measured(tmp_path)
    assert list(found) == [16, 32, 48]
    # Weights of two ranks differ in their last bits, and tokens hardly.
    alone = measured(trained)
    for images, numbers in found.items():
        near = pytest.approx(alone[images]["symmetry_accuracy"], abs=0.101)
        assert numbers["symmetry_accuracy"] == near
        near = pytest.approx(alone[images]["bits_per_token"], rel=1e-3)
        assert numbers["bits_per_token"] == near


def test_nothing_is_drawn_where_no_metric_looks_at_samples(tmp_path, monkeypatch):
    monkeypatch.setattr("heptapod_fast.train.evaluating.generate", None)
    train_here(tmp_path, seed=3, evaluate_metrics="likelihood", **EVERY)
    assert [list(numbers)[0] for numbers in measured(tmp_path).values()] == ["bits_per_token"] * 3


def test_what_cannot_be_measured_is_said_before_training(tmp_path):
    for number, (words, text) in enumerate(
        (
            (("--evaluate-metrics", "charm"), "--evaluate-metrics charm: unknown --metrics charm"),
            (("--evaluate-metrics", "fid", "--evaluate-inception", "gone.pth"), "no such file"),
            (("--evaluate-count", 1), "--evaluate-count 1"),
            (("--evaluate-inception-sha256", "6726"), "--evaluate-inception-sha256 6726 is the"),
        )
    ):
        out = tmp_path / str(number)
        result = command("train", *flags(out=out, evaluate_every=8), *words)
        refused(result, text)
        assert "images/s" not in result.out


def test_other_weights_of_inception_are_named_by_their_hash(tmp_path, monkeypatch):
    """As --inception-sha256 of tools/evaluate.py; a run's name does not depend on it."""
    weights = tmp_path / "other.pth"
    weights.write_bytes(b"weights")
    found = hashlib.sha256(b"weights").hexdigest()
    words = flags(out=tmp_path / "run", evaluate_every=8, evaluate_metrics="is")
    words += ["--evaluate-inception", str(weights)]
    refused(command("train", *words), "expected 6726825d...", "--evaluate-inception-sha256 HASH")
    # The hash fits: it is the file that does not.
    result = command("train", *words, "--evaluate-inception-sha256", found[:12].upper())
    refused(result, f"--inception {weights}: expected tensors saved by PyTorch")
    named = tiny_config(tmp_path, evaluate_inception_sha256=found[:12])
    assert named.identity() == tiny_config(tmp_path).identity()


def test_a_metric_that_fails_costs_a_record_alone(tmp_path, monkeypatch):
    said = []

    def fail(self):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(SymmetryAccuracy, "compute", fail)
    train_here(tmp_path, say=said.append, seed=3, **EVERY)
    warnings = [line for line in said if "no evaluation: out of memory" in line]
    assert len(warnings) == 3 and not measured(tmp_path)


def test_ranks_wait_longer_for_what_one_of_them_measures(tmp_path, monkeypatch):
    patience = []
    wait = World.wait_at_most
    monkeypatch.setattr(
        World,
        "wait_at_most",
        lambda self, time, groups=(): patience.append(time) or wait(self, time, groups),
    )
    train_here(tmp_path, seed=3, rank_timeout=77.0, **EVERY)
    in_training = timedelta(seconds=77)
    assert patience == [in_training, *[PATIENCE_AT_START, in_training] * 3]


def test_the_system_trains_on_after_a_measurement(tmp_path):
    session, _, _ = train_here(tmp_path, seed=3, **EVERY)
    assert session.system.training
