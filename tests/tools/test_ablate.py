"""tools/ablate.py: every table from its command to its page, at the smallest setting."""

import json
import sys
from pathlib import Path

import pytest

from heptapod_fast.ablations import Ablation, Variant, running
from heptapod_fast.ablations import plan as plans
from heptapod_fast.systems import configure
from tests.running import ROOT, command, refused

sys.path.append(str(ROOT / "tools"))
from _ablations import ABLATIONS

NAMES = [
    "table1",
    "figure6",
    "figure7",
    "figure8",
    "dense",
    "table4",
    "steps",
    "npp-levels",
    "npp-segment",
    "npp-patch",
    "sar-grouping",
    "sar-guidance",
]
# In depth table4 and the 1D baselines have what they compare; of all other things there is little.
SMALLEST = "--width 16 --heads 2 --logogram-count 64 --log-every 16 --sample-every 0"
CODES = " --codes 16"


@pytest.fixture
def in_process(monkeypatch):
    """Runs without interpreters of their own; the words that each was started with."""
    started = []

    def run(words, job, processes, share):
        tool = Path(words[1]).stem
        started.append(tool)
        done = command(tool, *words[2:])
        if done.code != 0:
            raise running.RunFailed(done.err)

    monkeypatch.setattr(running, "_run", run)
    return started


@pytest.fixture(autouse=True)
def hardly_timed(monkeypatch):
    """One step of each row."""
    monkeypatch.setattr(plans, "STEPS", 1)
    monkeypatch.setattr(plans, "WARM_UP", 0)


def small(name, out, *more):
    """The command of a table that is over in seconds."""
    flags = SMALLEST
    if name == "dense":  # of vectors, and its rows differ by their batches
        flags += " --diffusion-blocks 1 --diffusion-width 16"
    else:
        flags += " --batch 16"
    if not name.startswith(("sar", "figure6", "dense")):
        flags += CODES
    words = ("--images", 96, "--count", 5, "--equal", "images", "--out", out, "--device", "cpu")
    return (name, *words, *more, "--", *flags.split())


@pytest.fixture
def two_rows(monkeypatch):
    """A table of two rows that nothing of is slow, among those of the papers."""
    variants = [Variant("one", {"density": 1}), Variant("two", {"density": 2})]
    table = Ablation("Two rows", "A test.", lambda scale: variants, points=2)
    monkeypatch.setitem(ABLATIONS, "two", table)


