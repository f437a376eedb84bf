"""Tables of a folder of benchmark results, and the few rows and the chart of the project's README.

Results are JSON files as pytest-benchmark writes them. `headlines.json` beside them names which of
their rows the README shows and which its chart draws; the figures come from the files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from heptapod_fast.progress import speed
from heptapod_fast.reports.charts import save_bars
from heptapod_fast.reports.compared import compared_parts, save_compared_chart
from heptapod_fast.reports.growth import FILES as OF_GROWTH
from heptapod_fast.reports.growth import MADE_HERE as GROWTH_MADE_HERE
from heptapod_fast.reports.growth import PAGE as GROWTH_PAGE
from heptapod_fast.reports.growth import report_growth
from heptapod_fast.reports.tables import show, table

HEADLINES = "headlines.json"
# Files beside the results that are none: what to show of them, what kernels/offline.py keeps, and
# what reports/cost.py and bench/dense_cost.py have modelled.
NO_RESULTS = (HEADLINES, "offline.json", "modelled-cost.json", "dense-cost.json")
# How a page begins that may be overwritten.
MADE_HERE = "# Measured\n\nMade by `python tools/report.py"
BENCH_PAGE = f"""{MADE_HERE} bench/results` from the JSON files here. Single operations on CPU
are at toy shapes and show that the benchmarks work; `ours` is then what runs by default there: C++
for adamw_ema, global_norm and philox, chunks for linear_cross_entropy with many codes, else the
reference.
"""
MARKS = ("<!-- bench:begin -->", "<!-- bench:end -->")
TABLE_MARKS = ("<!-- table:{} -->", "<!-- end:{} -->")
CHART = Path("docs/images/measured.png")
# What the names of our own candidates in a chart begin with.
OURS = "ours"


def report_bench(folder: Path, root: Path) -> list[Path]:
    """A page in FOLDER with one table per results file; for ROOT/bench/results also what
    ROOT/README.md shows of them.

    The page is README.md in ROOT/bench/results, and measured.md in any other folder, whose README
    is somebody else's. Files of bench/growth.py have growth.md beside it.

    Returns:
        The files written.

    Raises:
        ValueError: a file that is no result, or a headline that none of them has.
        FileExistsError: there is a page of that name that was not made here.
    """
    files = [path for path in sorted(folder.glob("*.json")) if path.name not in NO_RESULTS]
    if not files:
        raise ValueError(f"{folder} holds no JSON results: run make bench first")
    is_projects = folder.resolve() == (root / "bench" / "results").resolve()
    page = folder / ("README.md" if is_projects else "measured.md")
    _refuse_foreign_page(page, MADE_HERE)
    _refuse_foreign_page(folder / GROWTH_PAGE, GROWTH_MADE_HERE)
    of_growth = report_growth(folder)
    parts = [BENCH_PAGE]
    if of_growth:
        parts.append(f"How the time of a step grows has [a page of its own]({GROWTH_PAGE}).")
    parts += [bench_table(path) for path in files if not path.match(OF_GROWTH)]
    parts += runs_table(folder / "runs")
    parts += evaluations_table(folder / "evaluations")
    page.write_text("\n\n".join(parts) + "\n")
    written = [page, *of_growth]
    readme = root / "README.md"
    if is_projects and (folder / HEADLINES).exists() and MARKS[0] in readme.read_text():
        before, rest = readme.read_text().split(MARKS[0])
        _, after = rest.split(MARKS[1])
        readme.write_text(f"{before}{MARKS[0]}\n{headlines(folder, root)}\n{MARKS[1]}{after}")
        written += [readme, root / CHART]
    if is_projects and (folder / HEADLINES).exists():
        written += fill_tables(folder, root)
    return written


def _refuse_foreign_page(page: Path, made_here: str) -> None:
    """FileExistsError unless the page is missing or begins as those made here do."""
    if page.exists() and not page.read_text().startswith(made_here):
        raise FileExistsError(
            f"{page} was not made by tools/report.py, which would overwrite it: move it away, or "
            "copy the results to a folder of their own"
        )


def read_results(path: Path) -> dict[str, Any]:
    """One file of pytest-benchmark. ValueError names a file that is none."""
    data = json.loads(path.read_text())
    if not isinstance(data, dict) or "benchmarks" not in data:
        raise ValueError(f"{path} is not a result of pytest-benchmark")
    return data


def machine_of(data: dict[str, Any]) -> str:
    """Where and when the results of a file were measured."""
    machine = data.get("machine_info", {})
    device = machine.get("device", "unknown device")
    versions = f"Python {machine.get('python_version', '?')}, torch {machine.get('torch', '?')}"
    return f"{device}, {versions}; {data.get('datetime', '')[:10]}"


def bench_table(path: Path) -> str:
    """Markdown of one file. ValueError names a file that is none."""
    data = read_results(path)
    command = data.get("machine_info", {}).get("command", "pytest bench/")
    rows = []
    for benchmark in data["benchmarks"]:
        stats = benchmark["stats"]
        notes = [f"{name} {show(value)}" for name, value in benchmark["extra_info"].items()]
        quartiles = f"{1e3 * stats['q1']:.3f} to {1e3 * stats['q3']:.3f}"
        rows.append(
            (benchmark["name"], f"{1e3 * stats['median']:.3f}", quartiles, ", ".join(notes))
        )
    head = ["benchmark", "median ms", "quartiles", "notes"]
    title = f"**{path.stem}**: {machine_of(data)}; `{command}`"
    return f"{title}\n\n{table(head, rows, numbers=[1])}"


def runs_table(folder: Path) -> list[str]:
    """One table of the training runs whose report.json was copied into `folder`; [] without any."""
    rows = []
    for file, run in _reports_in(folder).items():
        name = (
            f"{run['system']} {run['size']}, {run['data']} {run['image_size']} px, "
            f"{run['tokenizer']}"
        )
        seconds = run.get("training_seconds")
        evaluation = run.get("evaluation", {})
        rate = speed(run["images_per_second_median"])
        if "images_per_second_of_phases" in run:
            phases = run["images_per_second_of_phases"].items()
            rate = ", ".join(f"{phase}: {speed(value)}" for phase, value in phases)
        rows.append(
            (
                file,
                name,
                run.get("settings"),
                run["images"],
                None if seconds is None else round(seconds),
                rate,
                run["loss"],
                evaluation.get("symmetry_accuracy"),
                evaluation.get("samples_per_second"),
                f"{run['device']}, torch {run['torch']}",
            )
        )
    if not rows:
        return []
    head = ["file", "run", "beside the defaults", "images", "seconds of steps", "images/s, median"]
    head += ["loss", "symmetry accuracy", "samples/s", "device"]
    title = (
        "**Training runs** (`report.json` of each in `bench/results/runs`, after `tools/train.py`, "
        "`tools/evaluate.py --count 400` and `tools/report.py`)"
    )
    return [f"{title}\n\n{table(head, rows, numbers=[3, 4, 5, 6, 7, 8])}"]


def evaluations_table(folder: Path) -> list[str]:
    """One table of the evaluations (`--out` of tools/evaluate.py) in `folder`; [] without any."""
    rows = []
    for file, found in _reports_in(folder).items():
        if "options" not in found:
            continue  # nothing was drawn
        options = {name: value for name, value in found["options"].items() if value is not None}
        rows.append(
            (
                file,
                f"{found['system']} {found['size']}, {found['images_seen']:,} images",
                options,
                found["samples"],
                found["samples_per_second"],
                found.get("symmetry_accuracy"),
                f"{found['device']}, torch {found['torch']}",
            )
        )
    if not rows:
        return []
    head = ["file", "run", "drawn with", "samples", "samples/s", "symmetry accuracy", "device"]
    title = "**Samples of one run** (`tools/evaluate.py RUN_DIR --out` of each)"
    return [f"{title}\n\n{table(head, rows, numbers=[3, 4, 5])}"]


def _reports_in(folder: Path) -> dict[str, dict[str, Any]]:
    """What the JSON files of a folder say, by their names without ending."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


# -------------------------------------------------------------------------------------- README.md


def headlines(folder: Path, root: Path) -> str:
    """What ROOT/README.md shows of the results in `folder`: a few rows and a chart."""
    chosen = json.loads((folder / HEADLINES).read_text())
    rows = [_headline(folder, row) for row in chosen["rows"]]
    chart = chosen["chart"]
    _draw(folder, chart, root / CHART)
    files = list(dict.fromkeys([*(row["file"] for row in chosen["rows"]), chart["file"]]))
    return "\n\n".join(
        [
            table(["what", "measured", "beside", "file"], rows),
            f"[![{chart['title']}]({CHART})](bench/results/{chart['file']})",
            *_machines(folder, files),
        ]
    )


def fill_tables(folder: Path, root: Path) -> list[Path]:
    """Write the tables that pages of ROOT show of the results, each between its marks.

    They are described in headlines.json, by name: the page, and what `_table_of` makes of it.

    Returns:
        The pages, and the charts that stand beside their tables ("chart", below the page's folder).

    Raises:
        ValueError: a page has no marks for its table.
    """
    pages = []
    for name, described in _read(folder, HEADLINES).get("tables", {}).items():
        page = root / described["page"]
        begin, end = (mark.format(name) for mark in TABLE_MARKS)
        text = page.read_text()
        if begin not in text or end not in text:
            raise ValueError(f"{page} has no place for the table {name}: {begin} and {end}")
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        found = _table_of(folder, described)
        if "chart" in described:
            chart = root / described["chart"]
            data = _read(folder, described["compared"])
            save_compared_chart(data, chart)
            found += f"\n\n![{data['title']}]({chart.relative_to(page.parent)})"
            pages.append(chart)
        page.write_text(f"{before}{begin}\n{found}\n{end}{after}")
        pages.append(page)
    return list(dict.fromkeys(pages))


def _table_of(folder: Path, described: dict[str, Any]) -> str:
    """Markdown of one table of headlines.json.

    Either cell by cell, {"head", "rows"}: a cell is a word, a number, {"file", "benchmark",
    "value"} for a figure of a file, or {"ratio": [cell, cell]} for one over another. Or a row for
    every entry of a list that a file holds, {"file", "list", "columns": {head: path in the entry}}.
    Or {"compared": a file of tools/ablate.py}, its table and what belongs to it.
    """
    if "compared" in described:
        return "\n\n".join(compared_parts(_read(folder, described["compared"])))
    if "columns" not in described:
        rows = [[_cell(folder, cell) for cell in row] for row in described["rows"]]
        return table(described["head"], rows)
    entries = _read(folder, described["file"])[described["list"]]
    columns = described["columns"]
    rows = [[_at(entry, path) for path in columns.values()] for entry in entries]
    numbers = [
        column
        for column, path in enumerate(columns.values())
        if entries and not isinstance(_at(entries[0], path), str)
    ]
    return table(list(columns), rows, numbers)


def _cell(folder: Path, cell: Any) -> Any:
    if not isinstance(cell, dict):
        return cell
    if "ratio" in cell:
        over, under = (_cell(folder, part) for part in cell["ratio"])
        return over / under
    return _value(folder, cell["file"], cell.get("benchmark", ""), cell["value"])


def _headline(folder: Path, row: dict[str, Any]) -> tuple[str, ...]:
    file = row["file"]
    value = show(_value(folder, file, row["benchmark"], row["value"]))
    beside = ""
    if "beside" in row:
        other = _value(folder, file, row.get("peer", row["benchmark"]), row["beside"])
        beside = row["beside_says"].format(show(other))
    link = f"[{file}](bench/results/{file})"
    return (row["says"], row["value_says"].format(value), beside, link)


def _machines(folder: Path, files: list[str]) -> list[str]:
    """A line for each machine: what it is, and which files are from it."""
    found: dict[str, list[str]] = {}
    for file in files:
        data = _read(folder, file)
        about = data.get("machine_info", data)  # a run's report has no part of its own for it
        machine = f"{about.get('device', 'unknown device')}, torch {about.get('torch', '?')}"
        found.setdefault(machine, []).append(file)
    if len(found) == 1:
        return [f"*Measured on {machine}.*" for machine in found]
    return [f"*{', '.join(names)}: {machine}.*" for machine, names in found.items()]


def _read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def _value(folder: Path, file: str, benchmark: str, path: str) -> Any:
    """A figure of a file: path names one of a benchmark's notes, or keys of a run's report."""
    data = _read(folder, file)
    found: Any = data
    if "benchmarks" in data:
        named = [entry for entry in data["benchmarks"] if entry["name"] == benchmark]
        if not named:
            raise ValueError(
                f"{folder / HEADLINES}: {file} has no benchmark {benchmark!r}; correct it, or "
                "measure again"
            )
        found = named[0]["extra_info"]
    return _at(found, path)


def _at(found: Any, path: str) -> Any:
    """What lies at a path of keys, "a/b"; a key may have a "/" itself ("images/s")."""
    if path in found:
        return found[path]
    for key in path.split("/"):
        found = found[int(key)] if isinstance(found, list) else found[key]
    return found


def _draw(folder: Path, chart: dict[str, Any], path: Path) -> None:
    names = list(chart["benchmarks"])
    values = [
        _value(folder, chart["file"], benchmark, chart["value"])
        for benchmark in chart["benchmarks"].values()
    ]
    save_bars(
        names,
        values,
        path,
        chart["title"],
        chart["value"],
        highlighted=[name.startswith(OURS) for name in names],
        logarithmic=True,
    )
