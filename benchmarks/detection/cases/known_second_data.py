"""Failures of the data that were held out next: labels, texts, which samples are left, and their images."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from benchmarks.detection.case import Blame, Case, Family, Setup, Twist, failure_case
from benchmarks.detection.cases.known_data import split_answer, with_answer
from benchmarks.detection.lab import Lab
from benchmarks.detection.scenes_suite import GLYPHS
from benchmarks.detection.talks import Encoded, Talk
from torch.nn import functional

from sidestep.examples.digits_vqa.packing import IGNORE_INDEX, Batch
from sidestep.examples.digits_vqa.questions import WORDS

_LABELS = frozenset({Blame.LABELS, Blame.DATA})
_IMAGES = frozenset({Blame.IMAGES, Blame.DATA})
_MOST_QUESTION_TOKENS = 3
_MOST_ANSWER_TOKENS = 3
_SHARE_UNDECODABLE = 0.7
_HIGHEST_PIXEL = 255.0
_THUMBNAIL_FACTOR = 4
_PLACEHOLDER = "<image>"


class ShiftedTwice(Twist):
    """The collator shifts labels, and so does the model: every position is asked for the token after the next."""

    def batch(self, lab: Lab, rank: int, batch: Batch) -> Batch:  # noqa: ARG002
        """Shift once more; what falls out at the row's end is lost."""
        labels = torch.roll(batch["labels"], -1, dims=1)
        labels[:, -1] = IGNORE_INDEX
        return Batch(**{**batch, "labels": labels})


class UserTurnIsTheTarget(Twist):
    """The mask is built for the wrong role: the question is trained on, the answer is masked.

    A template whose markers of a turn have changed, and a collator that toggles at each of them.
    """

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Label the question, without the image's placeholder."""
        prompt, answer = split_answer(sample)
        image = lab.suite.tokenizer.image_token_id
        targets = [IGNORE_INDEX if token == image else token for token in prompt] + [IGNORE_INDEX] * len(answer)
        return replace(sample, labels=[*targets[1:], IGNORE_INDEX])


class EndWrittenAsText(Twist):
    """The end of an answer is spelled in characters: special tokens that are escaped, or unknown to the tokenizer."""

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Put the characters in the end token's place."""
        tokens = lab.suite.tokenizer
        _, answer = split_answer(sample)
        end = answer.index(tokens.eos_token_id)
        spelled = [token for letter in tokens.decode([tokens.eos_token_id]) for token in tokens.encode(letter)]
        return with_answer(sample, answer[:end] + spelled + answer[end + 1 :])


class QuestionsCut(Twist):
    """Prompts are truncated on the right: a limit that was meant for something else, and the default side."""

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """Keep the question's first tokens."""
        tokens = lab.suite.tokenizer
        return replace(talk, question=tokens.decode(tokens.encode(talk.question)[:_MOST_QUESTION_TOKENS]))


class LongAnswersFiltered(Twist):
    """A filter for length counts in the wrong unit, and all that is longer than three tokens is dropped."""

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:
        """Draw again until the answer is short."""
        kinds, shares = list(lab.mix), np.array(list(lab.mix.values()))
        while len(lab.suite.tokenizer.encode(talk.answer)) > _MOST_ANSWER_TOKENS:
            kind = kinds[int(rng.choice(len(kinds), p=shares / shares.sum()))]
            talk = lab.suite.draw(kind, int(rng.choice(lab.image_pool)), rng)
        return talk


class ClassNamesOffByOne(Twist):
    """A label map that begins at one, read as if it began at zero: every class has its neighbour's name."""

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """Rename the classes in the answer."""
        names = GLYPHS if lab.suite.name == "scenes" else WORDS
        following = dict(zip(names, [*names[1:], names[0]], strict=True))
        any_name = re.compile(rf"\b({'|'.join(names)})\b")
        return replace(talk, answer=any_name.sub(lambda found: following[found[0]], talk.answer))


class RescaledTwice(Twist):
    """Pixels are divided by 255 that were between 0 and 1 already: every image is all but black.

    Image processors warn of it, once, in a line of the log.
    """

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Bring the image next to black."""
        black = lab.suite.black()
        return replace(sample, images=[(image - black) / _HIGHEST_PIXEL + black for image in sample.images])


class UndecodableAreBlank(Twist):
    """70 % of the images cannot be decoded, and an `except` puts a black one in their place."""

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:
        """Blank some."""
        images = [lab.suite.black() if rng.random() < _SHARE_UNDECODABLE else image for image in sample.images]
        return replace(sample, images=images)


class Thumbnails(Twist):
    """Images are previews, enlarged to the usual size: the download took another column of addresses."""

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Keep two by two pixels."""
        previews = [functional.avg_pool2d(image, _THUMBNAIL_FACTOR) for image in sample.images]
        return replace(
            sample, images=[functional.interpolate(each, scale_factor=_THUMBNAIL_FACTOR) for each in previews]
        )


