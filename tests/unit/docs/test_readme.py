"""The README's commands and code are real: sub-commands parse, Python compiles, links lead somewhere."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import pytest

import sidestep
from sidestep.worker.cli import build_parser

ROOT = Path(__file__).resolve().parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_every_command_of_ours_parses() -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    ours = [
        part.strip()
        for line in lines
        for part in line.split("#")[0].split("&&")
        if part.strip().startswith("sidestep ")
    ]
    assert len(ours) >= 4
    for command in ours:
        build_parser().parse_args(shlex.split(command.split(" -- ")[0])[1:])


def test_the_python_example_compiles_and_its_arguments_exist() -> None:
    (example,) = blocks("python")
    compile(example, "README.md", "exec")
    known = inspect.signature(sidestep.attach).parameters
    used = set(re.findall(r"^    (\w+)[=,]", example.split("attach(")[1].split("\n)")[0], re.MULTILINE))
    assert {"model", "optimizer", "tokenizer", "samples"} <= used <= set(known)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_states_the_overhead_that_was_measured() -> None:
    measured = (ROOT / "docs" / "overhead.md").read_text(encoding="utf-8")
    (share,) = re.findall(r"\*\*Sidestep, without generation\*\* \| \*\*([\d.]+%)\*\*", README)
    assert re.search(rf"\| Sidestep, without generation \|.*\| {re.escape(share)} \|", measured)
