"""tools/report.py on a folder of benchmark results."""

import json

from tests.running import ROOT, command, refused

RESULT = {
    "machine_info": {"device": "CPU of the test", "python_version": "3.11", "torch": "2.13"},
    "datetime": "2026-01-02T03:04:05",
    "benchmarks": [
        {
            "name": "bench_one",
            "extra_info": {"GB/s": 12.345, "shape": [2, 3]},
            "stats": {"median": 0.0015, "q1": 0.001, "q3": 0.002},
        }
    ],
}


def test_tables_are_made_of_measurements(tmp_path):
    (tmp_path / "ops.json").write_text(json.dumps(RESULT))
    result = command("report", tmp_path)
    assert result.code == 0, result.err
    text = (tmp_path / "README.md").read_text()
    for part in ("**ops**: CPU of the test", "2026-01-02", "bench_one | 1.500 | 1.000 to 2.000"):
        assert part in text


def test_a_folder_without_results_is_refused(tmp_path):
    refused(command("report", tmp_path), "no JSON results")


def test_no_path_is_refused():
    refused(command("report"), "RUN_DIR")


def test_a_file_that_is_no_result_is_named(tmp_path):
    (tmp_path / "other.json").write_text("[1]")
    refused(command("report", tmp_path), "other.json is not a result")


def test_the_short_form_leaves_single_operations_out(tmp_path):
    from heptapod_fast.reports import bench_table

    single = {**RESULT["benchmarks"][0], "name": "bench_op", "extra_info": {"us": 3.0}}
    (tmp_path / "ops.json").write_text(
        json.dumps(RESULT | {"benchmarks": [*RESULT["benchmarks"], single]})
    )
    assert "bench_op" in bench_table(tmp_path / "ops.json")
    assert "bench_op" not in bench_table(tmp_path / "ops.json", brief=True)


def test_other_folders_leave_the_projects_readme_alone(tmp_path):
    readme = ROOT / "README.md"
    before = readme.read_bytes() if readme.exists() else None
    (tmp_path / "ops.json").write_text(json.dumps(RESULT))
    assert command("report", tmp_path).code == 0
    assert (readme.read_bytes() if readme.exists() else None) == before
