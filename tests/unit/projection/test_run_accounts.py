"""What a run says of its messages: summed over ranks and attempts, never falling, the same after a restart."""

from __future__ import annotations

from typing import Any

import pytest

from sidestep.protocol.messages import StepEnd
from sidestep.protocol.tables import decode_table, encode_table
from sidestep.worker.projection import RunProjection
from sidestep.worker.records import AssembledStep, RankAccount, RunContext
from sidestep.worker.run_accounts import MAX_COUNT, RunAccounts
from sidestep.worker.text.detokenizer import Detokenizer


def account(produced: int, dropped: int = 0, refused: int = 0, resent: int = 0, kind: str = "losses") -> RankAccount:
    return RankAccount(kinds={kind: (produced, dropped, refused)}, resent=resent)


def step(number: int, accounts: dict[int, RankAccount], attempt: int = 0, **fields: Any) -> AssembledStep:
    return AssembledStep(
        run_id="run", attempt=attempt, step=number, reason="complete", accounts=accounts, unix_time=1.0 + number,
        **{"num_messages": 4, **fields},
    )  # fmt: skip


def told(accounts: RunAccounts) -> dict[str, Any]:
    return {key.removeprefix("sidecar/"): value for key, value in {**accounts.figures(), **accounts.losses()}.items()}


def test_the_newest_counters_of_all_ranks_are_added_up() -> None:
    accounts = RunAccounts()
    accounts.take(step(0, {0: account(5, 1, 0, 2), 1: account(7, 0, 3)}))
    assert told(accounts) == {
        "produced": 12, "resent": 2, "refused": 3, "journal_rows": 4, "dropped/losses": 1, "refused/losses": 3,
    }  # fmt: skip
    accounts.take(step(1, {1: account(9, 2, 3, 1)}))  # the other rank is silent: what is known of it stands
    assert told(accounts) == {
        "produced": 14, "resent": 3, "refused": 3, "journal_rows": 8, "dropped/losses": 3, "refused/losses": 3,
    }  # fmt: skip


def test_an_older_message_that_comes_late_takes_nothing_back() -> None:
    accounts = RunAccounts()
    accounts.take(step(1, {0: account(9, 3)}))
    accounts.take(step(2, {0: account(5, 1)}))
    assert (told(accounts)["produced"], told(accounts)["dropped/losses"]) == (9, 3)


def test_another_attempt_goes_on_from_where_the_last_one_came() -> None:
    accounts = RunAccounts()
    accounts.take(step(1, {0: account(9, 3, 0, 4)}))
    accounts.take(step(1, {0: account(2, 1, 0, 1)}, attempt=1))
    assert told(accounts) == {"produced": 11, "resent": 5, "refused": 0, "journal_rows": 8, "dropped/losses": 4}


def test_what_nobody_said_is_absent_and_zero_is_zero() -> None:
    silent = RunAccounts()
    silent.take(step(0, {}))
    assert told(silent) == {"journal_rows": 4}
    well = RunAccounts()
    well.take(step(0, {0: account(5)}))
    assert told(well) == {"produced": 5, "resent": 0, "refused": 0, "journal_rows": 4}


def test_drops_are_taken_from_the_ends_where_there_are_no_accounts_and_not_twice_where_there_are() -> None:
    ends = {0: StepEnd(step=0, unix_time=1.0, dropped={"tokens": 2})}
    silent = RunAccounts()
    silent.take(step(0, {}, ends=ends))
    assert told(silent)["dropped/tokens"] == 2
    both = RunAccounts()
    both.take(step(0, {0: account(9, 3, kind="tokens")}, ends=ends))
    assert told(both)["dropped/tokens"] == 3


def test_counts_that_cannot_be_and_kinds_that_are_not_known_make_no_key_of_their_own() -> None:
    accounts = RunAccounts()
    accounts.take(step(0, {0: RankAccount(kinds={"a/b\n": (1, 1 << 61, 0), "of_tomorrow": (1, 2, 0)}, resent=1 << 61)}))
    assert told(accounts)["dropped/unknown"] == MAX_COUNT + 2
    assert told(accounts)["resent"] == MAX_COUNT


def make_projection() -> RunProjection:
    return RunProjection(RunContext(run_id="run", attempt=0, text=Detokenizer({})))


