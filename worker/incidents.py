"""Incidents: what detectors say within 100 steps is one story, told once, with its likely cause.

An incident opens with the first detector that speaks; what speaks while it is fresh becomes its evidence, may make it
more severe, and may change its likely cause. It closes when all of its detectors were clean for long enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from sidestep.protocol.messages import Json
from sidestep.worker.cause import Cause
from sidestep.worker.detectors.catalogue import DetectorKind, Severity, kind_of
from sidestep.worker.detectors.persistence import Firing
from sidestep.worker.incident_causes import likely_cause
from sidestep.worker.step_record import StepRecord

GROUP_STEPS: Final = 100
"""Steps after its newest evidence in which what speaks belongs to an incident (docs/detection.md)."""
FOLLOWING_STEPS: Final = 400
"""The same for detectors that compare with the past, while the incident is critical and open: a model that has failed
goes on failing, in ways that show one after another."""
EXACT_FOLLOWING_STEPS: Final = 200
"""The same for exact checks: what they find is sooner a story of its own."""
CAUSAL_STEPS: Final = 30
"""Steps after an incident's first one in which what speaks may tell its cause: later, it is a consequence."""
EXACT_STEPS: Final = 8
"""The same for exact checks, where one of them has told it: the slowest takes five readings."""
STALE_STEPS: Final = 1_000
"""Steps without news after which an incident is closed: what judged it does not judge any more."""
MAX_OPEN: Final = 8
MAX_EVIDENCE: Final = 12
MAX_BATCHES: Final = 8
MAX_EVIDENCE_CHARACTERS: Final = 240


@dataclass(slots=True, kw_only=True)
class Evidence:
    """One detector that spoke."""

    detector: str
    step: int
    first_step: int
    value: float
    limit: float
    reference: float | None
    text: str


