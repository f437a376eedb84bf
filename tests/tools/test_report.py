"""tools/report.py: of a run, and of a folder of benchmark results."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heptapod_fast.reports.bench import CHART, MARKS, report_bench
from heptapod_fast.reports.charts import save_bars, save_line, save_time_and_rate
from heptapod_fast.reports.groups import save_groups
from heptapod_fast.reports.run import loss_points, report_run, settings_beside_the_size
from heptapod_fast.reports.tables import properties, show, table
from heptapod_fast.systems import configure
from tests.running import ROOT, command, refused, train_here

MACHINE = {"device": "CPU of the test", "python_version": "3.11", "torch": "2.13"}


def benchmark(name, rate):
    return {
        "name": name,
        "extra_info": {"samples/s": rate, "shape": [2, 3]},
        "stats": {"median": 0.0015, "q1": 0.001, "q3": 0.002},
    }


RESULT = {
    "machine_info": MACHINE,
    "datetime": "2026-01-02T03:04:05",
    "benchmarks": [benchmark("fast case", 12345.6), benchmark("slow case", 61.72)],
}
HEADLINES = {
    "rows": [
        {
            "file": "ops.json",
            "benchmark": "fast case",
            "value": "samples/s",
            "says": "Reading",
            "value_says": "{} samples/s",
            "peer": "slow case",
            "beside": "samples/s",
            "beside_says": "the slow one: {}",
        }
    ],
    "chart": {
        "file": "ops.json",
        "value": "samples/s",
        "title": "Samples per second",
        "benchmarks": {"ours, fast": "fast case", "theirs": "slow case"},
    },
}


def is_a_chart(path) -> bool:
    """An image in which something is drawn: more than paper and text in black."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    is_coloured = pixels.max(axis=2) - pixels.min(axis=2) > 60
    return min(pixels.shape[:2]) > 100 and bool(is_coloured.sum() > 200)


def test_the_picture_of_groups_and_masks(tmp_path):
    for name in ("a.png", "b.png"):
        save_groups(tmp_path / name, side=4)
    assert is_a_chart(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


# ------------------------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run that was measured and reported."""
    out = tmp_path_factory.mktemp("run")
    train_here(out, images=32)
    assert command("evaluate", out, "--count", 10).code == 0
    result = command("report", out)
    assert result.code == 0, result.err
    assert f"written: {out / 'report.md'}" in result.out
    return out


def test_a_report_has_the_figures_of_the_run(trained):
    numbers = json.loads((trained / "report.json").read_text())
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    rates = sorted(record["images_per_second"] for record in records)
    assert numbers["images"] == 32
    assert numbers["steps"] == 4
    assert numbers["loss"] == records[-1]["loss"]
    assert numbers["images_per_second_range"] == [rates[0], rates[-1]]
    assert numbers["images_per_second_median"] == pytest.approx((rates[1] + rates[2]) / 2)
    assert numbers["evaluation"]["samples"] == 10
    assert numbers["system"] == "heptapod"
    # The same settings are the same run, which is finished.
    words = shlex.split(numbers["settings"])
    assert "--width" in words and "--out" not in words
    again = command("train", "--size", "tiny", *words, "--out", trained)
    assert again.code == 0 and "is finished: 32 images" in again.out, again
    assert "mfu_median" not in numbers
    assert "images_per_second_of_phases" not in numbers  # of one phase
    seconds = [record["step_seconds"] for record in records]
    assert min(seconds) > 0
    assert numbers["training_seconds"] == pytest.approx(sum(seconds), abs=0.051)


def test_settings_are_typed_as_a_shell_takes_them():
    config = configure("tiny", data="my pictures", ema=(0.9, 0.99), flip=True, image_size=32)
    words = shlex.split(settings_beside_the_size(config))
    assert words[words.index("--data") + 1] == "my pictures"
    assert words[words.index("--ema") + 1 :][:2] == ["0.9", "0.99"]
    assert "--flip" in words and "--out" not in words
    assert settings_beside_the_size(configure("tiny")) == ""


def test_a_report_has_a_table_a_chart_and_the_evaluation(trained):
    text = (trained / "report.md").read_text()
    for part in (
        "# heptapod tiny on logograms",
        "32 of 32 images",
        "| steps | 4 |",
        "FLOPs: forward + backward",
        "![loss](loss.png)",
        "![throughput](throughput.png)",
        "| forward and backward | ",
        "n/a: no dense peak is known of ",
        "## Evaluation",
        "| symmetry accuracy |",
        "evaluation.png",
    ):
        assert part in text
    assert is_a_chart(trained / "loss.png")
    assert is_a_chart(trained / "throughput.png")


def test_the_same_records_make_the_same_files(trained):
    names = ("loss.png", "throughput.png", "report.md", "report.json")
    before = {name: (trained / name).read_bytes() for name in names}
    report_run(trained)
    assert before == {name: (trained / name).read_bytes() for name in before}


def test_records_without_a_loss_do_not_stop_a_report(tmp_path):
    train_here(tmp_path, images=32)
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"images": 40, "checkpoint_failed": "full"}\n')
        stream.write('{"images": 40, "loss": null}\n')
        stream.write('{"images": 48, "lo')
    assert command("report", tmp_path).code == 0
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert numbers["images"] == 32
    assert "Evaluation" not in (tmp_path / "report.md").read_text()