def rows(projection: RunProjection, each: AssembledStep) -> list[dict[str, Any]]:
    return [entry.value() for entry in projection.project(each).entries if entry.kind == "row"]


def test_a_resend_is_worth_a_row_once() -> None:
    projection = make_projection()
    assert rows(projection, step(0, {0: account(5)})) == []
    (row,) = rows(projection, step(1, {0: account(9, resent=2)}))
    assert (row["sidecar/resent"], row["sidecar/journal_rows"]) == (2, 8)
    assert rows(projection, step(2, {0: account(12, resent=2)})) == []


def test_an_unclean_end_tells_the_last_known_counters() -> None:
    projection = make_projection()
    projection.project(step(0, {0: account(9, 1, 2, 3)}))
    (row,) = [
        e.value() for e in projection.finish(1, "gone", newest_step=0, tail_unknown=True).entries if e.kind == "row"
    ]
    assert row == {
        "_timestamp": 1.0, "train/step": 0, "train/attempt": 0, "sidecar/tail_unknown": 1, "sidecar/produced": 9,
        "sidecar/dropped/losses": 1, "sidecar/refused/losses": 2, "sidecar/refused": 2, "sidecar/resent": 3,
        "sidecar/journal_rows": 4,
    }  # fmt: skip


def test_a_restart_between_any_two_steps_changes_no_byte_of_the_state() -> None:
    straight, restarted = make_projection(), make_projection()
    for number in range(6):
        each = step(number, {rank: account(number * 5, number, 0, rank) for rank in range(3)}, attempt=number // 4)
        straight.project(each)
        saved, restarted = restarted.state(), make_projection()
        if number:
            restarted.restore(saved)
        restarted.project(each)
    assert restarted.state() == straight.state()


def test_the_state_of_version_1_is_still_read() -> None:
    projection = make_projection()
    projection.project(step(3, {0: account(9)}))
    pieces = {name: decode_table(body) for name, body in projection.changed_pieces().items()}
    run, measured = pieces["run"], pieces["measured"]
    assert isinstance(run, dict)
    assert isinstance(measured, dict)
    older = {
        **{key: value for key, value in run.items() if key != "accounts"},
        **measured,
        "version": 1,
        "dropped": {"losses": 2},
        "detectors": {"user_rules": pieces["detector/user_rules"]},
    }
    continued = make_projection()
    continued.restore(encode_table(older))
    (row,) = rows(continued, step(4, {0: account(11, 2, resent=1)}))
    assert (row["sidecar/dropped/losses"], row["sidecar/resent"], row["sidecar/produced"]) == (2, 1, 11)
    assert "sidecar/journal_rows" not in row, "the messages before were not counted"


def test_what_came_over_the_wire_1_0_says_no_more_than_it_did() -> None:
    projection = make_projection()
    older: dict[str, Any] = {"num_messages": None}
    assert rows(projection, step(0, {0: account(9)}, **older)) == []
    (row,) = rows(projection, step(1, {0: account(12, 1, 2)}, **older))
    told = {key: value for key, value in row.items() if key.startswith("sidecar/")}
    assert told == {"sidecar/dropped/losses": 1, "sidecar/refused/losses": 2, "sidecar/lag_seconds": 0.0}
    (row,) = rows(projection, step(2, {0: account(15, 1, 2, resent=3)}))
    assert (row["sidecar/resent"], row["sidecar/refused"], row["sidecar/produced"]) == (3, 2, 15)
    assert "sidecar/journal_rows" not in row, "not all of the run's messages were counted"
    projection.project(step(3, {0: account(18, 1, 2)}, **older))
    (end,) = [e.value() for e in projection.finish(1, tail_unknown=True).entries if e.kind == "row"]
    assert [key for key in end if key.startswith("sidecar/")] == ["sidecar/tail_unknown"]


@pytest.mark.parametrize("state", [{}, {"attempt": 0}, {"attempt": 0, "ranks": [1], "totals": {}, "told_by_ends": {}}])
def test_what_is_no_state_of_accounts_is_refused(state: dict[str, Any]) -> None:
    projection = make_projection()
    pieces = projection.changed_pieces()
    run = decode_table(pieces["run"])
    assert isinstance(run, dict)
    with pytest.raises(ValueError, match="not a state of a projection"):
        projection.restore_pieces({**pieces, "run": encode_table({**run, "accounts": state})})
