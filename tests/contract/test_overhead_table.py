"""The README's table of what a step costs is made of the committed results that it names, and of nothing else."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.page import named_file, overhead_block, with_block

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_holds_what_the_named_results_say() -> None:
    file = named_file(README)
    content = json.loads((ROOT / file).read_text(encoding="utf-8"))
    assert with_block(README, overhead_block(file, content)) == README, (
        f"the table was edited by hand, or {file} has changed: python -m benchmarks --write-readme {file}"
    )
