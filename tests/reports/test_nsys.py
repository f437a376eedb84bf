"""What nsys's tables say, whether it is asked, and how its failures are told."""

import sys

import pytest

from heptapod_fast.reports import nsys
from heptapod_fast.reports.profile import Cost
from tests.fake_nsys import STATS, install

# ------------------------------------------------------------------------------------------- tables


def test_kernels_phases_and_idle_share_of_nsys_own_tables():
    found = nsys.of_stats(STATS, steps=2)
    assert found.kernels == [
        Cost("void gemm<(int)128, float>(float *, int)", 3.0, 1.0),
        Cost("layer_norm_kernel", 1.5, 0.5),
    ]
    # Kernels cover 2 to 6, 5 to 8 and 9 to 11 of 1 to 11 ms; the copy from 1 to 2 is none.
    assert found.idle == pytest.approx(0.2)
    assert found.step_ms == 5.0
    # Two calls each, which PyTorch's numbers tell apart.
    assert found.phases == {"backward": 2.5, "forward": 1.5}
    assert found.operators == [Cost("heptapod_fast::layer_norm", 1.0, 1.5)]
    assert found.on_gpu


def test_other_ranges_may_be_the_phases():
    found = nsys.of_stats(STATS, steps=1, phases=["layer_norm: forward, B, 32896 x 768"])
    assert found.phases == {"layer_norm: forward, B, 32896 x 768": 4.0}


def test_tables_are_found_by_their_columns():
    """Whatever stands before, between and in further columns."""
    text = (
        'NOTICE: something\n\nA,Name,B\n1,"x, y",2\n3,z,4\n\nProcessing [a] with [b]...\nB,C\n5,6\n'
    )
    rows = [{"A": "1", "Name": "x, y", "B": "2"}, {"A": "3", "Name": "z", "B": "4"}]
    assert nsys.read_table(text, ["Name", "A"]) == rows
    assert nsys.read_table(text, ["C"]) == [{"B": "5", "C": "6"}]
    assert nsys.read_table(text, ["D"]) == []
    assert nsys.read_table("A,B\n1,2\nNOTICE: something\n3,4", ["A"]) == [{"A": "1", "B": "2"}]
    assert nsys.read_table("A,B", ["A"]) == []
    assert nsys.read_table("", ["A"]) == []


def test_no_kernels_are_an_error_that_repeats_what_nsys_said():
    said = "SKIPPED: steps.sqlite does not contain CUDA kernel data."
    with pytest.raises(ValueError, match="no kernel.*--nsys off(.|\n)*SKIPPED: steps.sqlite"):
        nsys.of_stats(said, steps=1)
    only_copies = "\n".join(line for line in STATS.splitlines() if ",128,1,1," not in line)
    with pytest.raises(ValueError, match="no kernel"):
        nsys.of_stats(only_copies, steps=1)


def test_names_of_ranges_lose_what_tells_calls_apart():
    for text in ("forward", ":forward", ":forward, op_id = 3", "forward, seq = 4, op_id = 12"):
        assert nsys.name_of_range(text) == "forward"
    assert nsys.name_of_range(":op: case, B, 3 x 4") == "op: case, B, 3 x 4"


# ------------------------------------------------------------------------------------------ whether


@pytest.fixture
def without_nsys(monkeypatch, tmp_path):
    """A PATH on which there is nothing."""
    monkeypatch.setenv("PATH", str(tmp_path))


def test_auto_takes_nsys_where_it_is_and_there_is_a_gpu(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch)
    assert nsys.is_wanted("auto", on_gpu=True)
    assert not nsys.is_wanted("auto", on_gpu=False)
    assert not nsys.is_wanted("off", on_gpu=True)
    assert nsys.is_wanted("on", on_gpu=True)
    with pytest.raises(ValueError, match="--nsys on: .*the device is a CPU.*--device cuda"):
        nsys.is_wanted("on", on_gpu=False)


def test_without_nsys_auto_does_without_and_on_says_what_to_install(without_nsys):
    assert not nsys.is_wanted("auto", on_gpu=True)
    assert not nsys.is_wanted("off", on_gpu=True)
    with pytest.raises(ValueError, match="--nsys on: .*Install NVIDIA Nsight Systems.*--nsys off"):
        nsys.is_wanted("on", on_gpu=True)


def test_a_recorded_process_knows_it():
    assert not nsys.is_recorded({})
    assert nsys.is_recorded({"HEPTAPOD_RECORDED_BY_NSYS": "1"})
    assert nsys.is_recorded({"NSYS_PROFILING_SESSION_ID": "4711"})


# ----------------------------------------------------------------------------------------- failures


def test_a_command_that_fails_is_an_error(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch)
    command = [sys.executable, write(tmp_path, "import sys; sys.exit(3)")]
    with pytest.raises(OSError, match="nsys profile ended with code 3"):
        nsys.record(command, tmp_path / "out" / "steps.nsys-rep")


def test_a_report_that_is_missing_is_an_error_although_an_old_one_lies_there(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch)
    report = tmp_path / "steps.nsys-rep"
    report.write_text("of before")
    command = [sys.executable, write(tmp_path, "pass")]  # it begins no recording
    with pytest.raises(OSError, match="nsys wrote no .*steps.nsys-rep.*--nsys off"):
        nsys.record(command, report)


def test_stats_that_fail_say_why(tmp_path, monkeypatch):
    fake = install(tmp_path, monkeypatch)
    assert nsys.stats(tmp_path / "steps.nsys-rep").strip() == STATS.strip()
    fake.stats.unlink()
    with pytest.raises(OSError, match="nsys stats failed on .*steps.nsys-rep: ERROR: Database"):
        nsys.stats(tmp_path / "steps.nsys-rep")


def write(folder, code) -> str:
    """A script."""
    path = folder / "script.py"
    path.write_text(code)
    return str(path)