def test_a_table_with_two_seeds_goes_on_where_it_was(in_process, two_rows, tmp_path, monkeypatch):
    out = tmp_path / "two"
    size = ("--image-size", 24, "--patch-size", 8)  # 3 x 3 tokens
    words = small("two", out, "--seeds", 2)
    dry = command("ablate", *small("two", out, "--seeds", 2, "--dry-run"), *size)
    assert dry.code == 0, dry.err
    assert "4 runs, about " in dry.out and not out.exists() and in_process == []
    original = running._run
    begun = []

    def once_too_often(words, job, processes, share):
        begun.append(1)
        if len(begun) == 4:
            raise running.RunFailed("killed")
        original(words, job, processes, share)

    monkeypatch.setattr(running, "_run", once_too_often)
    refused(command("ablate", *words, *size), "killed")
    assert in_process == ["train", "evaluate", "train"]
    monkeypatch.setattr(running, "_run", original)
    in_process.clear()
    done = command("ablate", *words, *size)
    assert done.code == 0, done.err
    assert f"going on with {out}" in done.out and "1 of 4 runs are done already" in done.out
    assert in_process == ["train", "evaluate"] * 3
    rows = json.loads((out / "table.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["one", "two"]
    for row in rows:
        assert row["seeds"] == [0, 1] and row["images"] == 96
        assert {"relation_accuracy", "held_out_loss"} <= row["mean"].keys()
        half, end = row["curve"]
        assert (half["images"], end["images"]) == (48, 96)
        assert (
            half["held_out_loss"][0] > end["held_out_loss"][0] == row["values"]["held_out_loss"][0]
        )
    page = (out / "table.md").read_text()
    assert "| one |" in page and " ± " in page and (out / "chart.png").is_file()
    assert page in done.out
    refused(
        command("ablate", *small("two", out, "--seeds", 3), *size),
        "was begun with --seeds 2, now 3",
    )
    refused(
        command("ablate", *small("two", out, "--seeds", 2, "--metrics", "loss"), *size),
        "--metrics None, now loss",
    )
    refused(command("ablate", *words, *size, "--lr-per-256", 1), "-- --width")
    refused(command("ablate", *small("table1", out, "--seeds", 2), *size), "NAME two, now table1")


def test_without_a_flag_a_run_takes_five_minutes_of_64_tokens(monkeypatch, tmp_path):
    """At 5 ms an image; rows of equal compute follow from the first one's images."""
    seen = []

    def timed(settings, device):
        seen.append(configure(**settings))
        return 1000, 0.005

    monkeypatch.setattr(plans, "timed", timed)
    monkeypatch.chdir(tmp_path)
    done = command("ablate", "table1", "--dry-run", "--seeds", 2)
    assert done.code == 0, done.err
    assert [config.spec.num_tokens for config in seen] == [64, 64, 64]
    assert {config.data.data for config in seen} == {"pairs"}
    assert "1d-raster                      60,000 images, about 5:00 a run" in done.out
    last = seen[-1]
    images = int(60_000 * plans.flops_per_image(seen[0]) / plans.flops_per_image(last))
    assert f"2d-random                {images:>12,} images" in done.out
    minutes = 1.1 * 2 * 0.005 * (60_000 + 60_000 + images) / 60
    assert f"6 runs, about {int(minutes)}:" in done.out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_table_from_its_command(in_process, tmp_path, name):
    points = () if name == "sar-guidance" else ("--points", 2)
    metrics = ("loss",) if name == "dense" else ("relation", "loss")
    words = small(name, tmp_path / name, *points, "--metrics", ",".join(metrics))
    done = command("ablate", *words)
    assert done.code == 0, done.err
    table = json.loads((tmp_path / name / "table.json").read_text())
    trained = in_process.count("train")
    assert in_process.count("evaluate") == len(table["rows"]) >= trained >= 1
    for row in table["rows"]:
        assert row["seeds"] == [0]
        assert row["mean"]["held_out_loss"] > 0
        if "relation" in metrics:
            assert 0 <= row["mean"]["relation_accuracy"] <= 1
        assert len(row["curve"]) == len(points)
    assert (tmp_path / name / "chart.png").is_file()


def test_the_list_is_whole():
    assert list(ABLATIONS) == NAMES


@pytest.mark.parametrize(
    "words, named",
    [
        (("table9",), ("no table is named table9", "table1", "Order and sampler")),
        (("table1", "--images", 10, "--minutes", 1), ("--images beside --minutes",)),
        (("table1", "--seeds", 0), ("--seeds 0: expected more than 0",)),
        (("table1", "--", "--out", "x"), ("-- --out: this is said before the --",)),
        (("table1", "--", "--data=pairs"), ("-- --data: this is said before the --",)),
        (("table1", "--data", "x.tar"), ("--metrics fid,is: needs --inception FILE",)),
        (("table1", "--metrics", "loss,dreams"), ("--metrics dreams: choose among",)),
        (("figure8", "--images", 9, "--", "--density=4"), ("rows of this table differ by it",)),
        (("table1", "--", "batch", 3), ("-- batch: expected flags of tools/train.py",)),
        (
            ("table1", "--images", 10, "--", "--width", 33),
            ("--width 33 is not a multiple of --heads",),
        ),
        (("table1", "--images", 10, "--", "--nothing", 3), ("--nothing",)),
        (("figure8", "--images", 100), ("n = 4, which would train on", "--batch 64 is more than")),
        (("sar-guidance", "--points", 2), ("--points 2: rows of this table are one run",)),
        (("table1", "--at-once", 2, "--launcher", "torchrun"), ("--at-once 2 beside --launcher",)),
        (
            ("table1", "--extractor", "small", "--inception", "f"),
            ("--extractor small beside --inception",),
        ),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, words, named):
    name, *rest = words
    refused(command("ablate", name, "--out", tmp_path / "out", *rest), *named)
    assert not (tmp_path / "out").exists()