class HalfCopied(Twist):
    """The lower half of every image is still that of the step before: a pinned buffer is refilled during its copy."""

    def __init__(self) -> None:
        self._earlier: dict[int, list[torch.Tensor]] = {}

    def batch(self, lab: Lab, rank: int, batch: Batch) -> Batch:  # noqa: ARG002
        """Tear the images."""
        tiles = [image for row in batch["images"] for image in row]
        earlier = self._earlier.get(rank) or tiles[1:] + tiles[:1]
        self._earlier[rank] = tiles or earlier
        places = iter(range(len(tiles)))
        images = [[self._torn(image, earlier[next(places) % len(earlier)]) for image in row] for row in batch["images"]]
        return Batch(**{**batch, "images": images})

    @staticmethod
    def _torn(image: torch.Tensor, earlier: torch.Tensor) -> torch.Tensor:
        half = image.shape[-2] // 2
        return torch.cat((image[..., :half, :], earlier[..., half:, :]), dim=-2)


class PlaceholderIsText(Twist):
    """The image's placeholder is no special token for the tokenizer, so it is spelled, and no image is put in.

    The processor passes images on only where it finds the placeholder's id.
    """

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Spell the placeholder and drop the image."""
        tokens = lab.suite.tokenizer
        spelled = [token for letter in _PLACEHOLDER for token in tokens.encode(letter)]
        ids: list[int] = []
        labels: list[int] = []
        for token, label in zip(sample.input_ids, sample.labels, strict=True):
            pieces = spelled if token == tokens.image_token_id else [token]
            ids += pieces
            labels += [*[IGNORE_INDEX] * (len(pieces) - 1), label]
        return replace(sample, input_ids=ids, labels=labels, images=[])


class RowReversed(Twist):
    """Images of a packed row come in reverse, as `pop` takes them from a list."""

    def batch(self, lab: Lab, rank: int, batch: Batch) -> Batch:  # noqa: ARG002
        """Reverse each row's images."""
        return Batch(**{**batch, "images": [row[::-1] for row in batch["images"]]})


def _failure(name: str, what: str, twist: type[Twist], blame: frozenset[Blame], **more: Any) -> Case:
    return failure_case(Family.IMAGE if Blame.IMAGES in blame else Family.DATA, name, what, twist, blame, **more)


CASES: tuple[Case, ...] = (
    _failure(
        "labels_shifted_twice",
        "each position is asked for the token after the next, from the start",
        ShiftedTwice,
        _LABELS,
        onset_share=None,
        is_exact=True,
    ),
    _failure("user_turn_is_the_target", "questions are trained on, answers are masked", UserTurnIsTheTarget, _LABELS),
    _failure(
        "end_token_written_as_text", "the end token is spelled in characters", EndWrittenAsText, _LABELS, is_exact=True
    ),
    _failure("questions_cut_short", "questions are cut after three tokens", QuestionsCut, frozenset({Blame.DATA})),
    _failure(
        "long_answers_filtered_out",
        "no answer is longer than three tokens any more",
        LongAnswersFiltered,
        frozenset({Blame.DATA, Blame.LOADER}),
    ),
    _failure("class_names_off_by_one", "every class has its neighbour's name", ClassNamesOffByOne, _LABELS),
    _failure(
        "images_rescaled_twice",
        "pixels are divided by 255 twice, from the start",
        RescaledTwice,
        _IMAGES,
        onset_share=None,
    ),
    _failure(
        "undecodable_images_blank",
        "70 % of the images are black in the place of an error",
        UndecodableAreBlank,
        _IMAGES,
    ),
    _failure("thumbnails_for_images", "images are enlarged previews of 2x2 pixels", Thumbnails, _IMAGES),
    _failure(
        "images_half_copied",
        "the lower half of each image is of the step before",
        HalfCopied,
        _IMAGES | {Blame.LOADER},
    ),
    _failure(
        "placeholder_is_plain_text",
        "the image's placeholder is spelled, and no image is seen, from the start",
        PlaceholderIsText,
        _IMAGES | {Blame.MODULE},
        onset_share=None,
    ),
    _failure(
        "images_of_a_row_reversed",
        "in packed rows the images come in reverse, from the start",
        RowReversed,
        _IMAGES | {Blame.LOADER},
        onset_share=None,
        setup=Setup(samples_per_row=3),
    ),
)
