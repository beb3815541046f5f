"""``tokens/*`` against a plain count of raw ids, labels and masks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sidestep.protocol.messages import Tokens
from sidestep.worker.metrics.tokens import measure_tokens
from sidestep.worker.records import Part, RunContext

EOS, PAD, IMAGE, NEWLINE = 2, 2, 9, 7
VOCABULARY = 50


class Letters:
    """Ids as letters."""

    def token(self, token_id: int) -> str:
        return chr(ord("A") + token_id - 10)

    def text(self, ids: Sequence[int]) -> str:
        return "".join(map(self.token, ids))


def context(**table: Any) -> RunContext:
    known = {"eos_id": EOS, "pad_id": PAD, "vocabulary_size": VOCABULARY, "image_token_id": IMAGE, **table}
    return RunContext(run_id="r", attempt=0, text=Letters(), tokenizer=known)


def answers_of(targets: Sequence[int | None]) -> list[list[int]]:
    """Maximal runs of labelled positions; None is no label."""
    runs: list[list[int]] = [[]]
    for target in targets:
        if target is None:
            runs.append([])
        else:
            runs[-1].append(target)
    return [run for run in runs if run]


def content_of(run: Sequence[int]) -> list[int]:
    return list(run[: run.index(EOS)]) if EOS in run else list(run)


def message(rows: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int | None]]], microstep: int = 0) -> Tokens:
    """Rows of (ids, mask, targets) as the trainer's side counts them."""
    real = Counter(i for ids, mask, _ in rows for i, m in zip(ids, mask, strict=True) if m)
    runs = [run for _, _, targets in rows for run in answers_of(targets)]
    labelled = Counter(t for run in runs for t in run)
    content = Counter(t for run in runs for t in content_of(run))
    num_positions = sum(len(ids) for ids, _, _ in rows)
    return Tokens(
        step=25,
        microstep=microstep,
        positions=num_positions,
        padding=num_positions - real.total(),
        answers=len(runs),
        real_ids=np.array(sorted(real), np.int32),
        real_counts=np.array([real[i] for i in sorted(real)], np.int64),
        labelled_ids=np.array(sorted(labelled), np.int32),
        labelled_counts=np.array([labelled[i] for i in sorted(labelled)], np.int64),
        content_counts=np.array([content[i] for i in sorted(labelled)], np.int64),
    )


# A packed row with two answers ("A" and "BC", each with EOS and the template's newline), and a padded row with one.
PACKED = ([9, 9, 20, 10, 2, 7, 21, 11, 12, 2, 7], [1] * 11, [None, None, 10, 2, 7, None, 11, 12, 2, 7, None])
PADDED = ([9, 30, 10, 2, 7, 2, 2, 2, 2, 2, 2], [1] * 5 + [0] * 6, [None, 10, 2, 7, *[None] * 7])
SHORT = ([9, 31, 10, 2], [1] * 4, [None, 10, 2, None])


def test_two_ranks_and_two_micro_batches_by_hand() -> None:
    parts = [
        Part(rank=0, message=message([PACKED])),
        Part(rank=0, message=message([PADDED], microstep=1)),
        Part(rank=1, message=message([SHORT])),
    ]
    values = measure_tokens(parts, context()).values
    # real ids: 9 20 10 2 7 21 11 12 | 9 30 10 2 7 | 9 31 10 2
    assert values["tokens/total_tokens"] == 26
    assert values["tokens/unique_tokens"] == 10
    assert values["tokens/unique_token_ratio"] == 10 / VOCABULARY
    assert values["tokens/eos_count"] == 4  # two in the packed row, one and one; six more are padding
    assert values["tokens/pad_ratio"] == 6 / 26
    assert values["tokens/image_token_ratio"] == 4 / 20
    assert values["tokens/answers"] == 4
    assert values["tokens/answer_tokens"] == 3 + 4 + 3 + 2
    assert values["tokens/answer_length"] == (1 + 2 + 1 + 1) / 4
    assert values["tokens/unique_answer_tokens"] == 5  # A B C, EOS and the newline
    assert values["tokens/answer_eos_count"] == 4
    assert values["tokens/answer_diversity_ratio"] == 3 / 5
    assert values["tokens/answer_most_common_token_text"] == "A"  # noqa: S105


