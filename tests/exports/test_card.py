"""The model card: its figures are the files', and it says what they are of."""

import json
import re
import shutil

import pytest

from heptapod_fast.exports.card import plain
from heptapod_fast.exports.folder import export_folder
from heptapod_fast.reports.run import report_run
from heptapod_fast.reports.tables import show
from heptapod_fast.storage import write_json
from heptapod_fast.train.records import read_metrics
from tests.running import train_here

SETTINGS = {"image_size": 12, "images": 32, "evaluate_every": 16, "evaluate_count": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with two checkpoints that was measured while it trained, and a report."""
    out = tmp_path_factory.mktemp("card") / "run"
    train_here(out, **SETTINGS)
    report_run(out)
    return out


def card_of(run, out, **asked) -> str:
    """The card of an export without samples."""
    export_folder(run, out, samples=False, **asked)
    return (out / "README.md").read_text()


def values_in(text: str, heading: str) -> dict[str, str]:
    """{name: value} of the tables of two columns below a heading."""
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|]*) \| ([^|]*) \|$", section, re.MULTILINE)
    return {name.strip(): value.strip() for name, value in rows}


def test_figures_are_those_of_the_report(run, tmp_path):
    found = values_in(card_of(run, tmp_path / "folder"), "Figures")
    report = json.loads((run / "report.json").read_text())
    for name in ("loss", "images", "steps", "epochs", "images_per_second_median", "torch"):
        assert found[name.replace("_", " ")] == show(report[name])
    *_, last = (record for record in read_metrics(run / "metrics.jsonl") if "loss" in record)
    assert found["loss"] == show(last["loss"])
    for images, loss in report["loss_by_images"].items():
        assert found[show(int(images))] == show(loss)
    measured = report["evaluations"][-1]
    assert found["symmetry accuracy"] == show(measured["symmetry_accuracy"])


def test_an_earlier_checkpoint_has_the_figures_of_its_time(run, tmp_path):
    found = values_in(card_of(run, tmp_path / "folder", checkpoint=2), "Figures")
    records = read_metrics(run / "metrics.jsonl")
    (then,) = [record for record in records if record["images"] == 16 and "loss" in record]
    assert found["images"] == "16" and found["steps"] == "2"
    assert found["loss"] == show(then["loss"])
    assert "24" not in found and "32" not in found


def test_an_evaluation_is_told_with_what_it_is_of(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    assert "## Evaluation" not in card_of(copy, tmp_path / "without")
    measured = {
        "checkpoint": "step-00000004",
        "weights": "ema-0.9999",
        "fid": 12.345678,
        "reference": "/home/somebody/imagenet.npz",
        "options": {"temperature": 0.9, "diffusion_steps": None},
        "samples_per_class": {"2-fold": 2},
    }
    write_json(copy / "evaluation.json", measured)
    text = card_of(copy, tmp_path / "folder")
    found = values_in(text, "Evaluation")
    assert found["fid"] == "12.35" and found["reference"] == "imagenet.npz"
    assert found["options"] == "temperature 0.9"
    assert "samples per class" not in found and "somebody" not in text
    assert "other weights" not in text
    for asked in ({"ema": "none"}, {"checkpoint": 2}):
        text = card_of(copy, tmp_path / f"other-{len(list(tmp_path.iterdir()))}", **asked)
        assert "**These numbers are of other weights than this folder's**" in text
        assert "of ema-0.9999 of step-00000004" in text


def test_broken_records_are_named(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "evaluation.json").write_text("{")
    with pytest.raises(ValueError, match="evaluation.json cannot be read.*mend or remove it"):
        card_of(copy, tmp_path / "folder")
    (copy / "evaluation.json").unlink()
    (copy / "metrics.jsonl").write_text("?\n" + (copy / "metrics.jsonl").read_text())
    with pytest.raises(ValueError, match="metrics.jsonl:1 is not a record"):
        card_of(copy, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_run_that_has_logged_nothing_has_no_figures(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "metrics.jsonl").unlink()
    assert "## Figures" not in card_of(copy, tmp_path / "folder")


def test_the_front_matter_is_yaml(run, tmp_path):
    yaml = pytest.importorskip("yaml")
    text = card_of(run, tmp_path / "folder")
    _, front, body = text.split("---\n", 2)
    found = yaml.safe_load(front)
    assert found["library_name"] == "heptapod_fast"
    assert "heptapod" in found["tags"] and all(isinstance(tag, str) for tag in found["tags"])
    assert "license" not in found  # nobody has said which
    assert body.lstrip().startswith("# heptapod tiny on logograms\n")


def test_it_says_what_it_is_and_how_it_was_trained(run, tmp_path):
    text = card_of(run, tmp_path / "folder")
    assert "Weights: `ema-0.9999` of `step-00000004`, after 32 training images." in text
    assert "2 classes: `0 2-fold, 1 3-fold`" in text
    assert "12 x 12 pixels" in text and "3 x 3 tokens (`patch-vq`, one of 16 codes each)" in text
    assert "There are none here: they were left out (--no-samples)." in text
    command = re.search(r"python tools/train.py --size tiny --system heptapod (.*)", text)[1]
    assert "--images 32" in command and "--out" not in command
    found = values_in(text, "Training")
    assert found["images"] == "32 of 32" and found["batch"] == "8"
    assert found["learning rate"] == show(json.loads(config_text(run))["recipe"]["lr_per_256"] / 32)


def config_text(run) -> str:
    """config.json of a run."""
    return (run / "config.json").read_text()


def test_the_code_in_it_runs(run, tmp_path):
    text = card_of(run, tmp_path / "folder")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    names = {}
    exec(code.replace("FOLDER", str(tmp_path / "folder")), names)
    assert names["images"].shape == (2, 3, 12, 12)


@pytest.mark.parametrize(
    "name, line", [("a|b", "a/b"), ("`x`", "'x'"), ("two\nlines", "two lines"), ("\udcff", "\\xff")]
)
def test_names_do_not_break_the_page(name, line):
    assert plain(name) == line
    plain(name).encode()
