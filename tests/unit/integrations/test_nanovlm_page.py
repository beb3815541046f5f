"""The page that a nanoVLM user follows says what the adapter has."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

from sidestep.trainer_hooks.integrations import nanovlm

PAGE = Path(__file__).resolve().parents[3] / "docs" / "nanovlm.md"


def added(number: int) -> list[str]:
    diff = re.findall(r"```diff\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[number]
    return [line[1:].strip() for line in diff.splitlines() if line.startswith("+") and not line.startswith("+++")]


def test_it_adds_five_lines_and_they_are_calls_that_exist() -> None:
    lines = added(0)
    assert len(lines) == 5
    called = []
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert isinstance(node.func.value, ast.Name)
            owner = nanovlm if node.func.value.id == "sidestep" else nanovlm.NanoVLMHooks
            names = [keyword.arg or "" for keyword in node.keywords]
            first = [] if owner is nanovlm else [None]
            given = dict.fromkeys(names)
            inspect.signature(getattr(owner, node.func.attr)).bind(*first, *[None] * len(node.args), **given)
            called.append(node.func.attr)
    assert sorted(called) == ["after_step", "attach", "before_clip", "on_batch"]


def test_its_second_part_takes_two_reads_of_every_micro_step_out() -> None:
    lines = added(1)
    assert "batch_loss = loss.detach()" in lines
    assert any(line.startswith('num_tokens = batch["attention_mask"].sum().item()') for line in lines)
