"""What the pages name is there: files, functions and links."""

import ast
import re
import shutil
from pathlib import Path

import pytest

from heptapod_fast.reports.bench import CHART, report_bench

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "bench" / "results" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
# Placeholders of rules, and what the reader of docs/add-a-system.md makes.
NOT_YET = re.compile(r"NAME|\bbag\.py|\bswiglu\.(py|json)|test_swiglu")
SOURCE = re.compile(r"`((?:[\w-]+/)+[\w.-]+\.(?:py|cu|cuh|cpp|json|md|toml))(?::\s*([\w.]+))?`")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def find(path: str) -> Path | None:
    """A file that a page names from the root or from the package."""
    for base in (ROOT, ROOT / "heptapod_fast", ROOT / "docs"):
        if (base / path).is_file():
            return base / path
    return None


def names_in(file: Path) -> set[str]:
    """Functions, classes, methods and constants of a file: "name" and "Class.name"."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        name = getattr(node, "name", None)
        if name is None:
            continue
        found.add(name)
        if isinstance(node, ast.ClassDef):
            inner = [getattr(each, "name", None) for each in node.body]
            found |= {f"{name}.{each}" for each in inner if each}
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_functions_are_there(page):
    """`folder/file.py` and `folder/file.py: name` in backticks."""
    missing = []
    for path, name in SOURCE.findall(page.read_text()):
        if NOT_YET.search(path):
            continue
        file = find(path)
        if file is None:
            missing.append(path)
        elif name and file.suffix == ".py" and name not in names_in(file):
            missing.append(f"{path}: {name}")
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """To files of the project; addresses outside are not tried."""
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    assert missing == []


def test_every_page_is_in_the_index():
    """docs/README.md links all pages of docs/ (those of a folder through the folder's index)."""
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / link).resolve() for link in LINK.findall(index.read_text())}
    for page in (ROOT / "docs").glob("*.md"):
        assert page == index or page.resolve() in linked, page.name


def test_measured_figures_come_from_files(tmp_path):
    """The README's rows, tables in docs/ and the page of results are what tools/report.py makes of
    bench/results."""
    copy = tmp_path / "bench" / "results"
    shutil.copytree(ROOT / "bench" / "results", copy)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path / "README.md")
    written = report_bench(copy, tmp_path)
    pages = [page.relative_to(tmp_path) for page in written if page.suffix == ".md"]
    assert len(pages) > 2
    for page in pages:
        assert (tmp_path / page).read_text() == (ROOT / page).read_text(), page
    assert (tmp_path / CHART).stat().st_size > 0
