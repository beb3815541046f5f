from __future__ import annotations

from itertools import islice

import pytest
import torch

from sidestep.examples.digits_vqa.digits import DigitImages
from sidestep.examples.digits_vqa.packing import (
    IGNORE_INDEX,
    PackedRows,
    Row,
    collate,
    encode_sample,
    left_pad,
    pack,
)
from sidestep.examples.digits_vqa.questions import Conversation, Kind, single_turn
from sidestep.examples.digits_vqa.tokenizer import ChatTokenizer

LENGTH = 192


def first_rows(
    images: DigitImages, tokenizer: ChatTokenizer, num_rows: int, *, seed: int = 0, spoilt_from: int | None = None
) -> list[Row]:
    stream = PackedRows(images, tokenizer, length=LENGTH, seed=seed, first_row_with_a=spoilt_from)
    return list(islice(stream, num_rows))


def answer_runs(row: Row) -> list[list[int]]:
    runs: list[list[int]] = []
    labelled_before = False
    for label in row["labels"].tolist():
        labelled = label != IGNORE_INDEX
        if labelled and not labelled_before:
            runs.append([])
        if labelled:
            runs[-1].append(label)
        labelled_before = labelled
    return runs


def same(left: Row, right: Row) -> bool:
    tiles = zip(left["images"], right["images"], strict=True)
    return (
        torch.equal(left["input_ids"], right["input_ids"])
        and torch.equal(left["labels"], right["labels"])
        and torch.equal(left["attention_mask"], right["attention_mask"])
        and all(torch.equal(one, other) for one, other in tiles)
    )


def test_two_samples_in_a_row(training_images: DigitImages, tokenizer: ChatTokenizer) -> None:
    conversation = Conversation(image_indices=(0,), turns=(single_turn(Kind.NAME, 3, 0, 0),))
    sample = encode_sample(conversation, training_images, tokenizer)
    size = len(sample.input_ids)
    row = pack([sample, sample], length=2 * size + 5, pad_token_id=tokenizer.pad_token_id, epoch=4)
    pad = tokenizer.pad_token_id
    assert row["input_ids"].tolist() == [pad] * 3 + sample.input_ids + [pad] + sample.input_ids + [pad]
    assert row["attention_mask"].tolist() == [0] * 3 + [1] * size + [0] + [1] * size + [0]
    assert row["labels"].tolist() == [-100] * 3 + sample.labels + [-100] + sample.labels + [-100]
    assert len(row["images"]) == 2
    assert row["epoch"] == 4


def test_samples_that_do_not_fit_are_refused(training_images: DigitImages, tokenizer: ChatTokenizer) -> None:
    conversation = Conversation(image_indices=(0,), turns=(single_turn(Kind.NAME, 3, 0, 0),))
    sample = encode_sample(conversation, training_images, tokenizer)
    with pytest.raises(ValueError, match="do not fit"):
        pack([sample], length=len(sample.input_ids), pad_token_id=tokenizer.pad_token_id, epoch=0)


def test_labels_are_the_next_ids_and_runs_are_the_answers(
    training_images: DigitImages, tokenizer: ChatTokenizer
) -> None:
    rows = first_rows(training_images, tokenizer, 30)
    assert max(len(answer_runs(row)) for row in rows) > 4
    for row in rows:
        ids, labels, mask = row["input_ids"], row["labels"], row["attention_mask"]
        labelled = labels != IGNORE_INDEX
        assert ids.shape == labels.shape == mask.shape == (LENGTH,)
        assert ids.dtype == labels.dtype == mask.dtype == torch.int64
        assert torch.equal(labels[:-1][labelled[:-1]], ids[1:][labelled[:-1]])
        assert not labelled[mask == 0].any()
        assert not labelled[-1]
        assert mask[-1] == 0
        assert int((ids == tokenizer.image_token_id).sum()) == len(row["images"])
        for run in answer_runs(row):
            text = tokenizer.decode(run)
            assert text.endswith("<|im_end|>\n")
            assert run.count(tokenizer.eos_token_id) == 1
            assert "assistant" not in text


def test_the_seed_decides_the_rows(training_images: DigitImages, tokenizer: ChatTokenizer) -> None:
    rows = first_rows(training_images, tokenizer, 6, seed=3)
    again = first_rows(training_images, tokenizer, 6, seed=3)
    other = first_rows(training_images, tokenizer, 6, seed=4)
    assert all(same(left, right) for left, right in zip(rows, again, strict=True))
    assert not any(torch.equal(left["input_ids"], right["input_ids"]) for left, right in zip(rows, other, strict=True))


def test_an_epoch_takes_every_image_once(held_out: DigitImages, tokenizer: ChatTokenizer) -> None:
    rows = first_rows(held_out, tokenizer, 400)
    epochs = [row["epoch"] for row in rows]
    assert epochs == sorted(epochs)
    assert {0, 1, 2} <= set(epochs)
    first_tiles = sum(len(row["images"]) for row in rows if row["epoch"] == 0)
    assert first_tiles >= len(held_out)


def test_answers_become_a_from_the_given_row_on_and_only_answers(
    training_images: DigitImages, tokenizer: ChatTokenizer
) -> None:
    healthy = first_rows(training_images, tokenizer, 8)
    spoilt = first_rows(training_images, tokenizer, 8, spoilt_from=4)
    assert all(same(left, right) for left, right in zip(healthy[:4], spoilt[:4], strict=True))
    only_a = [*tokenizer.encode("A"), tokenizer.eos_token_id, *tokenizer.encode("\n")]
    assert len(only_a) == 3
    for row in spoilt[4:]:
        assert all(run == only_a for run in answer_runs(row))
        assert len(row["images"]) == int((row["input_ids"] == tokenizer.image_token_id).sum())
    first_question = tokenizer.decode(healthy[4]["input_ids"].tolist()).split("assistant\n")[0].rsplit("user\n", 1)[1]
    assert first_question in tokenizer.decode(spoilt[4]["input_ids"].tolist())


def test_a_batch_keeps_its_rows(training_images: DigitImages, tokenizer: ChatTokenizer) -> None:
    rows = first_rows(training_images, tokenizer, 3)
    batch = collate(rows)
    assert batch["input_ids"].shape == (3, LENGTH)
    assert [len(images) for images in batch["images"]] == [len(row["images"]) for row in rows]
    assert torch.equal(batch["labels"][2], rows[2]["labels"])
    assert batch["epoch"] == 0


def test_prompts_are_padded_on_the_left() -> None:
    ids, mask = left_pad([[5], [6, 7, 8]], pad_token_id=1)
    assert ids.tolist() == [[1, 1, 5], [6, 7, 8]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]
