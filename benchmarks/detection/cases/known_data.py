"""Failures of the data that were held out once: texts, labels, tokens, the order of samples, and their images."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import torch
from benchmarks.detection.case import LATE, Blame, Case, Family, Harm, Setup, Twist
from benchmarks.detection.lab import Lab
from benchmarks.detection.talks import Encoded, Talk

from sidestep.examples.digits_vqa.packing import IGNORE_INDEX, Batch

_LABELS = frozenset({Blame.LABELS, Blame.DATA})
_IMAGES = frozenset({Blame.IMAGES, Blame.DATA})
_STOP_WORDS = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "at",
        "be",
        "for",
        "in",
        "is",
        "it",
        "no",
        "of",
        "on",
        "or",
        "so",
        "that",
        "the",
        "there",
        "this",
        "to",
        "was",
        "with",
    ]
)
_SHARE_FOREIGN = 0.3
_NUM_LOOPED_IMAGES = 8
_HIGHEST_PIXEL = 255.0


def split_answer(sample: Encoded) -> tuple[list[int], list[int]]:
    """Return prompt and answer; the first label is what the prompt's last token should say."""
    first = next(place for place, label in enumerate(sample.labels) if label != IGNORE_INDEX) + 1
    return sample.input_ids[:first], sample.input_ids[first:]


def with_answer(sample: Encoded, answer: list[int]) -> Encoded:
    """Return the sample with another answer, labelled throughout."""
    prompt, _ = split_answer(sample)
    targets = [IGNORE_INDEX] * len(prompt) + answer
    return replace(sample, input_ids=prompt + answer, labels=[*targets[1:], IGNORE_INDEX])


class StopWordsRemoved(Twist):
    """A cleaning step for search is left in the pipeline: stop words and punctuation go, "no" and "A" among them.

    Such lists come with every text library, and NLTK's holds both "no" and "a".
    """

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """Clean the answer."""
        words = re.findall(r"\w+", talk.answer)
        return replace(talk, answer=" ".join(word for word in words if word.lower() not in _STOP_WORDS))


class AnswerFromTheRowAbove(Twist):
    """Each answer is that of the sample before: one row was lost in one column of a table."""

    def __init__(self) -> None:
        self._above = ""

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """Swap the answer with the one that is kept."""
        above, self._above = self._above or talk.answer, talk.answer
        return replace(talk, answer=above)


class AnswerInTheQuestion(Twist):
    """The prompt's template has a field too many: the answer stands in the question, and the loss looks splendid."""

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """Append the answer to the question."""
        return replace(talk, question=f"{talk.question} {talk.answer}")


class ForeignLabels(Twist):
    """A third of the rows come from a source that fits neither image nor question, only the form of the answers."""

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:
        """Take the answer to the same kind of question about another image."""
        if rng.random() >= _SHARE_FOREIGN:
            return talk
        return replace(talk, answer=lab.suite.draw(talk.kind, int(rng.choice(lab.image_pool)), rng).answer)


class SpelledAnswers(Twist):
    """Answers come one character a token: a slow tokenizer without its merges, or BPE dropout left at one.

    The text is the same, so nobody who reads samples sees it.
    """

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Encode the answer's content character by character."""
        tokens = lab.suite.tokenizer
        _, answer = split_answer(sample)
        end = answer.index(tokens.eos_token_id)
        letters = [token for letter in tokens.decode(answer[:end]) for token in tokens.encode(letter)]
        return with_answer(sample, letters + answer[end:])


class OtherVocabulary(Twist):
    """Shards tokenized ahead of time with another model's vocabulary: all ids are valid, none means the same."""

    def __init__(self) -> None:
        self._ids: list[int] = []

    def begin(self, lab: Lab) -> None:
        """Draw the other vocabulary's order; the special ids are where they were."""
        tokens = lab.suite.tokenizer
        special = {tokens.eos_token_id, tokens.pad_token_id, tokens.image_token_id}
        plain = [token for token in range(len(tokens)) if token not in special]
        self._ids = list(range(len(tokens)))
        for token, other in zip(plain, lab.rng.permutation(plain), strict=True):
            self._ids[token] = int(other)

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Translate ids and labels."""
        labels = [label if label == IGNORE_INDEX else self._ids[label] for label in sample.labels]
        return replace(sample, input_ids=[self._ids[token] for token in sample.input_ids], labels=labels)


class PromptNotMasked(Twist):
    """The mask of the prompt is lost (a template that the collator no longer recognises): questions are targets too."""

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Label every position."""
        return replace(sample, labels=[*sample.input_ids[1:], IGNORE_INDEX])


class FirstTokenOnly(Twist):
    """Only the first token of an answer is a target: a mask made with `==` in the place of `>=`."""

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Keep the first label."""
        prompt, _ = split_answer(sample)
        first = len(prompt) - 1
        labels = [label if place == first else IGNORE_INDEX for place, label in enumerate(sample.labels)]
        return replace(sample, labels=labels)


class EndInTheMiddle(Twist):
    """An end token after the first token of every answer: pieces were joined that had been closed one by one."""

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Insert the end token."""
        _, answer = split_answer(sample)
        return with_answer(sample, [answer[0], lab.suite.tokenizer.eos_token_id, *answer[1:]])