def test_one_record_makes_a_report_without_a_chart(tmp_path):
    train_here(tmp_path, images=8)
    assert command("report", tmp_path).code == 0
    assert "loss.png" not in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "loss.png").exists()
    assert is_a_chart(tmp_path / "throughput.png")  # what the time went to


def test_devices_of_all_sessions_are_named(tmp_path):
    train_here(tmp_path, images=16)
    sessions = tmp_path / "sessions.jsonl"
    first = json.loads(sessions.read_text())
    other = first | {"device": "another device"}
    sessions.write_text(json.dumps(first) + "\n" + json.dumps(other) + "\n")
    report_run(tmp_path)
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert numbers["device"] == ", ".join(sorted([first["device"], "another device"]))


def edit_records(out, edit, file="metrics.jsonl") -> None:
    """Change the records of a run in place, or its sessions."""
    path = out / file
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for number, record in enumerate(records):
        edit(number, record)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def times(step, other, data, forward_backward, optimizer, checkpoint, sampling):
    """Seconds as records have them."""
    return {f"{name}_seconds": seconds for name, seconds in locals().items()}


def as_of_two_sessions(out) -> None:
    """Two sessions on 4 devices with round numbers, the second after a failure of the first."""
    rates = [100.0, 200.0, 400.0, 400.0]

    def record_of(number, record):
        record |= times(10.0, 2.0, 1.0, 7.0, 1.5, 1.25, 0.75)
        record |= {"images_per_second": rates[number], "tflops": 8.0}
        record["memory_peak_gb"] = [1.0, 2.5, 2.0, 2.0][number]

    def session_of(number, session):
        session |= {"ranks": 4, "device": "NVIDIA H200"}
        if number == 0:
            for name in times(0, 0, 0, 0, 0, 0, 0):
                del session[name]
            session |= {"start_seconds": 3.0, "lost_seconds": 0.0}
        else:
            session |= {"start_seconds": 4.0, "lost_seconds": 5.0}
            session |= times(0.0, 3.0, 0.0, 0.0, 0.0, 2.0, 1.0)

    sessions = out / "sessions.jsonl"
    sessions.write_text(2 * sessions.read_text())
    edit_records(out, record_of)
    edit_records(out, session_of, "sessions.jsonl")


def report_of(out) -> tuple[dict, str]:
    """(report.json, report.md) of a run, made anew."""
    page = report_run(out)
    return json.loads((out / "report.json").read_text()), page.read_text()


