from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sidestep.trainer_hooks.prompts import Prompts
from sidestep.trainer_hooks.question import question_text
from sidestep.trainer_hooks.samples import (
    MAX_IMAGE_SIDE_PIXELS,
    Sample,
    image_pixels,
    samples_from_dataset,
    samples_table,
)

IGNORED = -100
START, END, IMAGE, NEWLINE = 1, 2, 3, 4
TEXTS = {START: "<|im_start|>", END: "<|im_end|>", IMAGE: "<|image|>", NEWLINE: "\n", 5: "user", 6: "assistant"}
TEXTS |= {7: "What", 8: " is", 9: " it", 10: "?", 11: "A", 12: " cat", 13: "And", 14: " then", 15: "Yes"}


class WordTokenizer:
    all_special_ids = (START, END)

    def decode(self, ids: list[int]) -> str:
        return "".join(TEXTS[i] for i in ids)


PROMPT = [START, 5, NEWLINE, IMAGE, IMAGE, 7, 8, 9, 10, END, NEWLINE, START, 6, NEWLINE]
ANSWER = [11, 12, END, NEWLINE]
SECOND = [START, 5, NEWLINE, 13, 14, 10, END, NEWLINE, START, 6, NEWLINE]


def conversation(*, shifted: bool) -> dict[str, Any]:
    ids = torch.tensor([*PROMPT, *ANSWER, *SECOND, 15, END, NEWLINE])
    labels = torch.full_like(ids, IGNORED)
    labels[len(PROMPT) : len(PROMPT) + len(ANSWER)] = torch.tensor(ANSWER)
    labels[-3:] = torch.tensor([15, END, NEWLINE])
    if shifted:
        labels = labels.roll(-1)
        labels[-1] = IGNORED
    return {"input_ids": ids, "labels": labels, "images": [torch.rand(2, 3, 8, 8)]}


@pytest.mark.parametrize("shifted", [True, False])
def test_a_prompt_ends_before_the_first_answer(shifted: bool) -> None:
    [sample] = samples_from_dataset(
        [conversation(shifted=shifted)], WordTokenizer(), shifted=shifted, image_token_id=IMAGE
    )
    assert sample.prompt() == PROMPT
    assert list(sample.target_ids) == ANSWER
    assert sample.question == "What is it?"
    assert sample.target == "A cat"
    assert len(sample.inputs["images"]) == 1


def test_a_packed_row_gives_its_first_conversation_with_its_own_images() -> None:
    one = conversation(shifted=True)
    pad = torch.tensor([END])
    ids = torch.cat((pad.repeat(3), one["input_ids"], pad, one["input_ids"], pad))
    labels = torch.cat(
        (pad.repeat(3) * 0 + IGNORED, one["labels"], pad * 0 + IGNORED, one["labels"], pad * 0 + IGNORED)
    )
    real, separator = torch.ones(len(one["input_ids"])), torch.zeros(1)
    mask = torch.cat((torch.zeros(3), real, separator, real, separator)).long()
    first, second = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    batch = {"input_ids": ids[None], "labels": labels[None], "attention_mask": mask[None], "images": [[first, second]]}
    [sample] = samples_from_dataset([batch], WordTokenizer(), shifted=True, image_token_id=IMAGE)
    assert sample.prompt() == PROMPT
    assert [image is first for image in sample.inputs["images"]] == [True]


def test_rows_without_labels_are_passed_over_and_nothing_at_all_raises() -> None:
    empty = conversation(shifted=False)
    empty["labels"] = torch.full_like(empty["labels"], IGNORED)
    full = conversation(shifted=False)
    assert len(samples_from_dataset([empty, full, full], WordTokenizer(), count=1, shifted=False)) == 1
    with pytest.raises(ValueError, match="no sample could be made"):
        samples_from_dataset([empty], WordTokenizer(), shifted=False)


def test_a_text_without_a_template_comes_back_whole() -> None:
    assert question_text(WordTokenizer(), [7, 8, 9, 10]) == "What is it?"


@pytest.mark.parametrize(
    ("fields", "name"),
    [({"question": 3}, "question"), ({"prompt_ids": []}, "prompt_ids"), ({"inputs": [1]}, "inputs")],
)
def test_a_bad_sample_raises_and_names_the_field(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=rf"Sample\.{name}"):
        Sample(**{"question": "q", "target": "t", **fields})


def test_images_become_small_bytes_with_channels_last() -> None:
    chw = torch.zeros(3, 600, 300)
    chw[0] = 1.0
    pixels = image_pixels(chw)
    assert pixels.dtype == np.uint8
    assert max(pixels.shape) <= MAX_IMAGE_SIDE_PIXELS
    assert pixels.shape[2] == 3
    assert pixels[0, 0].tolist() == [255, 0, 0]
    assert image_pixels(np.full((4, 5), 7, np.uint8)).shape == (4, 5, 1)
    stretched = image_pixels(np.linspace(-2.0, 2.0, 16).reshape(4, 4))
    assert (stretched.min(), stretched.max()) == (0, 255)
    with pytest.raises(ValueError, match="axes"):
        image_pixels(np.zeros(3))


def test_the_table_holds_texts_ids_and_pixels() -> None:
    picture = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    sample = Sample(question="q", target="t", image=picture, prompt_ids=[1], target_ids=torch.tensor([[5, 6]]))
    [row] = samples_table([sample])["samples"]
    assert row == {
        "question": "q",
        "target": "t",
        "target_ids": [5, 6],
        "image": {"shape": [2, 2, 3], "pixels": picture.tobytes()},
    }


def test_prompts_are_padded_on_the_left_and_their_inputs_joined() -> None:
    tile = torch.rand(1, 3, 4, 4)
    samples = [
        Sample(question="", target="", prompt_ids=[7, 8, 9], inputs={"images": [tile], "pixels": tile, "mode": "x"}),
        Sample(question="", target="", prompt_ids=torch.tensor([5]), inputs={"pixels": tile, "mode": "x"}),
    ]
    prompts = Prompts.joined(samples, pad_id=2)
    assert prompts.input_ids.tolist() == [[7, 8, 9], [2, 2, 5]]
    assert prompts.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert prompts.inputs["images"] == [[tile], []]
    assert prompts.inputs["pixels"].shape == (2, 3, 4, 4)
    assert prompts.inputs["mode"] == "x"
    with pytest.raises(ValueError, match="mode"):
        Prompts.joined([*samples, Sample(question="", target="", prompt_ids=[1], inputs={"mode": "y"})], pad_id=2)
