"""pytest's side of the benchmarks: a row for every contender of every case, and what a results
file says of the machine."""

import pytest

from bench import harness


def pytest_generate_tests(metafunc):
    """Rows of the functions that `harness.bench` made."""
    cases = getattr(metafunc.function, "cases", None)
    if cases is None:
        return
    listed = [
        (case, contender) for case in cases(harness.device_here()) for contender in case.contenders
    ]
    names = [harness.entry_name(case, contender) for case, contender in listed]
    metafunc.parametrize(("case", "contender"), listed, ids=names)


def pytest_collection_modifyitems(items):
    """Their clock is the one that plays what the timer measured."""
    for item in items:
        if hasattr(getattr(item, "function", None), "cases"):
            item.add_marker(pytest.mark.benchmark(timer=harness.PLAYER))


@pytest.fixture
def skip():
    """pytest.skip, for files that must load where pytest is not installed."""
    return pytest.skip


def pytest_benchmark_update_machine_info(config, machine_info):
    """What the tables of tools/report.py say about the machine, and nothing else about it."""
    machine_info.clear()
    machine_info |= harness.machine(harness.device_here())
    machine_info["command"] = " ".join(["pytest", *config.invocation_params.args])


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Keep the statistics, drop single timings: results are committed."""
    output_json["commit_info"] = {"id": output_json["commit_info"].get("id")}
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)
        entry.pop("params", None)  # objects, by their addresses