def test_the_wall_time_of_all_sessions_is_split(tmp_path):
    train_here(tmp_path, images=32)
    as_of_two_sessions(tmp_path)
    numbers, page = report_of(tmp_path)
    assert numbers["wall_seconds_of"] == {
        "forward_backward": 28.0,
        "optimizer": 6.0,
        "data": 4.0,
        "checkpoint": 5.0 + 2.0,
        "sampling": 3.0 + 1.0,
        "restart": 3.0 + 4.0 + 5.0,
        "rest": 2.0,  # half a second of each ten is in no part of a step
    }
    assert numbers["wall_seconds"] == 4 * 12.0 + 12.0 + 3.0
    assert numbers["goodput"] == round(34 / 63, 4)
    assert numbers["images_per_second_of_wall_time"] == pytest.approx(32 / 63)
    for row in (
        "| forward and backward | 28 | 44.4% |",
        "| restart | 12 | 19.0% |",
        "| all sessions | 63 | goodput 54.0% |",
    ):
        assert row in page


def test_steps_whose_loss_is_no_number_took_time_too(tmp_path):
    train_here(tmp_path, images=32)
    as_of_two_sessions(tmp_path)
    before, _ = report_of(tmp_path)
    edit_records(tmp_path, lambda number, record: number == 1 and record.update(loss=None))
    after, _ = report_of(tmp_path)
    assert after["wall_seconds_of"] == before["wall_seconds_of"]
    assert len(after["loss_by_images"]) == 8


def test_rates_are_told_for_all_devices_and_for_one(tmp_path):
    train_here(tmp_path, images=32)
    as_of_two_sessions(tmp_path)
    numbers, page = report_of(tmp_path)
    assert numbers["memory_peak_gb"] == 2.5
    assert numbers["tokens_per_image"] == 36
    for row in (
        "| images/s | 300 | 75 |",
        "| tokens/s | 10,800 | 2,700 |",
        "| TFLOP/s | 8 | 2 |",
        "| memory peak, GB (the process, data included) | 2.5 |  |",
    ):
        assert row in page, row
    edit_records(tmp_path, lambda number, s: s.pop("processor"), "sessions.jsonl")
    assert "memory peak, GB (tensors on the GPU of rank 0)" in report_of(tmp_path)[1]


def test_sessions_on_other_numbers_of_devices_have_no_rate_per_device(tmp_path):
    train_here(tmp_path, images=32)
    as_of_two_sessions(tmp_path)
    edit_records(tmp_path, lambda number, s: s.update(ranks=1 + number), "sessions.jsonl")
    numbers, page = report_of(tmp_path)
    assert "images_per_second_per_device" not in numbers
    assert "| images/s | 300 | n/a |" in page
    assert "n/a: the sessions ran on different numbers of devices" in page


def test_mfu_names_its_peak_and_its_device(tmp_path):
    """A device whose peak nobody knows has none, whatever the records say."""
    train_here(tmp_path, images=32)
    as_of_two_sessions(tmp_path)
    edit_records(tmp_path, lambda number, record: record.update(mfu=0.4 + 0.02 * number))
    numbers, page = report_of(tmp_path)
    assert numbers["mfu_median"] == pytest.approx(0.43) and numbers["peak_tflops"] == 989.0
    assert "| MFU | 43.0% of 989 TFLOP/s, the dense bf16 peak of NVIDIA H200 |" in page
    name = "NVIDIA GeForce 256"
    edit_records(tmp_path, lambda number, s: s.update(device=name), "sessions.jsonl")
    numbers, page = report_of(tmp_path)
    assert "mfu_median" not in numbers and "peak_tflops" not in numbers
    assert f"| MFU | n/a: no dense peak is known of {name} |" in page


