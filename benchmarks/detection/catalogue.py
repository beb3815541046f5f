"""All cases by name, their group, and the healthy twin of a failure.

Held-out cases stand in `cases/held_out_failures.py` and `cases/held_out_healthy.py`, which whoever tunes detectors does
not read; where these files are absent, there are none. Once they have been judged they are known: they move to
`cases/known_*.py`, and the next held-out ones are written by another hand.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from functools import lru_cache

from benchmarks.detection.case import Case, Family, Twist

TUNED, PROVOKING, HELD_OUT = "tuned", "provoking", "held_out"
_BY_OTHERS = ("failures", "healthy")
_PARTS = {
    TUNED: ("healthy", "labels", "images", "optimisation", "ranks"),
    "known": _BY_OTHERS,
    "known_second": _BY_OTHERS,
    "known_third": _BY_OTHERS,
    "known_fourth": _BY_OTHERS,
    PROVOKING: ("optimisers", "losses", "data"),
    "known_fifth": _BY_OTHERS,
    "known_sixth": ("healthy",),
    HELD_OUT: _BY_OTHERS,
}
"""Group to the files `cases/GROUP_PART.py`, oldest first; what becomes known goes before the last line."""
GROUPS = tuple(_PARTS)
_TWIN = "twin_"


@lru_cache(maxsize=1)
def all_cases() -> dict[str, tuple[Case, str]]:
    """Return name to case and group.

    Raises:
        ValueError: two cases share a name.
    """
    found = [(case, group) for group in GROUPS for case in _cases_of(group)]
    by_name = {case.name: (case, group) for case, group in found}
    if len(by_name) < len(found):
        names = [case.name for case, _ in found]
        raise ValueError(f"cases share a name: {sorted({name for name in names if names.count(name) > 1})}")
    return by_name


def _cases_of(group: str) -> list[Case]:
    files = [f"benchmarks.detection.cases.{group}_{part}" for part in _PARTS[group]]
    if group == HELD_OUT:
        files = [file for file in files if importlib.util.find_spec(file) is not None]
    return [case for file in files for case in importlib.import_module(file).CASES]


def twin_of(case: Case) -> Case:
    """Return the healthy case with the same setup and nothing done to it: a listed one, else one made for it."""
    for listed, _ in all_cases().values():
        if not listed.is_failure and listed.twist is Twist and listed.setup == case.setup:
            return listed
    return Case(
        name=_TWIN + hashlib.sha256(repr(case.setup).encode()).hexdigest()[:8],
        family=Family.DATA,
        what="the same setup without the mistake",
        is_failure=False,
        setup=case.setup,
        legitimate="nothing is done to it",
    )


def find_case(name: str) -> tuple[Case, str]:
    """Return a case and its group by name, twins of failures included.

    Raises:
        KeyError: there is none of that name.
    """
    known = all_cases()
    if name in known:
        return known[name]
    for case, group in known.values():
        if case.is_failure and name.startswith(_TWIN):
            twin = twin_of(case)
            if twin.name == name:
                return twin, group
    raise KeyError(f"no case is called {name!r}")
