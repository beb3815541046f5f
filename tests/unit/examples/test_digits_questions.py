from __future__ import annotations

import numpy as np
import pytest

from sidestep.examples.digits_vqa.digits import DigitImages
from sidestep.examples.digits_vqa.questions import PAIR_KINDS, SINGLE_KINDS, Kind, converse, pair_turn, single_turn


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        (Kind.NAME, "seven"),
        (Kind.IS_IT, "no"),
        (Kind.EVEN, "no"),
        (Kind.COUNT, "seven eight nine"),
        (Kind.CAPTION, "This is a handwritten seven in bold ink."),
        (Kind.STROKES, "a flat line, then a slanted one"),
    ],
)
def test_the_answer_about_a_bold_seven(kind: Kind, answer: str) -> None:
    assert single_turn(kind, 7, ink_level=2, asked=1).answer == answer


def test_yes_answers() -> None:
    assert single_turn(Kind.IS_IT, 4, 0, asked=4).answer == "yes"
    assert single_turn(Kind.EVEN, 4, 0, asked=0).answer == "yes"


@pytest.mark.parametrize(
    ("pair", "answer"), [((3, 8), "the second one"), ((8, 3), "the first one"), ((5, 5), "both are equal")]
)
def test_the_larger_of_two(pair: tuple[int, int], answer: str) -> None:
    assert pair_turn(Kind.COMPARE, *pair).answer == answer


def test_both_names_come_in_order() -> None:
    assert pair_turn(Kind.NAME_BOTH, 9, 0).answer == "nine and zero"


@pytest.mark.parametrize("kind", PAIR_KINDS)
def test_a_question_about_two_images_cannot_be_asked_of_one(kind: Kind) -> None:
    with pytest.raises(ValueError, match="two images"):
        single_turn(kind, 1, 1, 1)


@pytest.mark.parametrize("kind", SINGLE_KINDS)
def test_a_question_about_one_image_cannot_be_asked_of_two(kind: Kind) -> None:
    with pytest.raises(ValueError, match="one image"):
        pair_turn(kind, 1, 1)


def test_conversations_have_several_turns_of_all_kinds(training_images: DigitImages) -> None:
    rng = np.random.default_rng(0)
    conversations = [converse(training_images, index, rng) for index in range(300)]
    turns = [turn for conversation in conversations for turn in conversation.turns]
    assert {turn.kind for turn in turns} == set(Kind)
    assert {len(conversation.turns) for conversation in conversations} == {1, 2, 3}
    assert all(
        len(conversation.image_indices) == (2 if turn.kind in PAIR_KINDS else 1)
        for conversation in conversations
        for turn in conversation.turns
    )
    asked = [turn.answer for turn in turns if turn.kind is Kind.IS_IT]
    assert 0.4 < asked.count("yes") / len(asked) < 0.6


def test_the_splits_share_no_image(training_images: DigitImages, held_out: DigitImages) -> None:
    assert (len(training_images), len(held_out)) == (1_500, 297)
    assert set(held_out.names.tolist()) == set(range(10))
    seen = {image.tobytes() for image in training_images.pixels}
    assert not [image for image in held_out.pixels if image.tobytes() in seen]


def test_a_tile_is_standardised_and_a_picture_is_not(training_images: DigitImages) -> None:
    tiles = np.stack([training_images.tile(index).numpy() for index in range(len(training_images))])
    assert tiles.shape == (1_500, 1, 1, 8, 8)
    assert tiles.dtype == np.float32
    assert abs(float(tiles.mean())) < 0.02
    assert abs(float(tiles.std()) - 1) < 0.02
    picture = training_images.picture((0, 1))
    assert picture.dtype == np.uint8
    assert picture.shape == (48, 96)
    assert (
        picture[::6, ::6].tolist() == np.round(np.hstack(list(training_images.pixels[:2])) * 255).astype(int).tolist()
    )
