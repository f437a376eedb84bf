"""The operation that docs/add-a-system.md adds is in the repository as the page shows it."""

import re

import pytest

from tests.running import ROOT

PAGE = (ROOT / "docs" / "add-a-system.md").read_text().split("## An operation")[1]
WHOLE = {
    "heptapod_fast/ops/swiglu.py": "python",
    "kernels/swiglu.py": "python",
    "kernels/configs/swiglu.json": "json",
    "tests/ops/test_swiglu.py": "python",
}


def block_after(title: str, kind: str = "python") -> str:
    """The first block of code after a text."""
    return re.search(rf"```{kind}\n(.*?)```", PAGE.split(title)[1], re.DOTALL).group(1)


@pytest.mark.parametrize("path", WHOLE)
def test_the_page_shows_the_files(path):
    assert (ROOT / path).read_text() == block_after(f"`{path}`", WHOLE[path])


def test_the_page_shows_the_offline_cases():
    assert (
        block_after("In `kernels/offline_cases.py`")
        in (ROOT / "kernels" / "offline_cases.py").read_text()
    )
