"""Charts of what was trained to be compared."""

import json

import pytest

from heptapod_fast.reports import bench, compared
from heptapod_fast.reports.bench import fill_tables


def row(name, images, flops, seconds, curve, **values):
    return {
        "name": name,
        "is_trained": True,
        "x": None,
        "paper": [],
        "parameters": 100,
        "flops_per_image": flops,
        "images": images,
        "seconds": seconds,
        "seeds": [0, 1],
        "values": values,
        "mean": {key: sum(found) / len(found) for key, found in values.items()},
        "deviation": {key: 0.5 for key in values},
        "curve": [dict(zip(("images", "held_out_loss"), point, strict=True)) for point in curve],
        "devices": ["a test"],
    }


def data(equal="compute", curves=True):
    one = [(100, [4.0, 2.0]), (200, [2.0, 1.0])] if curves else []
    two = [(50, [5.0, 5.0]), (100, [1.0, 0.5])] if curves else []
    return {
        "title": "Two rows",
        "equal": equal,
        "seeds": [0, 1],
        "paper_columns": [],
        "x_label": "",
        "apart": [],
        "command": "python x",
        "begun": "2026-01-02",
        "rows": [
            row("one", 200, 2e12, 20.0, one, held_out_loss=[2.0, 1.0]),
            row("two", 100, 4e12, 30.0, two, held_out_loss=[1.0, 0.5]),
        ],
    }


@pytest.fixture
def drawn(monkeypatch):
    """What was drawn, by the function that draws it."""
    found = {}
    for name in ("save_series", "save_spreads"):
        monkeypatch.setattr(
            compared, name, lambda *words, name=name, **more: found.update({name: (words, more)})
        )
    return found


@pytest.mark.parametrize(
    "equal, label, one, two",
    [
        ("images", "images", [100, 200], [50, 100]),
        ("compute", "TFLOP of training", [200, 400], [200, 400]),
        ("time", "seconds of training", [10, 20], [15, 30]),
    ],
)
def test_curves_stand_over_what_rows_have_alike(drawn, tmp_path, equal, label, one, two):
    assert compared.save_compared_chart(data(equal), tmp_path / "x.png")
    ((panels, path, x_label), _) = drawn.pop("save_series")
    assert not drawn and path == tmp_path / "x.png" and x_label == label
    lines = panels["held-out loss (less is better)"]
    assert lines == {
        "one": (pytest.approx(one), [3.0, 1.5]),
        "two": (pytest.approx(two), [5.0, 0.75]),
    }


def test_the_end_alone_is_dots(drawn, tmp_path):
    assert compared.save_compared_chart(data(curves=False), tmp_path / "x.png")
    ((values, _), more) = drawn.pop("save_spreads")
    assert not drawn and values == {"one": [2.0, 1.0], "two": [1.0, 0.5]}
    assert more["label"] == "held-out loss (less is better)" and more["x"] is None


def test_without_numbers_there_is_no_chart(drawn, tmp_path):
    empty = data()
    empty["rows"][1]["mean"] = {}
    assert not compared.save_compared_chart(empty, tmp_path / "x.png") and not drawn


def test_pages_show_a_chart_below_its_table(tmp_path):
    folder = tmp_path / "bench" / "results"
    folder.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    described = {"page": "docs/page.md", "compared": "x.json", "chart": "docs/images/x.png"}
    (folder / bench.HEADLINES).write_text(json.dumps({"tables": {"two": described}}))
    (folder / "x.json").write_text(json.dumps(data()))
    page = tmp_path / "docs" / "page.md"
    page.write_text("<!-- table:two --><!-- end:two -->\n")
    chart = tmp_path / "docs" / "images" / "x.png"
    for _ in range(2):
        assert fill_tables(folder, tmp_path) == [chart, page]
        text = page.read_text()
        assert "| one | 0.0001 M |" in text and text.count("![Two rows](images/x.png)") == 1
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_probes_and_distances_are_held_against_what_is_trivial():
    found = row("one", 1, 1.0, 1.0, [], probe_accuracy=[0.5, 0.25])
    assert compared.with_spread(found, "probe_accuracy") == "0.375 ± 0.5"
    found["mean"]["probe_accuracy_pixels"] = 0.25
    assert compared.with_spread(found, "probe_accuracy") == "0.375 ± 0.5 (pixels 0.25)"
    found["deviation"]["probe_accuracy"] = None
    assert compared.with_spread(found, "probe_accuracy") == "0.375 (pixels 0.25)"
    assert compared.with_spread(found, "attention_distance") == ""
    assert "probe_accuracy_pixels" in compared.KEYS


def test_rows_of_equal_time_say_what_an_image_takes():
    lines = compared.compared_table(data("time")).splitlines()
    assert lines[0].startswith(
        "|  | parameters | GFLOP an image | images | ms an image | seconds |"
    )
    assert lines[2].startswith("| one | 0.0001 M | 2e+03 | 200 | 100 | 20 | ")
    assert lines[3].startswith("| two | 0.0001 M | 4e+03 | 100 | 300 | 30 | ")
    assert "ms an image" not in compared.compared_table(data("compute"))


def test_time_that_was_not_equal_is_told():
    assert "Not alike: seconds of a run, one = 1: two 1.50." in compared.compared_parts(
        data("time")
    )
    assert not any("seconds" in part for part in compared.differences(data("compute")))


def test_numbers_that_rows_cannot_be_compared_by_are_left_out(drawn, tmp_path):
    apart = data() | {"apart": ["held_out_loss"]}
    assert "held-out" not in compared.compared_table(apart)
    assert not compared.save_compared_chart(apart, tmp_path / "x.png") and not drawn


def test_all_machines_are_named():
    found = data()
    found["rows"][1]["devices"] = ["another", "a test"]
    assert compared.compared_parts(found)[-1].endswith("begun 2026-01-02, a test; another.*")


def test_better_is_less_of_losses_and_distances_to_the_data():
    of_keys = {key: is_more for key, _, is_more in compared.COLUMNS}
    assert [key for key, is_more in of_keys.items() if is_more is False] == ["fid", "held_out_loss"]
    assert [key for key, is_more in of_keys.items() if is_more is None] == ["attention_distance"]
