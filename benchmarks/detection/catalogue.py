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
from benchmarks.detection.cases import (
    known_failures,
    known_fifth_failures,
    known_fifth_healthy,
    known_fourth_failures,
    known_fourth_healthy,
    known_healthy,
    known_second_failures,
    known_second_healthy,
    known_sixth_healthy,
    known_third_failures,
    known_third_healthy,
    provoking_data,
    provoking_losses,
    provoking_optimisers,
    tuned_healthy,
    tuned_images,
    tuned_labels,
    tuned_optimisation,
    tuned_ranks,
)

TUNED, PROVOKING, HELD_OUT = "tuned", "provoking", "held_out"
KNOWN, KNOWN_SECOND, KNOWN_THIRD, KNOWN_FOURTH = "known", "known_second", "known_third", "known_fourth"
KNOWN_FIFTH, KNOWN_SIXTH = "known_fifth", "known_sixth"
_MODULES = {
    TUNED: (tuned_healthy, tuned_labels, tuned_images, tuned_optimisation, tuned_ranks),
    KNOWN: (known_failures, known_healthy),
    KNOWN_SECOND: (known_second_failures, known_second_healthy),
    KNOWN_THIRD: (known_third_failures, known_third_healthy),
    KNOWN_FOURTH: (known_fourth_failures, known_fourth_healthy),
    KNOWN_FIFTH: (known_fifth_failures, known_fifth_healthy),
    KNOWN_SIXTH: (known_sixth_healthy,),
    PROVOKING: (provoking_optimisers, provoking_losses, provoking_data),
}
_HELD_OUT_MODULES = ("held_out_failures", "held_out_healthy")
_TWIN = "twin_"


@lru_cache(maxsize=1)
def all_cases() -> dict[str, tuple[Case, str]]:
    """Return name to case and group.

    Raises:
        ValueError: two cases share a name.
    """
    found = [(case, group) for group, modules in _MODULES.items() for module in modules for case in module.CASES]
    for name in _HELD_OUT_MODULES:
        full = f"benchmarks.detection.cases.{name}"
        if importlib.util.find_spec(full) is not None:
            found += [(case, HELD_OUT) for case in importlib.import_module(full).CASES]
    by_name = {case.name: (case, group) for case, group in found}
    if len(by_name) < len(found):
        names = [case.name for case, _ in found]
        raise ValueError(f"cases share a name: {sorted({name for name in names if names.count(name) > 1})}")
    return by_name


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
