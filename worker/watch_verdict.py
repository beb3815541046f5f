"""What a watch hands over: values, tables, requests, and what people are told of incidents in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sidestep.protocol.messages import Notice
from sidestep.worker.detectors.base import Finding
from sidestep.worker.detectors.facts import FACTS
from sidestep.worker.detectors.reading import Reading
from sidestep.worker.incident_text import console_block, heading
from sidestep.worker.incidents import Change
from sidestep.worker.metrics.measurement import Table, Value
from sidestep.worker.module_flags import module_names
from sidestep.worker.records import RunContext

USER_RULES = "user_rules"
"""The name under which the user's rules open an incident."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What the trainer is asked to do; whether it does is its own choice (``on_incident``)."""

    sample_when_suspicious: bool = True
    """Ask for samples when a cheap signal is suspicious: the ordinary interval may be long."""
    sample_every_steps: int = 200
    """Steps between two such requests."""
    on_critical: str = ""
    """``checkpoint`` or ``stop`` when a critical incident opens; empty: nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Something that the trainer is asked to do (``protocol.messages.Command``)."""

    action: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """What people are told of an incident."""

    code: str
    title: str
    level: str
    """``info``, ``warning`` or ``critical``."""
    line: str
    """What both consoles show, exactly, on a line of its own."""
    block: tuple[str, ...] = ()
    """The lines under it."""
    is_alert: bool = True
    """Whether it is also sent as an alert, with line and block as its text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchVerdict:
    """What a step makes the watch say."""

    values: Mapping[str, Value] = field(default_factory=dict)
    """For the step's row, which is written for them: only what changed."""
    companions: Mapping[str, Value] = field(default_factory=dict)
    """For a row that is written anyway."""
    announcements: tuple[Announcement, ...] = ()
    tables: tuple[Table, ...] = ()
    requests: tuple[Request, ...] = ()
    notices: tuple[Notice, ...] = ()
    readings: Mapping[str, float] = field(default_factory=dict)
    """Every detector's value at this step."""


def announcements(changes: Sequence[Change], findings: Sequence[Finding], step: int) -> tuple[Announcement, ...]:
    """Return what people are told of a step: each incident that opened, got worse or has another cause, then findings.

    A finding of the user's rules whose line an incident has told is not told twice.
    """
    told: list[Announcement] = []
    for change in changes:
        if change.kind in {"opened", "worse"}:
            told.append(_incident(change, findings, step))
        elif change.kind == "cause":
            told.append(_other_cause(change))
    lines = {each.line for each in told}
    told += [
        Announcement(code=each.code, title=each.title, level="critical", line=each.line, block=(f"  {each.detail}",))
        for each in findings
        if each.line not in lines
    ]
    return tuple(told)


def _other_cause(change: Change) -> Announcement:
    incident = change.incident
    return Announcement(
        code=f"incident_cause:{incident.number}:{change.cause.name}",
        title=incident.title,
        level="info",
        line=f"incident {incident.number} ({incident.name}): the likely cause is now: {change.cause.text}",
        block=(f"  what to do next: {change.cause.advice}",),
        is_alert=False,
    )


def _incident(change: Change, findings: Sequence[Finding], step: int) -> Announcement:
    incident = change.incident
    line = heading(incident.name, incident.severity, is_collapse=incident.is_collapse)
    if incident.name == USER_RULES and findings:
        line = findings[0].line
    return Announcement(
        code=f"incident:{incident.number}:{incident.name}",
        title=f"{incident.name}: {incident.title}",
        level=incident.severity.level,
        line=line,
        block=console_block(
            number=incident.number,
            title=incident.title,
            first_step=incident.first_step,
            step=step,
            evidence=[f"{each.detector}: {each.text}" for each in incident.evidence],
            cause=change.cause,
            facts=[FACTS[fact] for fact in incident.facts],
        ),
    )


def in_words(reading: Reading, context: RunContext) -> str:
    """Return a reading's evidence with the texts of token and module where it names them."""
    text = reading.evidence
    if "{token}" in text:
        shown = repr(context.text.token(reading.token)) if reading.token >= 0 else "a token"
        text = text.replace("{token}", shown)
    if "{module}" in text:
        names = module_names(context.parameters)
        is_known = 0 <= reading.module < len(names)
        text = text.replace("{module}", repr(names[reading.module]) if is_known else f"module {reading.module}")
    return text
