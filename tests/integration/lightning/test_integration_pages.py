"""The pages on Lightning and Accelerate: their code compiles, and what they name is there."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sidestep

ROOT = Path(__file__).parents[3]
PAGES = ("lightning", "accelerate")
WITHOUT_LIGHTNING = """
import sys
sys.modules["lightning"] = sys.modules["pytorch_lightning"] = None  # as import has it where there is none
import sidestep, sidestep.trainer_hooks.hooks
assert "LightningCallback" in sidestep.__all__
try:
    sidestep.LightningCallback
except ImportError as error:
    print(error)
"""


def blocks(page: str) -> list[str]:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    found = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert found
    return found


@pytest.mark.parametrize("page", PAGES)
def test_the_code_on_a_page_compiles(page: str) -> None:
    for number, block in enumerate(blocks(page)):
        compile(block, f"docs/{page}.md, block {number}", "exec")


@pytest.mark.parametrize("page", PAGES)
def test_what_the_code_passes_to_attach_is_an_argument_of_it(page: str) -> None:
    known = {*inspect.signature(sidestep.attach).parameters, "network", "read_batch"}
    calls = [node for block in blocks(page) for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    ours = [node for node in calls if ast.unparse(node.func) in {"sidestep.attach", "sidestep.LightningCallback"}]
    assert ours
    assert {keyword.arg for node in ours for keyword in node.keywords} <= known


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_an_extra_that_there_is(page: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    assert f"sidestep[{page}]" in text
    assert f"\n{page} = [\n" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_hooks_need_no_lightning_and_the_callback_says_what_to_install() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LIGHTNING], check=False, timeout=50, capture_output=True, text=True
    )
    assert done.stderr == ""
    assert done.stdout == "sidestep.LightningCallback needs lightning: pip install 'sidestep[lightning]'\n"
