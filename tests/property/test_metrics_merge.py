"""However a step is split over ranks, micro-batches and shards, its metrics are the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sidestep.protocol.messages import Answers, Gradients, Losses, Message, Role, Tokens
from sidestep.worker.metrics.answer_counts import AnswerCounts
from sidestep.worker.metrics.answers import count_answers, measure_answers
from sidestep.worker.metrics.gradients import measure_gradients
from sidestep.worker.metrics.loss import measure_loss
from sidestep.worker.metrics.tokens import measure_tokens
from sidestep.worker.records import Part, RunContext

EOS = 1
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on busy cores


class Numbers:
    """Ids as numbers."""

    def token(self, token_id: int) -> str:
        return f"t{token_id}"

    def text(self, ids: Sequence[int]) -> str:
        return " ".join(map(self.token, ids))


CONTEXT = RunContext(
    run_id="r", attempt=0, text=Numbers(), tokenizer={"eos_id": EOS, "vocabulary_size": 9, "image_token_id": 3}
)


def parts_of(messages: Sequence[Message], num_ranks: int) -> list[Part]:
    """Dealt out to ranks in turn, as the assembler orders them."""
    return sorted((Part(rank=i % num_ranks, message=m) for i, m in enumerate(messages)), key=lambda part: part.rank)


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, float):
            assert other[key] == pytest.approx(value, rel=1e-12, abs=1e-300), key
        else:
            assert other[key] == value, key


def cuts(draw: st.DrawFn, length: int) -> list[tuple[int, int]]:
    """Where a list of this length is cut into 1 to 6 pieces, empty ones included."""
    inner = sorted(draw(st.lists(st.integers(0, length), max_size=5)))
    return list(zip([0, *inner], [*inner, length], strict=True))


Rows = list[tuple[list[int], int, list[list[int]]]]


def tokens_of(rows: Rows) -> Tokens:
    """Rows of (real ids, padding, answers)."""
    real = Counter(i for ids, _, _ in rows for i in ids)
    labelled = Counter(i for _, _, answers in rows for answer in answers for i in answer)
    content = Counter(
        i
        for _, _, answers in rows
        for answer in answers
        for i in (answer[: answer.index(EOS)] if EOS in answer else answer)
    )
    padding = sum(row[1] for row in rows)
    return Tokens(
        step=0,
        microstep=0,
        positions=real.total() + padding,
        padding=padding,
        answers=sum(len(answers) for _, _, answers in rows),
        real_ids=np.array(sorted(real), np.int32),
        real_counts=np.array([real[i] for i in sorted(real)], np.int64),
        labelled_ids=np.array(sorted(labelled), np.int32),
        labelled_counts=np.array([labelled[i] for i in sorted(labelled)], np.int64),
        content_counts=np.array([content[i] for i in sorted(labelled)], np.int64),
    )


IDS = st.lists(st.integers(0, 8), max_size=6)
ROWS = st.lists(st.tuples(IDS, st.integers(0, 4), st.lists(IDS.filter(bool), max_size=3)), min_size=1, max_size=8)


@UNHURRIED
@given(data=st.data(), rows=ROWS, num_ranks=st.integers(1, 4))
def test_token_statistics_do_not_depend_on_the_split(data: st.DataObject, rows: Rows, num_ranks: int) -> None:
    pieces = [tokens_of(rows[a:b]) for a, b in data.draw(st.composite(lambda draw: cuts(draw, len(rows)))())]
    whole = measure_tokens([Part(rank=0, message=tokens_of(rows))], CONTEXT)
    split = measure_tokens(parts_of(pieces, num_ranks), CONTEXT)
    assert split.malformed_parts == 0
    same(whole.values, split.values)


LOSS = st.floats(0.0, 90.0, width=32) | st.just(float("nan")) | st.just(float("inf"))
ROLE = st.sampled_from([int(Role.FIRST), int(Role.LATER), 0])


def losses_of(tokens: Sequence[tuple[float, int]]) -> Losses:
    return Losses(
        step=0,
        microstep=0,
        labelled=len(tokens),
        losses=np.array([loss for loss, _ in tokens], np.float32),
        target_ids=np.arange(len(tokens), dtype=np.int32),
        roles=np.array([role for _, role in tokens], np.uint8),
    )


@UNHURRIED
@given(data=st.data(), tokens=st.lists(st.tuples(LOSS, ROLE), max_size=40), num_ranks=st.integers(1, 4))
@pytest.mark.parametrize("max_exact_tokens", [1_000, 0])
def test_losses_do_not_depend_on_the_split(
    max_exact_tokens: int, data: st.DataObject, tokens: list[tuple[float, int]], num_ranks: int
) -> None:
    pieces = [losses_of(tokens[a:b]) for a, b in data.draw(st.composite(lambda draw: cuts(draw, len(tokens)))())]
    whole = measure_loss([Part(rank=0, message=losses_of(tokens))], CONTEXT).values
    split = measure_loss(parts_of(pieces, num_ranks), CONTEXT, max_exact_tokens=max_exact_tokens).values
    finite = np.array([loss for loss, _ in tokens if np.isfinite(np.float32(loss))], np.float32).astype(np.float64)
    if finite.size:
        assert split["loss/total"] == pytest.approx(finite.mean(), rel=1e-12, abs=1e-300)
    else:
        assert "loss/total" not in split
    for values in (whole, split):  # one over a rounding's width of the threshold may fall on either side of it
        values.pop("loss/high_loss_token_ratio", None)
        values.pop("loss/exact", None)
        spread = values.pop("loss/std", 0.0)
        assert isinstance(spread, float)
        assert spread == pytest.approx(finite.std(ddof=1) if finite.size > 1 else 0.0, rel=1e-9, abs=1e-9)
    same(whole, split)


def gradient_part(share: NDArray[np.float64]) -> Gradients:
    exponent = int(np.frexp(np.abs(share).max(initial=0.0))[1])
    scaled = np.ldexp(share, -exponent)
    mean = float(scaled.mean()) if share.size else 0.0
    return Gradients(
        step=0,
        parameters=np.zeros(1, np.int32),
        counts=np.array([share.size], np.int64),
        nonfinite=np.zeros(1, np.int64),
        zeros=np.array([(share == 0).sum()], np.int64),
        exponents=np.array([exponent], np.int32),
        means=np.array([mean]),
        m2=np.array([float(((scaled - mean) ** 2).sum())]),
        absmax=np.array([float(np.abs(share).max(initial=0.0))]),
    )


FINITE = st.floats(-1e6, 1e6).map(lambda x: 0.0 if abs(x) < 1e-6 else x)


@UNHURRIED
@given(data=st.data(), gradient=st.lists(FINITE, min_size=2, max_size=30), mean=st.sampled_from([0.0, 1e3, -1e5]))
def test_gradients_do_not_depend_on_the_shards(data: st.DataObject, gradient: list[float], mean: float) -> None:
    whole = np.array(gradient) + mean
    pieces = data.draw(st.composite(lambda draw: cuts(draw, len(gradient)))())
    tables: dict[int, dict[str, Any]] = {}
    parts = []
    for rank, (start, end) in enumerate(pieces):
        row = {
            "name": "w",
            "module": 0,
            "param": "w",
            "numel": len(whole),
            "offset": [start],
            "local_shape": [end - start],
        }
        tables[rank] = {"modules": ["m"], "parameters": [row]}
        parts.append(Part(rank=rank, message=gradient_part(whole[start:end])))
    where = RunContext(run_id="r", attempt=0, text=Numbers(), parameters=tables[0], parameters_by_rank=tables)
    values = measure_gradients(parts, where).values
    assert "gradients/global/params_incomplete" not in values
    assert values["gradients/m/w/norm"] == pytest.approx(np.linalg.norm(whole), rel=1e-12)
    assert values["gradients/m/w/max"] == np.abs(whole).max()
    assert values["gradients/m/w/mean"] == pytest.approx(whole.mean(), rel=1e-12, abs=1e-12 * np.abs(whole).max())
    assert values["gradients/m/w/std"] == pytest.approx(
        whole.std(ddof=1), rel=1e-9, abs=1e-12 * max(1.0, float(np.abs(whole).max()))
    )
    assert values["gradients/global/zero_ratio"] == (whole == 0).sum() / whole.size


LENGTHS = st.lists(st.integers(0, 30), max_size=4)


@UNHURRIED
@given(steps=st.lists(st.lists(LENGTHS, min_size=1, max_size=3), min_size=1, max_size=12), data=st.data())
def test_every_answer_counts_once_whatever_comes_late(steps: list[list[list[int]]], data: st.DataObject) -> None:
    """Steps of ranks of lengths; at some point a new attempt follows, and all of the one before comes once more."""
    follows_at = data.draw(st.integers(0, len(steps)))
    counts, expected = AnswerCounts(), Counter[int]()

    def run(attempt: int, first: int, last: int) -> None:
        counts.begin(attempt, first)
        for number in range(first, last):
            parts = []
            for rank, lengths in enumerate(steps[number]):
                distinct, how_many = np.unique(np.array(lengths, np.int32), return_counts=True)
                message = Answers(
                    step=number, epoch=0, lengths=distinct, counts=how_many.astype(np.int64), labelled=0, batches=1
                )
                parts.append(Part(rank=rank, message=message))
            assert count_answers(parts, CONTEXT, attempt, counts).malformed_parts == 0

    run(0, 0, follows_at)
    run(1, follows_at, len(steps))
    run(0, follows_at, len(steps))
    for ranks in steps:
        expected.update(length for lengths in ranks for length in lengths)
    assert dict(counts.lengths(0)) == {n: c for n, c in expected.items() if c}
    values = measure_answers(counts, 0).values
    if expected:
        everything = np.array(list(expected.elements()), np.float64)
        assert values["data/answer_length_mean"] == pytest.approx(everything.mean(), rel=1e-12)
        if everything.size > 1:
            assert values["data/answer_length_std"] == pytest.approx(everything.std(ddof=1), rel=1e-9, abs=1e-12)
