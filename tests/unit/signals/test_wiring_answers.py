"""What the probe of the wiring exchanges: later answer tokens, and nothing else."""

from __future__ import annotations

import pytest
import torch
from tests.support.wiring_models import (
    IGNORE,
    IMAGE,
    VOCABULARY,
    rows,
)
from torch.nn import functional as F

from sidestep.trainer_hooks.reductions.alignment import align
from sidestep.trainer_hooks.wiring_changes import MAX_PER_ROW, MAX_ROWS, every_second, find_answers

ALL = torch.ones(4, dtype=torch.bool)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("shifted", [False, True])
def test_only_answer_tokens_are_exchanged_and_all_of_them_behind_the_position(shifted: bool) -> None:
    given = rows("padded")
    ids, labels = given["input_ids"], given["labels"]
    ids[:, 12], ids[:, 13] = torch.tensor([4, 5, 6, 7]), torch.tensor([8, 9, 10, 11])
    labels[:, 12:14] = ids[:, 12:14]
    labels[3] = IGNORE
    labels[2, 13:] = IGNORE
    told = F.pad(labels, (-1, 1), value=IGNORE) if shifted else labels
    answers = find_answers(ids, align(input_ids=ids, labels=told, shifted=shifted))
    assert answers is not None
    assert [sorted(set(row)) for row in answers.candidates.tolist()[:3]] == [[*range(11, 19)]] * 2 + [[11]]
    made, is_exchanged = answers.exchanged(torch.tensor([[14], [11], [11], [0]]), ALL)
    assert is_exchanged.tolist() == [True, True, True, False]
    moved = made != ids
    assert moved.any(dim=0).nonzero().flatten().tolist() == [*range(12, 20)]
    assert moved[0].nonzero().flatten().tolist() == [*range(15, 20)]
    assert moved[1].nonzero().flatten().tolist() == [*range(12, 20)]
    assert moved[2].nonzero().flatten().tolist() == [12]
    assert int(made[2, 12]) == int(ids[1, 12])  # its own only token stands there already
    assert set(made[0][moved[0]].tolist()) <= set(labels[0].tolist())


def test_placeholders_of_images_stay_where_they_are_labelled() -> None:
    given = rows("padded")
    labels = given["input_ids"].clone()
    batch = align(input_ids=given["input_ids"], labels=labels, attention_mask=given["attention_mask"])
    answers = find_answers(given["input_ids"], batch, IMAGE)
    assert answers is not None
    made, _ = answers.exchanged(torch.zeros(4, 1, dtype=torch.int64), ALL)
    assert torch.equal(made == IMAGE, given["input_ids"] == IMAGE)
    assert (made != given["input_ids"]).any(dim=1).all()


def test_labels_that_are_not_the_next_tokens_are_left_alone() -> None:
    ids = torch.arange(3, 23).expand(2, 20)
    answers = find_answers(ids, align(input_ids=ids, labels=ids, shifted=True))  # not shifted, and said to be
    assert answers is not None
    made, is_exchanged = answers.exchanged(answers.candidates[:, :1], ALL[:2])
    assert not is_exchanged.any()
    assert torch.equal(made, ids)
    assert find_answers(ids[:, :10], align(input_ids=None, labels=ids)) is None


@pytest.mark.parametrize(("count", "looked_at"), [(MAX_ROWS + 8, 1), (100, 5), (3, MAX_PER_ROW)])
def test_at_most_so_many_positions_are_looked_at(count: int, looked_at: int) -> None:
    ids = torch.randint(3, VOCABULARY, (count, 40))
    answers = find_answers(ids, align(input_ids=ids, labels=ids))
    assert answers is not None
    assert answers.candidates.shape == (min(count, MAX_ROWS), looked_at)
    made, is_exchanged = answers.exchanged(answers.candidates[:, -1:], every_second(ids))
    assert is_exchanged.shape == (min(count, MAX_ROWS),)
    assert made.shape == ids.shape
