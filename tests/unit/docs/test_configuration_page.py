"""docs/configuration.md lists every field and option, with its default."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from sidestep.trainer_hooks.config import HooksConfig
from sidestep.worker.config import WorkerConfig, environment_name, flag_name

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "configuration.md").read_text(encoding="utf-8")


def test_every_field_of_the_hooks_stands_with_its_default() -> None:
    listed = dict(re.findall(r"^\| `([a-z_]+)` \| `(.+?)` \|", PAGE, re.MULTILINE))
    defaults = HooksConfig()
    assert listed == {field.name: repr(getattr(defaults, field.name)) for field in fields(HooksConfig)}


def test_every_option_of_the_worker_stands_with_its_variable() -> None:
    listed = dict(re.findall(r"^\| `(--[a-z-]+)[^`]*` \| `(SIDESTEP_\w+)` \|", PAGE, re.MULTILINE))
    assert listed == {flag_name(field.name): environment_name(field.name) for field in fields(WorkerConfig)}