def test_a_projection_is_labelled_and_says_what_it_assumes(tmp_path):
    train_here(tmp_path, images=32)
    as_of_two_sessions(tmp_path)
    numbers, page = report_of(tmp_path)
    one_device = 800 * 1_281_167 / 75 / 86_400
    days = {"1": one_device, "8": one_device / 8, "64": one_device / 64}
    assert numbers["projected_days"] == pytest.approx(days)
    section = page.split("## 800 epochs of ImageNet, projected")[1].split("\n## ")[0]
    assert f"| 8 | {show(one_device / 8)} |" in section
    assert "projection, not a measurement" in section and "perfect scaling" in section


def test_the_loss_is_told_at_even_numbers_of_images(trained):
    assert loss_points(80, 80) == [10, 20, 30, 40, 50, 60, 70, 80]
    assert loss_points(80, 35) == [10, 20, 30, 35]  # the same ones while a run goes on
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    numbers = json.loads((trained / "report.json").read_text())
    expected = {str(images): records[(images - 1) // 8]["loss"] for images in range(4, 33, 4)}
    assert numbers["loss_by_images"] == expected
    assert f"| 28 | {show(records[3]['loss'])} |" in (trained / "report.md").read_text()


@pytest.mark.parametrize("file", ["metrics.jsonl", "sessions.jsonl"])
def test_runs_of_older_versions_say_what_they_can(tmp_path, file):
    """Rates and losses, and n/a for the rest."""
    train_here(tmp_path, images=16)
    new = {"metrics.jsonl": ["data_seconds", "memory_peak_gb"], "sessions.jsonl": ["lost_seconds"]}

    def as_of_an_older_version(number, record):
        for name in new[file]:
            del record[name]

    edit_records(tmp_path, as_of_an_older_version, file)
    numbers, page = report_of(tmp_path)
    assert not {"wall_seconds", "wall_seconds_of", "goodput"} & numbers.keys()
    assert ("memory_peak_gb" in numbers) == (file == "sessions.jsonl")
    assert "n/a: this run has records of an older version" in page
    assert "| images/s of wall time | n/a |" in page
    assert is_a_chart(tmp_path / "throughput.png")  # of the rate


def test_seconds_of_steps_are_those_of_all_sessions(tmp_path):
    """The clock of a session starts at zero, whatever came before it."""
    train_here(tmp_path, images=32)

    def with_clocks_of_two_sessions(number, record):
        record["step_seconds"] = 10.0 ** (number % 2)
        record["seconds"] = [20.0, 50.0, 90.0, 100.0][number]
        record["other_seconds"] = 5.0

    edit_records(tmp_path, with_clocks_of_two_sessions)
    report_run(tmp_path)
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert numbers["training_seconds"] == 22.0


def test_records_of_older_versions_leave_seconds_of_steps_out(tmp_path):
    train_here(tmp_path, images=16)

    def as_of_an_older_version(number, record):
        if number == 0:
            del record["step_seconds"]

    edit_records(tmp_path, as_of_an_older_version)
    report_run(tmp_path)
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert numbers["images"] == 16
    assert "training_seconds" not in numbers


def test_a_run_that_logged_nothing_has_no_report(tmp_path):
    train_here(tmp_path, images=16)
    (tmp_path / "metrics.jsonl").write_text("")
    refused(command("report", tmp_path), "metrics.jsonl has no record")
    (tmp_path / "metrics.jsonl").unlink()
    refused(command("report", tmp_path), "metrics.jsonl does not exist")
    refused(command("report", tmp_path / "none"), "is not a directory")


# -------------------------------------------------------------------------------------- benchmarks


@pytest.fixture
def project(tmp_path):
    """(root of a project with results and a README that shows some, its folder of results)."""
    folder = tmp_path / "bench" / "results"
    folder.mkdir(parents=True)
    (folder / "ops.json").write_text(json.dumps(RESULT))
    (folder / "headlines.json").write_text(json.dumps(HEADLINES))
    (tmp_path / "README.md").write_text(f"before\n{MARKS[0]}\nold rows\n{MARKS[1]}\nafter\n")
    return tmp_path, folder


def test_tables_are_made_of_measurements(tmp_path):
    (tmp_path / "ops.json").write_text(json.dumps(RESULT))
    result = command("report", tmp_path)
    assert result.code == 0, result.err
    assert f"written: {tmp_path / 'measured.md'}" in result.out
    text = (tmp_path / "measured.md").read_text()
    for part in (
        "**ops**: CPU of the test",
        "2026-01-02",
        "| fast case | 1.500 | 1.000 to 2.000 | samples/s 12,350, shape 2 to 3 |",
    ):
        assert part in text


def test_training_runs_have_a_table_of_their_own(tmp_path):
    (tmp_path / "ops.json").write_text(json.dumps(RESULT))
    (tmp_path / "runs").mkdir()
    train_here(tmp_path / "run", images=16)
    report_run(tmp_path / "run")
    report = (tmp_path / "run" / "report.json").read_text()
    (tmp_path / "runs" / "demo.json").write_text(report)
    report_bench(tmp_path, tmp_path / "elsewhere")
    text = (tmp_path / "measured.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| demo | ")]
    assert row.startswith("| demo | heptapod tiny, logograms 24 px, patch-vq | ")
    assert "--images 16 --batch 8" in row and "| 16 |" in row


def test_evaluations_have_a_table_of_their_own(trained, tmp_path):
    (tmp_path / "ops.json").write_text(json.dumps(RESULT))
    out = tmp_path / "evaluations" / "cold.json"
    words = ("--count", 5, "--temperature", 0.5, "--out", out)
    assert command("evaluate", trained, *words).code == 0
    report_bench(tmp_path, tmp_path / "elsewhere")
    lines = (tmp_path / "measured.md").read_text().splitlines()
    (row,) = [line for line in lines if line.startswith("| cold | ")]
    assert row.startswith("| cold | heptapod tiny, 32 images | temperature 0.5, ")
    numbers = json.loads(out.read_text())
    assert f" | 5 | {show(numbers['samples_per_second'])} | " in row


TABLES = {
    "speeds": {
        "page": "docs/page.md",
        "head": ["what", "samples/s"],
        "rows": [
            ["fast", {"file": "ops.json", "benchmark": "fast case", "value": "samples/s"}],
            ["a run", {"file": "runs/demo.json", "value": "evaluation/symmetry_accuracy"}],
            ["eight times", {"ratio": [10, {"file": "runs/demo.json", "value": "rate"}]}],
        ],
    }
}


def test_pages_show_tables_of_the_results(project):
    root, folder = project
    (folder / "headlines.json").write_text(json.dumps(HEADLINES | {"tables": TABLES}))
    (folder / "runs").mkdir()
    run = {"evaluation": {"symmetry_accuracy": 0.875}, "images_per_second_median": 1.0}
    run["rate"] = 1.25
    about = dict.fromkeys(("system", "size", "data", "image_size", "tokenizer"), "x")
    others = {"images": 8, "loss": 1.5, "device": "CPU", "torch": "2.13"}
    (folder / "runs" / "demo.json").write_text(json.dumps(run | about | others))
    page = root / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("above\n<!-- table:speeds -->\nold\n<!-- end:speeds -->\nbelow\n")
    for _ in range(2):  # made again, nothing grows or moves
        assert page in report_bench(folder, root)
        assert page.read_text() == (
            "above\n<!-- table:speeds -->\n"
            "| what | samples/s |\n|---|---|\n| fast | 12,350 |\n| a run | 0.875 |\n"
            "| eight times | 8 |\n"
            "<!-- end:speeds -->\nbelow\n"
        )
    page.write_text("no place for it\n")
    with pytest.raises(ValueError, match="page.md has no place for the table speeds"):
        report_bench(folder, root)


LISTED = {
    "listed": {
        "page": "docs/page.md",
        "file": "modelled-cost.json",
        "list": "runs",
        "columns": {"what": "name", "days, 8 GPUs": "days/8", "images": "images"},
    }
}


def test_pages_show_a_row_for_every_entry_of_a_list(project):
    root, folder = project
    (folder / "headlines.json").write_text(json.dumps(HEADLINES | {"tables": LISTED}))
    runs = [{"name": n, "days": {"8": d}, "images": 10_000} for n, d in (("a", 0.5), ("b", 2.25))]
    (folder / "modelled-cost.json").write_text(json.dumps({"runs": runs}))
    page = root / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("<!-- table:listed --><!-- end:listed -->\n")
    report_bench(folder, root)
    assert page.read_text() == (
        "<!-- table:listed -->\n| what | days, 8 GPUs | images |\n|---|---:|---:|\n"
        "| a | 0.5 | 10,000 |\n| b | 2.25 | 10,000 |\n<!-- end:listed -->\n"
    )
    assert "modelled" not in (folder / "README.md").read_text()  # no result: nobody measured it


def growth_row(sweep, name, value, times):
    notes = {
        "value": value,
        "us an image": 1e6 * times / value,
        "us an image, quartiles": [1.0, 2.0],
        "MFLOP an image": 100.0,
        "time per FLOP": times,
        "time per FLOP, quartiles": [0.9 * times, 1.1 * times],
    }
    stats = {"median": times, "q1": times, "q3": times}
    return {"name": name, "group": sweep, "extra_info": notes, "stats": stats}


GROWTH = {
    "machine_info": MACHINE | {"cores": 2, "network": {"width": 128}, "command": "python growth"},
    "datetime": "2026-01-02T03:04:05",
    "benchmarks": [
        growth_row("batch", "batch 4", 4, 1.0),
        growth_row("batch", "batch 8", 8, 0.75),
        growth_row("ranks", "1 rank", 1, 1.0),
        growth_row("ranks", "2 ranks", 2, 1.25),
    ],
}


def test_growth_has_a_page_and_a_chart(project):
    root, folder = project
    (folder / "growth-test.json").write_text(json.dumps(GROWTH))
    written = report_bench(folder, root)
    assert {folder / "growth.md", folder / "growth-test.png"} < set(written)
    text = (folder / "growth.md").read_text()
    assert "CPU of the test, 2 cores, Python 3.11, torch 2.13; 2026-01-02; `python growth`" in text
    assert "The network: width 128." in text
    assert "| batch 8 | 750 | 93,750 | 1 to 2 | 100 | 0.75 | 0.675 to 0.825 |" in text
    assert "| 2 ranks | 1,250 | 625,000 | 1 to 2 | 100 | 1.25 | 1.125 to 1.375 |" in text
    assert is_a_chart(folder / "growth-test.png")
    tables = (folder / "README.md").read_text()
    assert "](growth.md)" in tables and "growth-test" not in tables
    # Made again, nothing grows or moves; a page of somebody else's stays.
    report_bench(folder, root)
    assert (folder / "growth.md").read_text() == text
    (folder / "growth.md").write_text("mine\n")
    with pytest.raises(FileExistsError, match="growth.md was not made by"):
        report_bench(folder, root)
    assert (folder / "growth.md").read_text() == "mine\n"


def test_without_growth_there_is_no_page_of_it(project):
    root, folder = project
    report_bench(folder, root)
    assert not (folder / "growth.md").exists()
    assert "growth" not in (folder / "README.md").read_text()


def test_the_projects_readme_shows_some_rows_and_a_chart(project):
    root, folder = project
    written = report_bench(folder, root)
    assert written == [folder / "README.md", root / "README.md", root / CHART]
    text = (root / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old rows" not in text
    assert "| Reading | 12,350 samples/s | the slow one: 61.72 | " in text
    assert f"]({CHART})" in text
    assert is_a_chart(root / CHART)
    # Made again, nothing grows or moves.
    chart = (root / CHART).read_bytes()
    report_bench(folder, root)
    assert (root / "README.md").read_text() == text
    assert (root / CHART).read_bytes() == chart


def test_files_beside_the_results_are_no_results(project):
    root, folder = project
    (folder / "offline.json").write_text('{"sm_80; some kernel": {"registers": 56}}')
    report_bench(folder, root)
    assert "offline" not in (folder / "README.md").read_text()


def test_a_headline_that_no_result_has_is_named(project):
    root, folder = project
    row = HEADLINES["rows"][0] | {"benchmark": "gone"}
    (folder / "headlines.json").write_text(json.dumps(HEADLINES | {"rows": [row]}))
    before = (root / "README.md").read_text()
    with pytest.raises(ValueError, match="headlines.json: ops.json has no benchmark 'gone'"):
        report_bench(folder, root)
    assert (root / "README.md").read_text() == before


def test_a_folder_without_results_is_refused(tmp_path):
    refused(command("report", tmp_path), "no JSON results")


def test_no_path_is_refused():
    refused(command("report"), "RUN_DIR")


def test_a_file_that_is_no_result_is_named(tmp_path):
    (tmp_path / "other.json").write_text("[1]")
    refused(command("report", tmp_path), "other.json is not a result")


def test_other_folders_leave_the_projects_readme_alone(project, tmp_path):
    root, folder = project
    before = (root / "README.md").read_bytes()
    other = root / "other results"
    folder.rename(other)
    (other / "README.md").write_text("mine\n")
    for _ in range(2):  # its own page, it overwrites
        assert report_bench(other, root) == [other / "measured.md"]
    assert (other / "README.md").read_text() == "mine\n"
    assert (root / "README.md").read_bytes() == before
    assert (ROOT / "README.md").exists()


def test_a_page_that_was_not_made_here_is_not_overwritten(project, tmp_path):
    root, folder = project
    (folder / "README.md").write_text("# Measured by hand\n")
    with pytest.raises(FileExistsError, match="README.md was not made by tools/report.py"):
        report_bench(folder, root)
    assert (folder / "README.md").read_text() == "# Measured by hand\n"
    (tmp_path / "ops.json").write_text(json.dumps(RESULT))
    (tmp_path / "measured.md").write_text("mine\n")
    refused(command("report", tmp_path), "measured.md was not made by tools/report.py")
    assert (tmp_path / "measured.md").read_text() == "mine\n"


# ---------------------------------------------------------------------------------- their elements


def test_numbers_are_shown_with_the_digits_that_count():
    assert show(123467.8) == "123,500"
    assert show(9999.6) == "10,000"
    assert show(1234.4) == "1,234"
    assert show(0.000123456) == "0.0001235"
    assert show(12345) == "12,345"
    assert show([1, 2.5]) == "1 to 2.5"
    assert show(None) == ""
    assert show("text") == "text"


def test_tables_are_markdown():
    text = table(["name", "value"], [("a", 1000), ("b", None)], numbers=[1])
    assert text.splitlines() == ["| name | value |", "|---|---:|", "| a | 1,000 |", "| b |  |"]
    assert "| two words | 2 |" in properties({"two_words": 2, "left": 3}, leave_out=["left"])
    assert "left" not in properties({"two_words": 2, "left": 3}, leave_out=["left"])


def test_a_line_needs_two_points(tmp_path):
    with pytest.raises(ValueError, match="two points, got 1"):
        save_line([1], [1], tmp_path / "chart.png", "title", "x", "y")
    save_line([1, 2], [1, 2], tmp_path / "chart.png", "title", "x", "y")
    assert is_a_chart(tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as image:
        # Neither a date nor a version: equal data makes an equal file.
        assert not {"Software", "Creation Time"} & set(image.info)


@pytest.mark.parametrize("logarithmic", [True, False])
def test_bars_are_drawn(tmp_path, logarithmic):
    path = Path(tmp_path) / "new folder" / "bars.png"
    save_bars(["a", "b"], [10.0, 1.0], path, "title", "label", [True, False], logarithmic)
    assert is_a_chart(path)


def test_time_and_rate_are_drawn_as_far_as_they_are_known(tmp_path):
    path = tmp_path / "chart.png"
    assert not save_time_and_rate({}, [1], [1], path, "title")
    assert not save_time_and_rate({"work": 0.0}, [], [], path, "title")
    assert not path.exists()
    heights = []
    for seconds, points in (({"work": 3.0, "waiting": 1.0}, 3), ({"work": 1.0}, 1), ({}, 3)):
        assert save_time_and_rate(seconds, range(points), [0.0] * points, path, "title")
        assert is_a_chart(path)
        with Image.open(path) as image:
            heights.append(image.height)
    both, bar, line = heights
    assert both > line > bar


def test_properties_show_several_numbers_as_typed_and_leave_out_nothing_said():
    page = properties({"guidance": [1.0, 3.0], "rate_range": [5.0, 7.5], "diffusion_steps": None})
    assert "| guidance | 1 3 |" in page
    assert "| rate range | 5 to 7.5 |" in page
    assert "diffusion" not in page


# ------------------------------------------------------------------------------------ several runs


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """Two finished runs, the second longer and evaluated."""
    folder = tmp_path_factory.mktemp("runs")
    train_here(folder / "short", images=64)
    train_here(folder / "long", images=96, dropout=0.1)
    assert command("evaluate", folder / "long", "--count", 5).code == 0
    return folder


def test_runs_side_by_side(two_runs, tmp_path):
    out = tmp_path / "out"
    words = (two_runs / "short", two_runs / "long", "--out", out)
    result = command("report", *words)
    assert result.code == 0, result.err
    assert f"written: {out / 'runs.md'}" in result.out
    runs = json.loads((out / "runs.json").read_text())
    assert list(runs) == ["short", "long"]
    for name, report in runs.items():
        lines = (two_runs / name / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert report["images"] == records[-1]["images"]
        # Quarters of what the shorter run has seen.
        expected = {str(8 * step): records[step - 1]["loss"] for step in (2, 4, 6, 8)}
        assert report["losses"] == expected
        assert (two_runs / name / "report.md").exists()
    page = (out / "runs.md").read_text()
    head, _, short, long = [line for line in page.splitlines() if line.startswith("|")]
    assert "| loss at 16 |" in head and "| symmetry accuracy |" in head
    names = [cell.strip() for cell in head.split("|")]
    for row, name in ((short, "short"), (long, "long")):
        cells = dict(zip(names, (cell.strip() for cell in row.split("|")), strict=True))
        assert cells["MFU"] == "n/a"  # of a CPU
        assert cells["goodput"] == show(runs[name]["goodput"])
        assert cells["memory peak GB"] == show(runs[name]["memory_peak_gb"])
    assert "2-fold" not in head and "sampling seconds" not in head
    assert short.startswith("| short | heptapod tiny | ") and "--dropout 0.1" in long
    for chart in ("loss-by-images.png", "loss-by-seconds.png"):
        assert f"]({chart})" in page
        assert is_a_chart(out / chart)


def test_runs_of_one_name_and_without_seconds(two_runs, tmp_path):
    other = tmp_path / "other" / "short"
    shutil.copytree(two_runs / "short", other)
    edit_records(other, lambda number, record: record.pop("step_seconds"))
    out = tmp_path / "out"
    assert command("report", two_runs / "short", other, "--out", out).code == 0
    assert list(json.loads((out / "runs.json").read_text())) == [
        str(two_runs / "short"),
        str(other),
    ]
    assert "loss-by-seconds" not in (out / "runs.md").read_text()


def test_folders_that_are_no_runs_are_refused(two_runs, tmp_path):
    result = command("report", two_runs / "short", tmp_path, "--out", tmp_path / "out")
    refused(result, "config.json")
    assert not (tmp_path / "out").exists()
    refused(command("report", two_runs / "short", two_runs / "short"), "named twice")
