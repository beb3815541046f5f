from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sidestep.trainer_hooks.late_answers import LabelReading
from sidestep.trainer_hooks.reductions.alignment import align
from sidestep.trainer_hooks.reductions.answers import reduce_answers

IGNORED, EOS = -100, 1


@given(
    rows=st.lists(st.lists(st.sampled_from([IGNORED, EOS, 2, 3]), min_size=6, max_size=6), min_size=1, max_size=3),
    shifted=st.booleans(),
)
def test_answers_counted_later_are_those_counted_at_once(rows: list[list[int]], shifted: bool) -> None:
    labels = torch.tensor(rows)
    late = LabelReading(shifted, IGNORED, EOS).counts(labels.numpy())
    batch = align(input_ids=None, labels=labels, shifted=shifted, ignore_index=IGNORED, eos_id=EOS)
    assert late.tolist() == reduce_answers(batch).tolist()


@pytest.mark.parametrize("shape", [(6,), (1, 6)])
def test_a_batch_without_a_row_axis_is_one_row(shape: tuple[int, ...]) -> None:
    labels = np.array([IGNORED, 2, 3, EOS, IGNORED, IGNORED]).reshape(shape)
    counts = LabelReading(shifted=True, ignore_index=IGNORED, eos_id=EOS).counts(labels)
    assert counts.tolist() == [3, 1, 0, 0, 0, 1, 0, 0, 0, 0]
