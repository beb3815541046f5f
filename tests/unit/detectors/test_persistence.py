from __future__ import annotations

from sidestep.worker.detectors.persistence import Firing, Persistence
from sidestep.worker.detectors.reading import Reading
from sidestep.worker.detectors.rules import Rule


def spoken(rule: Rule, pattern: str, *, start: int = 0) -> list[int]:
    """Steps at which a detector speaks; ``x`` is a reading beyond, ``.`` a clean one, a space is none."""
    kept = Persistence(rule)
    found: list[int] = []
    for step, sign in enumerate(pattern, start=start):
        if sign == " ":
            continue
        firing = kept.take(step, Reading(name="a", value=1.0, limit=0.0, is_beyond=sign == "x"))
        again = Persistence(rule)
        again.restore(kept.state())
        assert again.state() == kept.state()
        kept = again
        found += [step] if firing is not None else []
    return found


def test_it_takes_k_of_the_last_m() -> None:
    rule = Rule(hits=2, window=3)
    assert spoken(rule, "x..x.x") == [5]
    assert spoken(rule, "xx") == [1]
    assert spoken(rule, "x..x..x..x") == []
    assert spoken(rule, "x x") == [2], "steps without a reading count for nothing"


def test_it_speaks_at_a_reading_that_is_beyond() -> None:
    assert spoken(Rule(hits=2, window=4, rearm=1, cool_steps=0), "xx..xx") == [1, 4]


def test_it_speaks_once_until_it_was_clean_for_long_enough() -> None:
    rule = Rule(rearm=3, cool_steps=0)
    assert spoken(rule, "xxxx..x..xxx...x") == [0, 15]


def test_it_is_quiet_while_it_cools_down() -> None:
    rule = Rule(rearm=1, cool_steps=6)
    assert spoken(rule, "x.x.x.x.x") == [0, 6]


def test_it_speaks_only_after_it_was_healthy_once() -> None:
    rule = Rule(armed=3, rearm=1, cool_steps=0)
    assert spoken(rule, "xx.x..x...x") == [10]


def test_what_was_never_healthy_is_said_once_at_the_deadline() -> None:
    rule = Rule(armed=3, deadline=5, rearm=1, cool_steps=0)
    assert spoken(rule, "xxxxxxx.x.x...x") == [4, 14]
    kept = Persistence(rule)
    firings = [kept.take(step, Reading(name="a", value=1.0, limit=0.0, is_beyond=True)) for step in range(6)]
    assert [each.never_healthy for each in firings if isinstance(each, Firing)] == [True]


def test_the_first_of_the_readings_that_made_it_speak_is_told() -> None:
    kept = Persistence(Rule(hits=3, window=4))
    firings = [
        kept.take(step, Reading(name="a", value=1.0, limit=0.0, is_beyond=is_beyond))
        for step, is_beyond in enumerate([False, True, False, True, True])
    ]
    assert firings[4] is not None
    assert (firings[4].first_step, firings[4].step) == (1, 4)


def test_what_was_said_after_the_step_gone_back_to_may_be_said_again() -> None:
    kept = Persistence(Rule())
    beyond = Reading(name="a", value=1.0, limit=0.0, is_beyond=True)
    assert kept.take(10, beyond) is not None
    kept.withdraw(11)
    assert kept.take(11, beyond) is None, "step 10 stands"
    kept.withdraw(10)
    assert kept.take(10, beyond) is not None