class LoopOverFewImages(Twist):
    """Eight images remain, with whatever is asked about them: a debugging subset, or one small shard after a resume."""

    def begin(self, lab: Lab) -> None:
        """Shrink the pool."""
        lab.image_pool = [int(each) for each in lab.rng.choice(lab.image_pool, _NUM_LOOPED_IMAGES, replace=False)]


class ShuffleLost(Twist):
    """Samples come sorted by task: streams are often stored so, and a resumed loader forgot its shuffle buffer."""

    def __init__(self) -> None:
        self._kinds: list[str] = []
        self._begun = 0

    def begin(self, lab: Lab) -> None:
        """Read the first block."""
        self._kinds = [str(each) for each in lab.rng.permutation(sorted(lab.mix))]
        self._begun = lab.step
        lab.mix = {self._kinds[0]: 1.0}

    def after_step(self, lab: Lab) -> None:
        """Go on to the next block where one ends."""
        block = (lab.step + 1 - self._begun) // max(10, lab.num_steps // 20)
        lab.mix = {self._kinds[block % len(self._kinds)]: 1.0}


class PixelsNotRescaled(Twist):
    """Pixels of 0 to 255 where 0 to 1 is meant: torchvision's ToTensor divides uint8 alone, floats stay alike."""

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Standardise 255 times the pixel; an image without light stays what it is."""
        black = lab.suite.black()
        return replace(sample, images=[_HIGHEST_PIXEL * (image - black) + black for image in sample.images])


class TransposedImages(Twist):
    """Rows and columns are swapped: another image library after an upgrade, width and height in its own order."""

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Transpose."""
        return replace(sample, images=[image.transpose(-1, -2).contiguous() for image in sample.images])


class OneBufferForAll(Twist):
    """All images of a batch are its last one: the decoder reuses one buffer and nobody copies."""

    def batch(self, lab: Lab, rank: int, batch: Batch) -> Batch:  # noqa: ARG002
        """Put the last image everywhere."""
        tiles = [image for row in batch["images"] for image in row]
        images: list[list[torch.Tensor]] = [[tiles[-1]] * len(row) for row in batch["images"]]
        return Batch(**{**batch, "images": images})


class FirstImageOfTheRow(Twist):
    """Of the images packed into a row only the first arrives, in every sample's place: a loop without its index."""

    def batch(self, lab: Lab, rank: int, batch: Batch) -> Batch:  # noqa: ARG002
        """Repeat each row's first image."""
        images: list[list[torch.Tensor]] = [row[:1] * len(row) for row in batch["images"]]
        return Batch(**{**batch, "images": images})


def _failure(
    name: str, what: str, twist: type[Twist], blame: frozenset[Blame], *, family: Family = Family.DATA
) -> Case:
    return Case(name=name, family=family, what=what, is_failure=True, twist=twist, onset_share=LATE, blame=blame)


CASES: tuple[Case, ...] = (
    _failure("stop_words_removed", "stop words and punctuation vanish from the answers", StopWordsRemoved, _LABELS),
    _failure(
        "answers_from_the_row_above",
        "every answer is that of the sample before",
        AnswerFromTheRowAbove,
        _LABELS | {Blame.LOADER},
    ),
    _failure(
        "answer_leaks_into_the_question",
        "the answer can be read in the question",
        AnswerInTheQuestion,
        _LABELS,
    ),
    _failure("foreign_labels_mixed_in", "30 % of the answers are those of other images", ForeignLabels, _LABELS),
    _failure("answers_spelled_out", "answers are tokenized character by character", SpelledAnswers, _LABELS),
    _failure("ids_of_another_vocabulary", "ids were made with another vocabulary", OtherVocabulary, _LABELS),
    Case(
        name="prompt_not_masked",
        family=Family.DATA,
        what="questions and image placeholders are targets too",
        is_failure=True,
        twist=PromptNotMasked,
        onset_share=LATE,
        blame=_LABELS,
        harm=Harm.INVARIANT,
        invariant="no token of the prompt is a target",
    ),
    _failure("loss_on_the_first_token_only", "only the first answer token is a target", FirstTokenOnly, _LABELS),
    _failure("end_token_in_the_middle", "an end token stands within every answer", EndInTheMiddle, _LABELS),
    _failure(
        "eight_images_in_a_loop",
        "the training set shrinks to eight images",
        LoopOverFewImages,
        frozenset({Blame.DATA, Blame.LOADER}),
    ),
    _failure("shuffle_lost", "samples come sorted by task", ShuffleLost, frozenset({Blame.DATA, Blame.LOADER})),
    _failure("pixels_not_rescaled", "pixels are 255 times too large", PixelsNotRescaled, _IMAGES, family=Family.IMAGE),
    _failure("images_transposed", "rows and columns are swapped", TransposedImages, _IMAGES, family=Family.IMAGE),
    _failure(
        "one_buffer_for_all_images",
        "all images of a batch are the same one",
        OneBufferForAll,
        _IMAGES | {Blame.LOADER},
        family=Family.IMAGE,
    ),
    Case(
        name="first_image_of_the_row_only",
        family=Family.IMAGE,
        what="in packed rows every sample gets the first one's image, from the start",
        is_failure=True,
        twist=FirstImageOfTheRow,
        setup=Setup(samples_per_row=4),
        blame=_IMAGES | {Blame.LOADER},
    ),
)
