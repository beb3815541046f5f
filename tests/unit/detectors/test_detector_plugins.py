"""A researcher's own detector: a class in his own module, found by name or as an installed entry point."""

from __future__ import annotations

import ast
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.detector_traces import Task, logged, trace, watched

from sidestep.protocol.messages import Kind
from sidestep.protocol.tables import encode_table
from sidestep.worker.detectors.plugins import installed_references, load_detectors
from sidestep.worker.records import AssembledStep, Part
from sidestep.worker.watch import Watch

SOURCE = '''
from sidestep.worker.detectors.reading import Reading
from sidestep.worker.detectors.rules import Rule


class AttentionSink:
    """The attention on the first token keeps rising."""

    name = "attention_sink"
    title = "attention goes to the first token"
    severity = "critical"
    rule = Rule(hits=2, window=3)

    def __init__(self):
        self.best = 1.0

    def observe(self, record):
        value = record.logged.get("attention/first")
        if value is None:
            return None
        self.best = min(self.best, value)
        return Reading(name=self.name, value=value, limit=0.9, reference=self.best, is_beyond=value > 0.9)

    def state(self):
        return {"best": self.best}

    def restore(self, state):
        self.best = state["best"]


class Broken:
    name = "broken"

    def observe(self, record):
        raise RuntimeError("no such layer")


class WrongAnswer:
    name = "wrong_answer"

    def observe(self, record):
        return 3.0


class Unsaved:
    name = "unsaved"

    def observe(self, record):
        return None

    def state(self):
        return object()


class NeedsMore:
    name = "needs_more"

    def __init__(self, layer):
        pass


class Nameless:
    pass


class Taken:
    name = "mass_excess"

    def observe(self, record):
        return None
'''


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "lab_detectors.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "lab_detectors", raising=False)
    return "lab_detectors"


def steps(values: list[float | None]) -> list[AssembledStep]:
    found = []
    for step, value in zip(trace(Task(batch=8), len(values)), values, strict=True):
        sent = (
            {}
            if value is None
            else {Kind.SCALARS: (Part(rank=0, message=logged(step.step, {"attention/first": value})),)}
        )
        found.append(replace(step, parts={**step.parts, **sent}))
    return found


def test_a_detector_takes_at_most_25_lines() -> None:
    kind = next(node for node in ast.parse(SOURCE).body if isinstance(node, ast.ClassDef))
    assert kind.end_lineno is not None
    assert kind.end_lineno - kind.lineno + 1 <= 25


def test_it_reads_what_the_trainer_logged_and_opens_incidents_of_its_own(own_module: str) -> None:
    watch = Watch(detectors=load_detectors([f"{own_module}:AttentionSink"]))
    told = watched(steps([0.5, None, 0.95, 0.97, 0.99]), watch)
    assert told.openings == [(3, "attention_sink")]
    (announcement,) = told.verdicts[3].announcements
    assert announcement.level == "critical"
    assert "attention goes to the first token" in announcement.block[0]
    again = Watch(detectors=load_detectors([f"{own_module}:AttentionSink"]))
    again.restore(watch.state())
    assert encode_table(again.state()) == encode_table(watch.state())


def test_one_that_raises_is_told_once_and_never_ends_the_run(own_module: str) -> None:
    names = [f"{own_module}:{name}" for name in ("Broken", "WrongAnswer", "Unsaved", "AttentionSink")]
    watch = Watch(detectors=load_detectors(names))
    told = watched(steps([0.5, 0.95, 0.97]), watch)
    assert told.openings == [(2, "attention_sink")], "the others go on"
    texts = [notice.text for verdict in told.verdicts.values() for notice in verdict.notices]
    assert len(texts) == 2
    assert "'broken' raised RuntimeError: no such layer" in texts[0]
    assert "'wrong_answer' raised TypeError" in texts[1]
    failures = watch.state()["own"]["failures"]
    assert failures["broken"] == 3
    assert failures["unsaved"] == 1


def test_a_state_of_detectors_that_are_gone_is_left_alone(own_module: str) -> None:
    watch = Watch(detectors=load_detectors([f"{own_module}:AttentionSink"]))
    watched(steps([0.95, 0.97]), watch)
    Watch().restore(watch.state())


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        ("lab_detectors", "--detector lab_detectors: write package.module:Class"),
        ("lab_detectors:Missing", "lab_detectors has no Missing"),
        ("no_such_module_here:Any", "no_such_module_here cannot be imported"),
        ("lab_detectors:NeedsMore", "cannot be made without arguments"),
        ("lab_detectors:Nameless", "is no detector: it needs a text `name` and a method `observe(record)`"),
    ],
)
def test_what_cannot_be_loaded_says_why(own_module: str, reference: str, text: str) -> None:
    with pytest.raises(ValueError, match="--detector") as raised:
        load_detectors([reference])
    assert text in str(raised.value)


def test_names_are_one_s_own(own_module: str) -> None:
    with pytest.raises(ValueError, match="names of their own"):
        Watch(detectors=load_detectors([f"{own_module}:Taken"]))
    twice = load_detectors([f"{own_module}:AttentionSink"] * 2)
    with pytest.raises(ValueError, match="names of their own"):
        Watch(detectors=twice)


def test_installed_detectors_are_found_and_broken_ones_told(own_module: str, tmp_path: Path) -> None:
    """An installed distribution is a folder of metadata beside its module: this one is real, and on the path."""
    info = tmp_path / "lab_detectors-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lab-detectors\nVersion: 1.0\n", encoding="utf-8")
    points = "[sidestep.detectors]\nsink = lab_detectors:AttentionSink\nmore = lab_detectors:NeedsMore\n"
    (info / "entry_points.txt").write_text(points, encoding="utf-8")
    made, problems = installed_references()
    assert [each.name for each in made.values()] == ["attention_sink"]
    assert len(problems) == 1
    assert "more = lab_detectors:NeedsMore is left out" in problems[0]
