"""Steps in, outbox entries out: what a run shows, in which order, once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from sidestep.protocol.messages import (
    Answers,
    Generation,
    Gradients,
    Hello,
    Json,
    Kind,
    LearningRates,
    Losses,
    Message,
    Notice,
    Role,
    Scalars,
    StepEnd,
    Tokens,
)
from sidestep.protocol.metric_names import FAMILIES, spec_of
from sidestep.worker.detectors.base import Detector, Observation, Verdict
from sidestep.worker.outbox import canonical
from sidestep.worker.projection import Projection, RunProjection
from sidestep.worker.records import AssembledStep, Part, RankAccount, RunContext
from sidestep.worker.settings import RunSettings
from sidestep.worker.watch_making import make_watch

EOS, A = 0, 10


class Letters:
    """Ids as letters; a tokenizer that came broken says so."""

    def __init__(self, problem: str = "") -> None:
        self.problem = problem

    def token(self, token_id: int) -> str:
        return "A" if token_id == A else f"t{token_id}"

    def text(self, ids: Sequence[int]) -> str:
        return "".join(map(self.token, ids))


def context(problem: str = "", **settings: Any) -> RunContext:
    parameter = {"name": "w", "module": 0, "param": "w", "shape": [2], "numel": 2, "offset": [0], "local_shape": [2]}
    return RunContext(
        run_id="run",
        attempt=0,
        text=Letters(problem),
        settings=settings,
        tokenizer={"eos_id": EOS, "vocabulary_size": 100, "image_token_id": 9},
        parameters={"modules": ["decoder"], "parameters": [parameter]},
        groups={"names": ["language_model"]},
        samples={"samples": [{"question": "q", "target": "t", "target_ids": [20, EOS]}] * 4},
    )


def tokens(step: int) -> Tokens:
    ids, counts = np.array([5, A, 11], np.int32), np.array([2, 3, 1], np.int64)
    return Tokens(
        step=step, microstep=0, positions=8, padding=2, answers=2, real_ids=ids, real_counts=counts,
        labelled_ids=ids[1:], labelled_counts=counts[1:], content_counts=counts[1:],
    )  # fmt: skip


def losses(step: int) -> Losses:
    roles = np.array([Role.FIRST, Role.LATER], np.uint8)
    return Losses(
        step=step, microstep=0, labelled=2, losses=np.array([2.0, 1.0], np.float32),
        target_ids=np.array([A, 11], np.int32), roles=roles, trainer_loss=np.array([1.25], np.float32),
    )  # fmt: skip


def gradients(step: int) -> Gradients:
    one = np.ones(1, np.int64)
    return Gradients(
        step=step, parameters=np.zeros(1, np.int32), counts=2 * one, nonfinite=0 * one, zeros=0 * one,
        exponents=np.zeros(1, np.int32), means=np.ones(1), m2=np.zeros(1), absmax=np.ones(1),
    )  # fmt: skip


def answers(step: int, lengths: Sequence[int] = (1, 2), epoch: int = 0, without: int = 0) -> Answers:
    return Answers(
        step=step, epoch=epoch, lengths=np.array(lengths, np.int32), counts=np.ones(len(lengths), np.int64), labelled=9,
        batches=1, batches_without_labels=without,
    )  # fmt: skip


def generation(step: int, *, collapsed: bool) -> Generation:
    outputs = [[A, EOS]] * 4 if collapsed else [[20 + i, 30 + i, EOS] for i in range(4)]
    return Generation(
        step=step, samples=np.arange(4, dtype=np.int32),
        offsets=np.array([0, *np.cumsum([len(ids) for ids in outputs])], np.int64),
        ids=np.array([i for ids in outputs for i in ids], np.int32),
    )  # fmt: skip


def assembled(number: int, *messages: Message, ends: dict[int, StepEnd] | None = None, **fields: Any) -> AssembledStep:
    parts: dict[Kind, tuple[Part, ...]] = {}
    for message in messages:
        parts[message.kind] = (*parts.get(message.kind, ()), Part(rank=0, message=message))
    said = {0: StepEnd(step=number, unix_time=1_000.0 + number, hook_seconds=0.002)} if ends is None else ends
    return AssembledStep(
        **{
            "run_id": "run", "attempt": 0, "step": number, "reason": "complete", "parts": parts, "ends": said,
            "unix_time": 1_000.0 + number, **fields,
        }
    )  # fmt: skip


def values(projection: Projection, kind: str) -> list[dict[str, Any]]:
    return [entry.value() for entry in projection.entries if entry.kind == kind]


def row(projection: Projection) -> dict[str, Any]:
    (only,) = values(projection, "row")
    return only


def lines(projection: Projection) -> list[str]:
    return [value["text"] for value in values(projection, "notice")]


def everything(step: int) -> AssembledStep:
    rates = LearningRates(step=step, rates=np.array([1e-3]))
    return assembled(
        step, tokens(step), losses(step), gradients(step), answers(step), rates, generation(step, collapsed=False)
    )


def test_all_families_of_a_step_are_one_row_and_every_name_is_in_the_table_of_metrics() -> None:
    projection = RunProjection(context()).project(everything(0))
    kinds = [entry.kind for entry in projection.entries]
    assert kinds == ["run", "row", "table", "table", "notice", "notice"]
    merged = row(projection)
    assert {key.split("/")[0] for key in merged} >= set(FAMILIES)
    assert [key for key in merged if not key.startswith("_") and spec_of(key) is None] == []
    assert merged["_timestamp"] == 1_000.0
    assert (merged["train/step"], merged["train/attempt"], merged["train/epoch"]) == (0, 0, 0)
    assert merged["sidecar/hook_ms"] == 2.0
    assert merged["gradients/decoder/w/norm"] == pytest.approx(math.sqrt(2), rel=1e-12)
    assert merged["lr/language_model"] == 1e-3
    assert [table["key"] for table in values(projection, "table")] == ["loss/highest_tokens", "generation/samples"]


def test_payloads_are_canonical_and_leave_the_numbering_to_the_journal() -> None:
    for entry in RunProjection(context()).project(everything(0)).entries:
        assert entry.payload == canonical(entry.value())
        assert entry.row_number is None


def test_the_run_entry_comes_first_and_once() -> None:
    hello = Hello(
        project="p", name="n", tags=("a",), run_config={"lr": math.inf, "blob": b"123", "nested": [{"x": 1}]},
        environment={"git_commit": "abc"},
    )  # fmt: skip
    projection = RunProjection(context(max_new_tokens=5), hello)
    (run,) = values(projection.project(assembled(0)), "run")
    assert run == {
        "run_id": "run",
        "project": "p",
        "entity": "",
        "name": "n",
        "tags": ["a"],
        "config": {"lr": "inf", "blob": "<3 bytes>", "nested": [{"x": 1}]},
        "environment": {"git_commit": "abc"},
        "settings": {"max_new_tokens": 5},
    }
    assert projection.project(assembled(1)).entries == ()
    assert [entry.kind for entry in RunProjection(context()).finish(1, "killed").entries] == ["run", "finish"]


def test_a_step_with_nothing_to_say_has_no_row() -> None:
    projection = RunProjection(context())
    assert values(projection.project(assembled(3)), "row") == []
    assert values(projection.project(assembled(4, answers(4))), "row") == [], "counted, not yet due"
    assert row(projection.project(assembled(50, answers(50))))["data/answer_length_mean"] == 1.5


def test_data_is_due_by_its_interval_and_counts_the_steps_between() -> None:
    projection = RunProjection(context(answer_length_interval=3))
    rows = [values(projection.project(assembled(step, answers(step, [step + 1]))), "row") for step in range(4)]
    assert [len(found) for found in rows] == [1, 0, 0, 1]
    assert rows[3][0]["data/answer_length_mean_epoch_0"] == 2.5


def test_late_answers_count_at_the_next_close() -> None:
    projection = RunProjection(context(answer_length_interval=2))
    projection.project(assembled(0, answers(0, [4])))
    late = Part(rank=1, message=answers(0, [8]))
    merged = row(projection.project(assembled(2, answers(2, [6]), late_parts=(late,))))
    assert merged["data/answer_length_mean"] == 6.0
    assert merged["sidecar/late_parts"] == 1


def test_a_new_attempt_goes_on_from_what_was_known_before_its_first_step() -> None:
    projection, earlier = [RunProjection(context(answer_length_interval=1)) for _ in range(2)]
    for step in range(6):
        projection.project(assembled(step, answers(step, [step + 1], without=1)))
        if step < 2:
            earlier.project(assembled(step, answers(step, [step + 1], without=1)))
    projection.adopt(context(answer_length_interval=1))
    said = projection.go_back(earlier, Notice(text="too far", code="rewound:1"))
    assert lines(said) == ["too far"]
    merged = row(projection.project(assembled(2, answers(2, [9]), attempt=1)))
    assert merged["train/attempt"] == 1
    assert merged["data/answer_length_mean"] == (1 + 2 + 9) / 3
    assert merged["data/batches_without_labels"] == 6, "what was found and said is not taken back"


def test_what_is_left_of_an_attempt_that_was_followed_is_counted_where_it_is_not_repeated() -> None:
    projection = RunProjection(context(answer_length_interval=1, collapse_detection_interval=1))
    projection.project(assembled(5, answers(5, [4])))
    projection.project(assembled(6, answers(6, [6]), attempt=1))
    late = tuple(Part(rank=0, message=answers(number, [8])) for number in (5, 6))
    tail = assembled(5, ends={}, reason="tail", ranks_seen=0, late_parts=late)
    counted = row(projection.project(tail))
    assert (counted["sidecar/late_parts"], counted["train/attempt"], counted["train/step"]) == (2, 0, 5)
    merged = row(projection.project(assembled(7, answers(7, [2]), attempt=1)))
    assert merged["data/answer_length_mean"] == (4 + 6 + 8 + 2) / 4


class Ring:
    """A detector with a large state: the last rows of a signal, in pieces of 64."""

    name = "ring"

    def __init__(self) -> None:
        self.rows = np.zeros((1_024, 128))
        self.at = 0
        self.touched = [0] * 16
        self.encoded: list[str] = []

    def observe(self, observation: Observation) -> Verdict:
        self.rows[self.at % 1_024] = observation.step
        self.touched[self.at % 1_024 // 64] += 1
        self.at += 1
        return Verdict()

    def begin(self, attempt: int, step: int) -> None:
        """Keep all."""

    def state(self) -> Json:
        return {"at": self.at}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.at = state["at"]

    def revisions(self) -> Mapping[str, int]:
        return {str(piece): revision for piece, revision in enumerate(self.touched)}

    def piece(self, name: str) -> Json:
        self.encoded.append(name)
        return self.rows[int(name) * 64 : int(name) * 64 + 64].tobytes()

    def restore_piece(self, name: str, value: Any) -> None:
        self.rows[int(name) * 64 : int(name) * 64 + 64] = np.frombuffer(value).reshape(64, 128)


def test_of_a_large_state_a_step_encodes_and_stores_only_what_it_touched() -> None:
    ring = Ring()
    assert isinstance(ring, Detector)
    projection = RunProjection(context(), detectors=[ring])
    stored = projection.changed_pieces()
    assert sum(map(len, stored.values())) > 1_000_000
    projection.project(assembled(0))
    stored.update(projection.changed_pieces())
    for number in range(1, 100):
        ring.encoded.clear()
        projection.project(assembled(number))
        changed = projection.changed_pieces()
        assert ring.encoded == [str(number // 64)]
        assert changed.keys() == {"run", "watch", "detector/ring", f"detector/ring/{number // 64}"}
        stored.update(changed)
    again = Ring()
    continued = RunProjection(context(), detectors=[again])
    continued.restore_pieces(stored)
    assert np.array_equal(again.rows, ring.rows)
    assert continued.state() == projection.state()
    assert continued.changed_pieces() == {}
    continued.go_back(RunProjection(context(), detectors=[Ring()]))
    assert len(continued.changed_pieces()) == len(stored), "another state stands there: all of it is written again"


def test_a_skipped_step_says_so_and_has_no_gradients() -> None:
    skipped = {0: StepEnd(step=100, unix_time=1.0, applied=False)}
    merged = row(RunProjection(context()).project(assembled(100, gradients(100), ends=skipped)))
    assert merged["train/skipped"] == 1
    assert not [key for key in merged if key.startswith("gradients/")]


def test_missing_ranks_and_drops_are_shown_when_they_change() -> None:
    projection = RunProjection(context())
    ends = {0: StepEnd(step=1, unix_time=1.0, dropped={"tokens": 2})}
    first = row(projection.project(assembled(1, ends=ends, ranks_expected=2, ranks_seen=1, reason="deadline")))
    assert (first["sidecar/ranks_seen"], first["sidecar/dropped/tokens"]) == (1, 2)
    second = projection.project(assembled(2))
    assert values(second, "row") == [], "nothing new"
    kinds = {"losses": (9, 4, 1), "tokens": (9, 0, 0)}
    third = row(projection.project(assembled(3, accounts={0: RankAccount(kinds=kinds)})))
    assert third["sidecar/dropped/losses"] == 4
    assert third["sidecar/dropped/tokens"] == 2
    assert third["sidecar/refused/losses"] == third["sidecar/refused"] == 1


def test_a_tail_without_ends_counts_late_parts_and_keeps_the_time() -> None:
    projection = RunProjection(context())
    projection.project(assembled(5))
    late = (Part(rank=0, message=losses(4)), Part(rank=0, message=Scalars(step=4, values={"val_loss": 0.5})))
    tail = assembled(5, ends={}, reason="tail", ranks_seen=0, unix_time=0.0, late_parts=late)
    counted, logged = values(projection.project(tail), "row")
    assert counted["sidecar/late_parts"] == 1
    assert counted["_timestamp"] == 1_005.0
    assert "sidecar/ranks_seen" not in counted
    assert (logged["val_loss"], logged["train/step"]) == (0.5, 4)


def test_what_is_logged_under_a_step_that_is_over_is_not_late() -> None:
    projection = RunProjection(context())
    projection.project(assembled(5))
    logged = Part(rank=0, message=Scalars(step=5, values={"held_out": 0.9}))
    (only,) = values(projection.project(assembled(6, late_parts=(logged,))), "row")
    assert (only["held_out"], only["train/step"]) == (0.9, 5)
    assert "sidecar/late_parts" not in only


def test_logged_scalars_join_the_row_with_their_own_axis() -> None:
    logged = Scalars(
        step=25, values={"val_loss": 0.5, "ok": True, "note": "x", "deep": {"a": 1}}, step_key="epoch_n", key_step=3
    )
    merged = row(RunProjection(context()).project(assembled(25, tokens(25), logged)))
    assert (merged["val_loss"], merged["ok"], merged["note"], merged["deep.a"], merged["epoch_n"]) == (
        0.5,
        1,
        "x",
        1,
        3,
    )
    assert merged["_axes"] == dict.fromkeys(("val_loss", "ok", "note", "deep.a"), "epoch_n")
    assert merged["tokens/total_tokens"] == 8


def test_nothing_that_was_logged_is_overwritten() -> None:
    steps = [Scalars(step=1, values={"loss": v}, step_key="n", key_step=n) for n, v in ((1, 5.0), (2, 4.0), (2, 4.0))]
    rows = values(RunProjection(context()).project(assembled(1, *steps)), "row")
    assert [(found["n"], found["loss"], found["train/step"]) for found in rows] == [
        (1, 5.0, 1),
        (2, 4.0, 1),
        (2, 4.0, 1),
    ]
    clash = Scalars(step=25, values={"tokens/total_tokens": -1})
    ours, theirs = values(RunProjection(context()).project(assembled(25, tokens(25), clash)), "row")
    assert (ours["tokens/total_tokens"], theirs["tokens/total_tokens"]) == (8, -1)


def test_scalars_that_a_row_cannot_hold_are_counted() -> None:
    bad = {
        "a": math.nan,
        "b": math.inf,
        "c": None,
        "d": [1],
        "train/step": 9,
        "e": 10**400,
        "f": 2**60,
        "g": 1,
        "k" * 600: 1,
    }
    merged = row(RunProjection(context()).project(assembled(1, Scalars(step=1, values=bad))))
    assert merged["sidecar/nonfinite_scalars"] == 3
    assert merged["sidecar/scalars_left_out"] == 4
    assert (merged["f"], merged["g"], merged["train/step"]) == (float(2**60), 1, 1)


def test_of_ranks_that_log_the_same_name_the_lowest_is_shown() -> None:
    parts = tuple(Part(rank=rank, message=Scalars(step=1, values={"x": rank, f"r{rank}": rank})) for rank in (1, 0))
    merged = row(RunProjection(context()).project(assembled(1, parts={Kind.SCALARS: parts})))
    assert (merged["x"], merged["r0"], merged["r1"]) == (0, 0, 1)


LINE = "⚠️ MODEL COLLAPSE DETECTED: single_token_dominance+identical_sequences"


def test_a_collapse_is_one_line_in_both_consoles_and_one_alert() -> None:
    projection = RunProjection(context(collapse_verdict="literal"))
    projection.project(assembled(0, generation(0, collapsed=False)))
    found = projection.project(assembled(100, generation(100, collapsed=True)))
    assert row(found)["collapse/is_collapsed"] == 1
    assert lines(found).count(LINE) == 1
    assert [notice.text for notice in found.notices].count(LINE) == 1
    (alert,) = values(found, "alert")
    assert (alert["id"], alert["level"]) == ("run-0-100-incident:1:user_rules", "critical")
    assert alert["text"].startswith(LINE)
    again = projection.project(assembled(200, generation(200, collapsed=True)))
    assert row(again)["collapse/is_collapsed"] == 1
    assert LINE not in lines(again)
    assert values(again, "alert") == []


def test_each_generation_prints_its_average_length_and_a_line_of_key_metrics() -> None:
    projection = RunProjection(context())
    projection.project(assembled(25, losses(25)))
    found = projection.project(assembled(50, generation(50, collapsed=False)))
    assert lines(found) == [
        "step 50: average generation length 2.0 tokens (min 2, max 2)",
        "step 50 | epoch 0 | loss 1.5000 (step 25) | avg generation length 2.0",
    ]
    assert [notice.text for notice in found.notices] == lines(found)
    judged = projection.project(assembled(100, generation(100, collapsed=False)))
    assert lines(judged)[1].endswith("| unique tokens 8 | most common ratio 0.12 | collapse none")


def test_a_check_between_two_generation_rows_writes_the_collapse_family_alone() -> None:
    settings: dict[str, Any] = {"generation_eval_interval": 30, "collapse_detection_interval": 100}
    found = RunProjection(context(**settings)).project(assembled(100, generation(100, collapsed=False)))
    families = {key.split("/")[0] for key in row(found)}
    assert "collapse" in families
    assert "generation" not in families
    assert values(found, "table") == []
    only = RunProjection(context(**settings)).project(assembled(30, generation(30, collapsed=False)))
    assert {"generation"} == {key.split("/")[0] for key in row(only)} & {"generation", "collapse"}


def test_zero_labels_are_told_once_and_counted() -> None:
    projection = RunProjection(context())
    projection.project(assembled(1, answers(1, [], without=1)))
    first = RunProjection(context()).project(assembled(1, answers(1, [], without=1)))
    assert len(lines(first)) == len(first.notices) == 1
    assert "step 1 had a batch without one labelled position" in lines(first)[0]
    assert row(first)["data/batches_without_labels"] == 1
    second = projection.project(assembled(2, answers(2, [], without=3)))
    assert lines(second) == []
    assert row(second)["data/batches_without_labels"] == 4


def test_notices_of_the_trainer_go_into_the_run_once_and_not_back() -> None:
    said = (Notice(text="one", code="c", step=1), Notice(text="one", code="c", step=1), Notice(text="plain"))
    projection = RunProjection(context())
    found = projection.project(assembled(1, notices=said))
    assert lines(found) == ["one", "plain"]
    assert found.notices == ()
    assert lines(projection.project(assembled(2, notices=said))) == ["plain"]
    assert lines(projection.finish()) == ["the notice 'c' came up 3 more times"]


def test_an_unusable_tokenizer_is_told_once() -> None:
    projection = RunProjection(context(problem="no tokenizer"))
    assert lines(projection.project(assembled(0))) == ["no tokenizer"]
    assert lines(projection.project(assembled(1))) == []


def test_thresholds_that_cannot_be_used_are_told_to_the_trainer_once() -> None:
    given = {"mass_exces.threshold": 0.1, "cal_up.threshold": "high", "grad_spike.enabled": 0.0, "grad_fall.hits": 4.0}
    projection = RunProjection(context(detectors=given))
    found = projection.project(assembled(0))
    first, second = lines(found)
    assert first.startswith("HooksConfig.detectors: cal_up.threshold")
    assert second.startswith("HooksConfig.detectors: mass_exces.threshold: there is no detector 'mass_exces'")
    assert second.endswith(". The default stands")
    assert [notice.text for notice in found.notices] == [first, second]
    assert lines(projection.project(assembled(1))) == []
    watch, problems = make_watch(RunSettings.from_map({"detectors": given}))
    assert problems == (first, second)
    rules = watch._settings
    assert not rules.grad_spike.enabled
    assert rules.grad_fall.hits == 4


def test_malformed_parts_and_unknown_ids_are_visible_and_break_nothing() -> None:
    broken = Tokens(
        step=25, microstep=0, positions=1, padding=0, answers=0, real_ids=np.array([5], np.int32),
        real_counts=np.zeros(0, np.int64), labelled_ids=np.zeros(0, np.int32), labelled_counts=np.zeros(0, np.int64),
        content_counts=np.zeros(0, np.int64),
    )  # fmt: skip
    odd = Losses(
        step=25, microstep=0, labelled=1, losses=np.ones(1, np.float32), target_ids=np.array([4_000], np.int32),
        roles=np.zeros(1, np.uint8), contexts=np.zeros((7, 2), np.int32), highest=np.array([0], np.int32),
    )  # fmt: skip
    found = RunProjection(context()).project(assembled(25, broken, odd))
    merged = row(found)
    assert merged["sidecar/malformed_parts"] == 1
    assert merged["sidecar/unknown_ids"] == 1
    assert merged["loss/total"] == 1.0
    assert values(found, "table")[0]["rows"] == [["t4000", "", 1.0, 0]]
    assert len(lines(found)) == 2


def test_an_unclean_end_says_that_the_tail_is_unknown() -> None:
    projection = RunProjection(context())
    projection.project(assembled(7))
    found = projection.finish(137, "killed", attempt=0, newest_step=7, tail_unknown=True)
    none = {"sidecar/journal_rows": 0}
    assert row(found) == {"_timestamp": 1_007.0, "train/step": 7, "train/attempt": 0, "sidecar/tail_unknown": 1, **none}
    assert values(found, "finish") == [{"exit_code": 137, "reason": "killed", "attempt": 0}]
    assert found.entries[-1].kind == "finish"


@pytest.mark.parametrize("state", [b"", b"\xc1", b"\x80", b"\x81\xa7version\x02", b"\x81\xa7version\x01", b"\x01"])
def test_what_is_no_state_is_refused(state: bytes) -> None:
    with pytest.raises(ValueError, match="not a state of a projection"):
        RunProjection(context()).restore(state)
