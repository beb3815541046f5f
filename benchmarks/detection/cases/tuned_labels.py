"""Failures of labels and data, of the half that detectors are tuned on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from benchmarks.detection.case import LATE, Blame, Case, Family, Harm, Twist
from benchmarks.detection.lab import Lab
from benchmarks.detection.talks import Encoded, Talk

from sidestep.examples.digits_vqa.packing import IGNORE_INDEX, Batch

_KEPT_LABELS = 3
_NUM_REPEATS = 6
_NUM_SEEN = 50


class EveryLabelIsA(Twist):
    """A share of all answers becomes the letter A."""

    share = 1.0

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """Replace the answer."""
        return replace(talk, answer="A") if rng.random() < self.share else talk


class HalfOfTheLabelsAreA(EveryLabelIsA):
    """Every second answer becomes the letter A."""

    share = 0.5


class RandomLabels(Twist):
    """Every target is any id."""

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:
        """Draw targets anew; the inputs keep the true answer."""
        drawn = rng.integers(len(lab.suite.tokenizer), size=len(sample.labels)).tolist()
        labels = [IGNORE_INDEX if old == IGNORE_INDEX else new for old, new in zip(sample.labels, drawn, strict=True)]
        return replace(sample, labels=labels)


class ShuffledAnswers(Twist):
    """Answers belong to other questions of the same kind, as after a sort of one column."""

    def __init__(self) -> None:
        """Nothing is seen yet."""
        self._seen: dict[str, list[str]] = {}

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """Answer as one of the last samples of the kind was to be answered."""
        seen = self._seen.setdefault(talk.kind, [])
        seen.append(talk.answer)
        del seen[:-_NUM_SEEN]
        return replace(talk, answer=seen[int(rng.integers(len(seen)))])


class UnshiftedLabels(Twist):
    """Each position is asked for its own input."""

    def batch(self, lab: Lab, rank: int, batch: Batch) -> Batch:  # noqa: ARG002
        """Put the input in the target's place."""
        asked = batch["labels"] != IGNORE_INDEX
        return Batch(**{**batch, "labels": torch.where(asked, batch["input_ids"], batch["labels"])})


class CutAnswers(Twist):
    """Samples are cut a few tokens into their answer."""

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Keep three labels."""
        asked = [place for place, label in enumerate(sample.labels) if label != IGNORE_INDEX]
        if len(asked) <= _KEPT_LABELS:
            return sample
        end = asked[_KEPT_LABELS]  # the last position has no target any more: it was cut off
        return replace(sample, input_ids=sample.input_ids[: end + 1], labels=[*sample.labels[:end], IGNORE_INDEX])


class RepeatedAnswers(Twist):
    """The answer's first word stands there again and again, as a broken join writes it."""

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """Repeat the first word."""
        return replace(talk, answer=" ".join([talk.answer.split()[0]] * _NUM_REPEATS))


class PaddingIsLabelled(Twist):
    """Labels are not masked where rows are padded."""

    def batch(self, lab: Lab, rank: int, batch: Batch) -> Batch:  # noqa: ARG002
        """Ask for every padding token."""
        following = torch.roll(batch["input_ids"], -1, dims=1)
        is_padding = torch.roll(batch["attention_mask"], -1, dims=1) == 0
        is_padding[:, -1] = False
        return Batch(**{**batch, "labels": torch.where(is_padding, following, batch["labels"])})


class NoLabels(Twist):
    """Everything is masked, as a chat template that no longer fits masks it."""

    def batch(self, lab: Lab, rank: int, batch: Batch) -> Batch:  # noqa: ARG002
        """Mask all."""
        return Batch(**{**batch, "labels": torch.full_like(batch["labels"], IGNORE_INDEX)})


class NoStopToken(Twist):
    """EOS is masked in the labels, as it happens where the padding's id is EOS."""

    def batch(self, lab: Lab, rank: int, batch: Batch) -> Batch:  # noqa: ARG002
        """Mask EOS."""
        is_eos = batch["labels"] == lab.suite.tokenizer.eos_token_id
        return Batch(**{**batch, "labels": batch["labels"].masked_fill(is_eos, IGNORE_INDEX)})


class StuckBatch(Twist):
    """The loader hands out one batch again and again."""

    def __init__(self) -> None:
        """Nothing is kept yet."""
        self._kept: dict[int, Batch] = {}

    def batch(self, lab: Lab, rank: int, batch: Batch) -> Batch:  # noqa: ARG002
        """Return the first one."""
        return self._kept.setdefault(rank, batch)


def _failure(
    name: str, what: str, twist: type[Twist], *blame: Blame, invariant: str = "", is_exact: bool = False
) -> Case:
    return Case(
        name=name,
        family=Family.DATA,
        what=what,
        is_failure=True,
        twist=twist,
        onset_share=LATE,
        blame=frozenset(blame),
        harm=Harm.INVARIANT if invariant else Harm.LOSS,
        invariant=invariant,
        is_exact=is_exact,
    )


CASES: tuple[Case, ...] = (
    _failure("labels_become_a", "every answer becomes A", EveryLabelIsA, Blame.DATA, Blame.LABELS),
    _failure("half_labels_become_a", "every second answer becomes A", HalfOfTheLabelsAreA, Blame.DATA, Blame.LABELS),
    _failure("answers_shuffled", "answers belong to other questions", ShuffledAnswers, Blame.DATA, Blame.LABELS),
    _failure("random_labels", "targets are drawn by chance", RandomLabels, Blame.DATA, Blame.LABELS),
    _failure(
        "unshifted_labels", "each position is asked for its own input", UnshiftedLabels, Blame.LABELS, is_exact=True
    ),
    _failure("cut_answers", "samples are cut within the answer", CutAnswers, Blame.LABELS, Blame.DATA),
    _failure("repeated_answers", "targets repeat their first word", RepeatedAnswers, Blame.DATA, Blame.LABELS),
    _failure(
        "padding_labelled",
        "labels stand at padding",
        PaddingIsLabelled,
        Blame.LABELS,
        invariant="no target is a padding token",
        is_exact=True,
    ),
    _failure(
        "no_labels",
        "all labels are masked",
        NoLabels,
        Blame.LABELS,
        invariant="every batch has something to learn",
        is_exact=True,
    ),
    _failure("no_stop_token", "EOS is masked in the labels", NoStopToken, Blame.LABELS, is_exact=True),
    _failure("stuck_batch", "the loader repeats one batch", StuckBatch, Blame.LOADER, is_exact=True),
)
