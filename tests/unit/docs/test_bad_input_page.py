"""docs/bad_input.md: every row is a test's, and every case that it must speak of stands in it.

That the words are those of the code is held where they are produced: tests/integration/bad_input reads them off the
page.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "bad_input.md").read_text(encoding="utf-8")
TESTS = "\n".join(
    path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests/integration/bad_input").glob("test_*.py"))
)
ROWS = re.findall(r"^\| \*\*(.+?)\*\*", PAGE, re.MULTILINE)


def test_no_row_stands_twice_and_each_has_its_words() -> None:
    assert len(ROWS) == len(set(ROWS)) >= 20
    assert len(re.findall(r"^\| \*\*.+?\*\* \| .+ \| ``? ?.+? ?``? \|$", PAGE, re.MULTILINE)) == len(ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_a_test_produces_the_words_of_the_row(row: str) -> None:
    assert f'"{row}"' in TESTS


@pytest.mark.parametrize(
    "case",
    [
        "worker absent",
        "endpoint",
        "protocol of another version",
        "no labels",
        "all labels ignored",
        "a tokenizer that cannot be serialised",
        "labels of another shape",
        "NaN everywhere",
        "empty generations",
        "unnamed groups",
        "Groups added",
        "no gradients",
        "Modules frozen",
        "a journal that cannot be written",
        "a live wandb.run",
        "never comes",
    ],
)
def test_the_case_stands_on_the_page(case: str) -> None:
    assert case in PAGE
