"""What an incident may come from: one row of the tables in ``exact_causes.py`` and ``incident_causes.py``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """One row of the table."""

    name: str
    any_of: frozenset[str]
    """One of these detectors must have spoken ..."""
    facts: frozenset[str]
    """... with all of these facts."""
    text: str
    advice: str


def cause(name: str, detectors: str, text: str, advice: str, facts: str = "") -> Cause:
    """Return a row of the table; ``detectors`` and ``facts`` are names with spaces between them."""
    return Cause(
        name=name, any_of=frozenset(detectors.split()), facts=frozenset(facts.split()), text=text, advice=advice
    )