@dataclass(slots=True, kw_only=True)
class Incident:
    """One story."""

    number: int
    """1, 2, 3, ... within the run."""
    name: str
    """The detector that names it: the first of the most severe ones that spoke at the step at which it opened, or at
    which it became critical."""
    title: str
    severity: Severity
    is_collapse: bool
    first_step: int
    """First step at which any of its detectors was beyond."""
    opened_step: int
    newest_step: int
    cause: str
    evidence: list[Evidence] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    """Digests of the batches of its steps: what a restart may skip."""

    @property
    def detectors(self) -> list[str]:
        """Names of the detectors that spoke, in their order."""
        return [each.detector for each in self.evidence]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What became of an incident at a step."""

    incident: Incident
    kind: str
    """``opened``, ``worse`` (critical now, or a collapse), ``cause`` (another one now), ``evidence``, ``closed``."""
    cause: Cause
    former_name: str = ""
    """With ``worse``: what it was called."""


class IncidentLog:
    """The incidents of a run; pure."""

    def __init__(self) -> None:
        self._open: list[Incident] = []
        self._number = 0

    @property
    def open(self) -> Sequence[Incident]:
        """Incidents that are not over, oldest first."""
        return self._open

    def take(
        self,
        record: StepRecord,
        spoken: Sequence[tuple[Firing, DetectorKind]],
        *,
        facts: AbstractSet[str],
        suspicious: AbstractSet[str],
        active: AbstractSet[str],
    ) -> list[Change]:
        """Take in what detectors say at a step.

        Args:
            record: the step.
            spoken: each detector that speaks, with its kind, in the order of the catalogue.
            facts: what went with the first of their steps.
            suspicious: detectors that have not spoken and have a reading beyond their threshold.
            active: detectors that spoke and were not clean for long enough since.
        """
        changes: list[Change] = []
        if spoken:
            changes.append(self._attach(record, spoken, facts, suspicious))
        for incident in list(self._open):
            self._note_batch(incident, record)
            is_over = not set(incident.detectors) & active and record.step > incident.newest_step
            if is_over or record.step > incident.newest_step + STALE_STEPS or incident in self._open[:-MAX_OPEN]:
                self._open.remove(incident)
                changes.append(Change(incident=incident, kind="closed", cause=_cause_of(incident, frozenset())))
        return changes

    def _attach(
        self,
        record: StepRecord,
        spoken: Sequence[tuple[Firing, DetectorKind]],
        facts: AbstractSet[str],
        suspicious: AbstractSet[str],
    ) -> Change:
        incident = self._fitting(record.step, [kind for _, kind in spoken])
        is_new = incident is None
        naming = max(spoken, key=lambda pair: (pair[1].severity, pair[1].is_collapse))[1]
        if incident is None:
            incident = self._begin(record.step, spoken, naming)
            self._open.append(incident)
        former = (incident.name, incident.severity, incident.is_collapse, incident.cause)
        incident.newest_step = record.step
        incident.first_step = min(incident.first_step, *(firing.first_step for firing, _ in spoken))
        if is_new:
            incident.facts = sorted(facts)
        for firing, _ in spoken:
            _add_evidence(incident, firing)
        is_critical_collapse = naming.is_collapse and naming.severity is Severity.CRITICAL
        if naming.severity > incident.severity or (is_critical_collapse and not incident.is_collapse):
            incident.name, incident.title = naming.name, naming.title
        incident.severity = max(incident.severity, naming.severity)
        incident.is_collapse = incident.is_collapse or is_critical_collapse
        is_early = record.step <= incident.first_step + CAUSAL_STEPS
        cause = _cause_of(incident, suspicious if is_early else frozenset())
        incident.cause = cause.name
        if is_new:
            kind = "opened"
        elif (incident.severity, incident.is_collapse) != former[1:3]:
            kind = "worse"
        else:
            kind = "cause" if cause.name != former[3] else "evidence"
        return Change(incident=incident, kind=kind, cause=cause, former_name=former[0] if not is_new else "")

    def _begin(self, step: int, spoken: Sequence[tuple[Firing, DetectorKind]], naming: DetectorKind) -> Incident:
        self._number += 1
        return Incident(
            number=self._number,
            name=naming.name,
            title=naming.title,
            severity=naming.severity,
            is_collapse=naming.is_collapse and naming.severity is Severity.CRITICAL,
            first_step=min(firing.first_step for firing, _ in spoken),
            opened_step=step,
            newest_step=step,
            cause="unknown",
        )

    def _fitting(self, step: int, kinds: Sequence[DetectorKind]) -> Incident | None:
        """Return the newest incident that what speaks now belongs to."""
        for incident in reversed(self._open):
            age = step - incident.newest_step
            following = FOLLOWING_STEPS
            if any(kind.is_exact for kind in kinds):
                following = EXACT_FOLLOWING_STEPS
            elif all(kind.severity < Severity.CRITICAL for kind in kinds):
                following = STALE_STEPS  # a warning beside an open failure is evidence of it
            if age <= GROUP_STEPS or (incident.severity is Severity.CRITICAL and age <= following):
                return incident
        return None

    @staticmethod
    def _note_batch(incident: Incident, record: StepRecord) -> None:
        is_near = record.step - incident.opened_step < MAX_BATCHES
        if is_near and record.batch_digest and len(incident.batches) < MAX_BATCHES:
            incident.batches.append(record.batch_digest)

    def withdraw(self, step: int) -> list[Incident]:
        """Forget incidents that opened at ``step`` or after it: a new attempt begins there. Returns them."""
        gone = [incident for incident in self._open if incident.opened_step >= step]
        self._open = [incident for incident in self._open if incident.opened_step < step]
        return gone

    def state(self) -> Json:
        """Return all that ``restore`` needs."""
        return {"number": self._number, "open": [_plain(incident) for incident in self._open]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        self._number = int(state["number"])
        self._open = [_read(saved) for saved in state["open"]]


def _add_evidence(incident: Incident, firing: Firing) -> None:
    reading = firing.reading
    if reading.name in incident.detectors or len(incident.evidence) >= MAX_EVIDENCE:
        return
    text = reading.evidence[:MAX_EVIDENCE_CHARACTERS]
    if firing.never_healthy:
        text += " (it was never healthy)"
    incident.evidence.append(
        Evidence(
            detector=reading.name,
            step=firing.step,
            first_step=firing.first_step,
            value=reading.value,
            limit=reading.limit,
            reference=reading.reference,
            text=text,
        )
    )


def _cause_of(incident: Incident, suspicious: AbstractSet[str]) -> Cause:
    """What has spoken says more than what is only suspicious: that is asked where the first does not know.

    Of exact checks those tell the cause that held from the first steps on: what follows them is a consequence.
    """
    facts = frozenset(incident.facts)
    at_once = _spoken_within(incident, EXACT_STEPS)
    if any(kind_of(name).is_exact for name in at_once):
        cause = likely_cause(at_once, facts)
        if any(kind_of(name).is_exact for name in cause.any_of):
            return cause
    spoken = _spoken_within(incident, CAUSAL_STEPS)
    cause = likely_cause(spoken, facts)
    if cause.name in GENERAL_CAUSES and suspicious:
        wider = likely_cause(spoken | suspicious, facts)
        return wider if wider.name in TELLING_CAUSES else cause
    return cause


def _spoken_within(incident: Incident, num_steps: int) -> frozenset[str]:
    """Return the detectors whose first reading beyond came within so many steps of the incident's first one."""
    spoken = {each.detector for each in incident.evidence if each.first_step <= incident.first_step + num_steps}
    if incident.evidence[0].detector in RISES:
        spoken -= {"cal_down"}  # what falls after a rise recovers
    return frozenset(spoken)


RISES: Final = frozenset({"cal_up", "loss_cusum", "loss_spike", "loss_regress", "confidence_gap", "worse_than_prior"})
"""Detectors that say that the loss is higher than it was."""
GENERAL_CAUSES: Final = frozenset({"unknown", "optimisation", "labels_or_inputs_wrong", "weights_damaged"})
"""Causes that a suspicion may make more precise."""
TELLING_CAUSES: Final = frozenset(
    {
        "batch_without_labels", "padding_labelled", "image_tokens_labelled", "label_leak", "label_shift",
        "future_visible", "rows_mixed", "padding_visible", "image_unreached", "images_misplaced",
        "stop_token_missing", "answers_cut", "loader_stuck", "ranks_share_data", "data_repeats",
        "images_alike", "replicas_apart", "rate_is_zero", "projector_silent", "module_detached", "data_collapsed",
    }
)  # fmt: skip
"""Causes that a single reading beyond its threshold makes likely."""


def _plain(incident: Incident) -> Json:
    return {**asdict(incident), "severity": int(incident.severity)}


def _read(saved: Mapping[str, Any]) -> Incident:
    values = dict(saved)
    values["severity"] = Severity(values["severity"])
    values["evidence"] = [Evidence(**each) for each in values["evidence"]]
    return Incident(**values)
