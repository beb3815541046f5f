"""The watch over a run: steps in; incidents, what people are told of them, and requests to the trainer out.

Pure and deterministic, as all that a projection is made of: the same steps give the same bytes, and ``state()`` is all
that a restart needs (docs/delivery.md, section 3). It is the one door to the detectors: the projection calls
``observe`` once a step and ``begin`` at a new attempt's first one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from sidestep.protocol.messages import Json
from sidestep.worker.detectors.base import Finding
from sidestep.worker.detectors.catalogue import KINDS, DetectorKind, Severity, kind_of
from sidestep.worker.detectors.facts import OnsetFacts
from sidestep.worker.detectors.families import make_families
from sidestep.worker.detectors.persistence import Firing, Persistence
from sidestep.worker.detectors.plugins import OwnDetector, OwnDetectors
from sidestep.worker.detectors.reading import Reading
from sidestep.worker.detectors.repeats import RepeatedData
from sidestep.worker.detectors.rules import Rule
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.detectors.updates import Updates
from sidestep.worker.detectors.view import StepView
from sidestep.worker.detectors.weights import Weights
from sidestep.worker.incident_causes import cause_named
from sidestep.worker.incidents import Change, Incident, IncidentLog
from sidestep.worker.metrics.measurement import Table, Value, notice_once
from sidestep.worker.metrics.sequences import GeneratedSamples
from sidestep.worker.record_building import build_record
from sidestep.worker.records import AssembledStep, RunContext
from sidestep.worker.step_record import StepRecord
from sidestep.worker.text.incident_table import incident_table, worst_samples
from sidestep.worker.watch_verdict import (
    USER_RULES,
    Announcement,
    Policy,
    Request,
    WatchVerdict,
    announcements,
    in_words,
)

__all__ = ["Announcement", "Policy", "Request", "Watch", "WatchVerdict"]

STATE_VERSION: Final = 3
READ_VERSIONS: Final = (1, 2, STATE_VERSION)
GRACE_STEPS: Final = 100
"""Steps of an announced stage in which what compares with the past does not speak (docs/detection.md)."""
RESTART_STEPS: Final = 60
"""Steps after a rate has come back up, as in warm restarts, in which the loss may rise above what it fell to."""
RISING: Final = frozenset({"cal_up", "loss_cusum", "loss_spike", "confidence_gap"})
"""Detectors of such a rise."""
ROLLBACK_STEPS: Final = 50
"""Steps that an attempt may go back with references kept; further back they are learned anew."""
SUMS: Final = frozenset({"cal_up", "loss_cusum", "confidence_gap"})
"""Detectors whose value at half of its limit is a suspicion."""


class Watch:
    """All detectors and the incidents of one run, over all its attempts.

    Args:
        settings: thresholds.
        policy: requests to the trainer.
        detectors: those from elsewhere (``plugins.load_detectors``).

    Raises:
        ValueError: detectors from elsewhere share a name.
    """

    name = "watch"

    def __init__(
        self,
        settings: DetectorSettings | None = None,
        policy: Policy | None = None,
        detectors: Sequence[OwnDetector] = (),
    ) -> None:
        self._settings = settings or DetectorSettings()
        self._policy = policy or Policy()
        self._families = make_families(self._settings)
        self._own = OwnDetectors(detectors)
        self._persistence: dict[str, Persistence] = {}
        self._known: dict[str, tuple[DetectorKind, Rule]] = {}  # what does not change in a run, looked up once
        self._facts = OnsetFacts()
        self._incidents = IncidentLog()
        self._newest = -1
        self._grace_until = -1
        self._restart_until = -1
        self._asked_at = -1
        self._withdrawn: list[str] = []  # names of incidents that an attempt's begin took back, to be shown as 0
        self._num_open = 0  # as last written

    def observe(
        self,
        step: AssembledStep,
        context: RunContext,
        *,
        generated: GeneratedSamples | None = None,
        verdict: Mapping[str, Value] | None = None,
        findings: Sequence[Finding] = (),
    ) -> WatchVerdict:
        """Judge a closed step.

        Args:
            step: as it was assembled; the tail of an attempt is not judged.
            context: what the run's tables say.
            generated: what was generated at the step.
            verdict: values of the user's rules (``collapse/*``) where they were judged at the step.
            findings: what the user's rules say aloud at the step: told here, with the incident that it belongs to.
        """
        if step.reason == "tail":
            return WatchVerdict()
        record = build_record(step, context)
        return self.observe_record(record, context, generated=generated, verdict=verdict, findings=findings)

    def observe_record(
        self,
        record: StepRecord,
        context: RunContext,
        *,
        generated: GeneratedSamples | None = None,
        verdict: Mapping[str, Value] | None = None,
        findings: Sequence[Finding] = (),
    ) -> WatchVerdict:
        """Judge a step by its record: ``observe`` without the building of it, for replays of records."""
        if record.stage:
            self._enter_stage(record.step)
        self._newest = record.step
        view = StepView(record, context, generated)
        readings = [reading for family in self._families for reading in family.read(view)]
        own, failures = self._own.read(record)
        self._facts.take(view)
        if self._facts.has_restarted:
            self._restart_until = record.step + RESTART_STEPS
        readings += own
        spoken = self._judge(record.step, readings, context)
        spoken += self._judge_user_rules(record.step, verdict, findings)
        spoken.sort(key=lambda pair: _ORDER.get(pair[1].name, len(_ORDER)))
        suspicious = self._suspicious(readings)
        changes = self._incidents.take(
            record,
            spoken,
            facts=self._facts.around(min(firing.first_step for firing, _ in spoken)) if spoken else frozenset(),
            suspicious=suspicious,
            active={name for name, each in self._persistence.items() if each.is_active},
        )
        return WatchVerdict(
            values=self._values(changes),
            companions={"incidents/open": self._num_open},
            announcements=announcements(changes, findings, record.step),
            tables=self._tables(changes, view, context),
            requests=self._requests(record, changes, suspicious, has_samples=generated is not None),
            notices=tuple(notice_once(f"detector_failed:{text[:64]}", text, record.step) for text in failures),
            readings={reading.name: reading.value for reading in readings},
        )

    def _enter_stage(self, step: int) -> None:
        """Other data or another objective, on purpose: what was usual is so no more."""
        self._grace_until = step + GRACE_STEPS
        for family in self._families:
            family.forget()
        for name, persistence in self._persistence.items():
            if not kind_of(name).is_exact:
                persistence.forget()

    def _judge(self, step: int, readings: Sequence[Reading], context: RunContext) -> list[tuple[Firing, DetectorKind]]:
        spoken: list[tuple[Firing, DetectorKind]] = []
        seen: set[str] = set()
        for reading in readings:
            kind, rule = self._known.get(reading.name) or self._look_up(reading.name)
            is_graced = step < self._grace_until and not kind.is_exact
            is_graced = is_graced or (step < self._restart_until and reading.name in RISING)
            if not rule.enabled or is_graced or reading.name in seen:
                continue
            seen.add(reading.name)
            firing = self._kept(reading.name).take(step, reading)
            if firing is not None:
                told = replace(reading, evidence=in_words(reading, context))
                spoken.append((replace(firing, reading=told), kind))
        return spoken

    def _judge_user_rules(
        self, step: int, verdict: Mapping[str, Value] | None, findings: Sequence[Finding]
    ) -> list[tuple[Firing, DetectorKind]]:
        """The user's rules have their own arming and episodes: what they say aloud speaks here at once."""
        collapsed = (verdict or {}).get("collapse/is_collapsed")
        if collapsed is None or not self._settings.user_rules.enabled:
            return []
        detail = "; ".join(
            filter(None, (str((verdict or {}).get("collapse/collapse_reason", "")), *_details(findings)))
        )
        kept = self._kept(USER_RULES)
        is_beyond = bool(findings) or (kept.is_active and bool(collapsed))
        reading = Reading(
            name=USER_RULES, value=float(bool(collapsed)), limit=0.0, is_beyond=is_beyond, evidence=detail
        )
        firing = kept.take(step, reading)
        return [(firing, KINDS[USER_RULES])] if firing is not None else []

    def _look_up(self, name: str) -> tuple[DetectorKind, Rule]:
        found = (self._own.kind(name) or kind_of(name), self._rule(name))
        self._known[name] = found
        return found

    def _rule(self, name: str) -> Rule:
        return self._own.rule(name) or self._settings.rule(name) or Rule()

    def _kept(self, name: str) -> Persistence:
        if name not in self._persistence:
            self._persistence[name] = Persistence(self._rule(name))
        return self._persistence[name]

    def _suspicious(self, readings: Sequence[Reading]) -> frozenset[str]:
        return frozenset(
            reading.name
            for reading in readings
            if reading.is_beyond or (reading.name in SUMS and reading.value > reading.limit / 2)
        )

    def _values(self, changes: Sequence[Change]) -> dict[str, Value]:
        values: dict[str, Value] = {f"incidents/{name}": 0 for name in self._withdrawn}
        self._withdrawn = []
        for change in changes:
            if change.former_name and change.former_name != change.incident.name:
                values[f"incidents/{change.former_name}"] = 0
            if change.kind in {"opened", "worse", "closed"}:
                values[f"incidents/{change.incident.name}"] = int(change.kind != "closed")
        for incident in self._incidents.open:  # two of one name, of which one closed
            if f"incidents/{incident.name}" in values:
                values[f"incidents/{incident.name}"] = 1
        num_open = len(self._incidents.open)
        if values or num_open != self._num_open:
            values["incidents/open"] = num_open
        self._num_open = num_open
        return values

    def _tables(self, changes: Sequence[Change], view: StepView, context: RunContext) -> tuple[Table, ...]:
        """A row of each incident that opened, got worse, has another cause or closed; samples where one opened."""
        told = [change for change in changes if change.kind != "evidence"]
        if not told:
            return ()
        rows = [incident_table(change.incident, change.cause) for change in told]
        tables = [replace(rows[0], rows=tuple(row for table in rows for row in table.rows))]
        for change in told:
            samples = worst_samples(change.incident, view, context.text) if change.kind in {"opened", "worse"} else None
            tables += [samples] if samples is not None else []
        return tuple(tables)

    def _requests(
        self, record: StepRecord, changes: Sequence[Change], suspicious: frozenset[str], *, has_samples: bool
    ) -> tuple[Request, ...]:
        asked: list[Request] = []
        critical = [c.incident for c in changes if c.kind in {"opened", "worse"} and _is_critical(c.incident)]
        if critical and self._policy.on_critical:
            asked.append(Request(action=self._policy.on_critical, reason=f"incident {critical[0].name}"))
        sampled_on = sorted(suspicious & _SAMPLED_ON)
        is_quiet = self._asked_at >= 0 and record.step < self._asked_at + self._policy.sample_every_steps
        if self._policy.sample_when_suspicious and sampled_on and not has_samples and not is_quiet:
            self._asked_at = record.step
            asked.append(Request(action="sample", reason=f"{', '.join(sampled_on)} is suspicious"))
        return tuple(asked)

    def begin(self, attempt: int, step: int) -> None:  # noqa: ARG002  (the step says it all)
        """Go on at ``step``, the first one of a new attempt: what was said at it or after it is taken back.

        References are kept, so that a resumed run needs no warm-up, unless it goes back by more than
        ``ROLLBACK_STEPS``: then they are learned anew.
        """
        for family in self._families:
            if isinstance(family, RepeatedData | Updates | Weights):
                family.resume()
            if step + ROLLBACK_STEPS < self._newest:
                family.forget()
        if step <= self._newest:
            for persistence in self._persistence.values():
                persistence.withdraw(step)
            self._withdrawn += [incident.name for incident in self._incidents.withdraw(step)]
            self._asked_at = -1
            self._grace_until = self._restart_until = -1

    def follow(self, former: Watch) -> None:
        """Take the place of ``former``, which knows later steps: what it was last seen to say is taken back."""
        own = {incident.name for incident in self._incidents.open}
        later = [incident.name for incident in former._incidents.open if incident.name not in own]
        self._withdrawn = sorted({*self._withdrawn, *former._withdrawn, *later})
        self._num_open = former._num_open

    def open_rows(self) -> tuple[Table, ...]:
        """Return a table of the incidents that are still open, as they stand: for the end of a run."""
        rows = [incident_table(each, cause_named(each.cause)) for each in self._incidents.open]
        return (replace(rows[0], rows=tuple(row for table in rows for row in table.rows)),) if rows else ()

    def state(self) -> Json:
        """Return all that ``restore`` needs; equal states are equal bytes."""
        return {
            "version": STATE_VERSION,
            "families": {family.name: family.state() for family in self._families},
            "persistence": {name: each.state() for name, each in sorted(self._persistence.items())},
            "own": self._own.state(),
            "facts": self._facts.state(),
            "incidents": self._incidents.state(),
            "steps": [self._newest, self._grace_until, self._asked_at, self._num_open, self._restart_until],
            "withdrawn": self._withdrawn,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state; raises KeyError, TypeError or ValueError where it is none of this version."""
        if state["version"] not in READ_VERSIONS:
            raise ValueError(f"a state of the detectors of version {state['version']}")
        for family in self._families:
            if family.name in state["families"]:
                family.restore(state["families"][family.name])
        self._persistence = {}
        for name, saved in state["persistence"].items():
            self._kept(name).restore(saved)
        self._own.restore(state["own"])
        self._facts.restore(state["facts"])
        self._incidents.restore(state["incidents"])
        newest, grace_until, asked_at, num_open, *restart_until = map(int, state["steps"])
        self._newest, self._grace_until, self._asked_at, self._num_open = newest, grace_until, asked_at, num_open
        self._restart_until = restart_until[0] if restart_until else -1  # there is none in a state of version 2
        self._withdrawn = [str(name) for name in state["withdrawn"]]


_ORDER: Final = {name: place for place, name in enumerate(KINDS)}
_SAMPLED_ON: Final = frozenset(
    name for name, kind in KINDS.items() if kind.severity is Severity.CRITICAL and kind.nature == "self"
)


def _is_critical(incident: Incident) -> bool:
    return incident.severity is Severity.CRITICAL


def _details(findings: Sequence[Finding]) -> list[str]:
    return [finding.detail for finding in findings if finding.detail]