def test_ninety_percent_a_is_shown_as_090() -> None:
    rows = [([20, 10, 2], [1] * 3, [10, 2, None])] * 9 + [([20, 11, 2], [1] * 3, [11, 2, None])]
    values = measure_tokens([Part(rank=0, message=message(rows))], context()).values
    assert values["tokens/answer_diversity_ratio"] == 0.9
    assert values["tokens/answer_most_common_token_text"] == "A"  # noqa: S105
    assert values["tokens/answer_length"] == 1.0


def test_no_label_leaves_ratios_absent_and_counts_zero() -> None:
    found = measure_tokens([Part(rank=0, message=message([([5, 6], [1, 1], [None, None])]))], context())
    assert found.values["tokens/answers"] == 0
    assert found.values["tokens/answer_tokens"] == 0
    absent = ("answer_length", "answer_diversity_ratio", "answer_most_common_token_text")
    assert not {f"tokens/{name}" for name in absent} & found.values.keys()


def test_an_empty_content_is_an_answer_of_length_zero_without_a_most_common_token() -> None:
    values = measure_tokens([Part(rank=0, message=message([([5, 2], [1, 1], [2, None])]))], context()).values
    assert values["tokens/answers"] == 1
    assert values["tokens/answer_length"] == 0.0
    assert "tokens/answer_diversity_ratio" not in values


def test_padding_that_looks_like_eos_is_said_and_left_out() -> None:
    told = message([SHORT])
    unclear = replace(told, padding=-1)
    found = measure_tokens([Part(rank=0, message=told), Part(rank=1, message=unclear)], context())
    assert "tokens/eos_count" not in found.values
    assert "tokens/pad_ratio" not in found.values
    assert found.values["tokens/answer_eos_count"] == 2  # labels are not padding
    assert [notice.code for notice in found.notices] == ["eos_is_padding"]


def test_what_the_tokenizer_does_not_tell_is_absent() -> None:
    unknown = context(eos_id=None, vocabulary_size=0, image_token_id=None)
    values = measure_tokens([Part(rank=0, message=message([SHORT]))], unknown).values
    absent = ("eos_count", "answer_eos_count", "unique_token_ratio", "image_token_ratio")
    assert not {f"tokens/{name}" for name in absent} & values.keys()
    assert values["tokens/unique_tokens"] == 4


def test_tensor_parallel_copies_count_once() -> None:
    places: dict[int, dict[str, Any]] = {rank: {"data_parallel_rank": rank // 2} for rank in range(4)}
    mesh = replace(context(), topologies=places)
    parts = [Part(rank=rank, message=message([SHORT])) for rank in range(4)]
    assert measure_tokens(parts, mesh).values["tokens/total_tokens"] == 8
    assert measure_tokens(parts[1:], mesh).values["tokens/total_tokens"] == 8, (
        "the copy speaks where the first is missing"
    )
    assert measure_tokens(parts, context()).values["tokens/total_tokens"] == 16
    unlike = [Part(rank=1, message=message([PACKED])), Part(rank=0, message=message([SHORT]))]
    assert measure_tokens(unlike, mesh).values["tokens/total_tokens"] == 4, "the lower rank, whatever the order"


def test_equally_common_tokens_give_the_smallest_id() -> None:
    row = ([20, 12, 11, 2], [1] * 4, [12, 11, 2, None])
    values = measure_tokens([Part(rank=0, message=message([row]))], context()).values
    assert values["tokens/answer_most_common_token_text"] == "B"  # noqa: S105


@pytest.mark.parametrize(
    "broken",
    [
        {"real_counts": np.ones(1, np.int64)},
        {"content_counts": np.full(2, 99, np.int64)},
        {"labelled_ids": np.zeros(0, np.int32)},
        {"positions": -1},
        {"padding": 100},
        {"real_counts": np.full(4, -1, np.int64)},
    ],
)
def test_parts_that_contradict_themselves_are_left_out_and_counted(broken: dict[str, Any]) -> None:
    good = message([SHORT])
    found = measure_tokens([Part(rank=0, message=good), Part(rank=1, message=replace(good, **broken))], context())
    assert found.malformed_parts == 1
    assert found.values["tokens/total_tokens"] == 4


def test_no_part_gives_nothing() -> None:
    assert measure_tokens([], context()).values == {}
