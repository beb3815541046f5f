from __future__ import annotations

from itertools import islice

import pytest
import torch

from sidestep.examples.digits_vqa.decoder import MAX_POSITIONS, visible
from sidestep.examples.digits_vqa.digits import DigitImages
from sidestep.examples.digits_vqa.model import VisionLanguageModel, sample
from sidestep.examples.digits_vqa.packing import IGNORE_INDEX, Batch, PackedRows, collate, left_pad
from sidestep.examples.digits_vqa.prompts import Prompt, mixed_prompts
from sidestep.examples.digits_vqa.questions import Kind
from sidestep.examples.digits_vqa.tokenizer import ChatTokenizer
from sidestep.examples.digits_vqa.vision import pixel_shuffle


@pytest.fixture
def batch(training_images: DigitImages, tokenizer: ChatTokenizer) -> Batch:
    return collate(list(islice(PackedRows(training_images, tokenizer, length=192, seed=0), 2)))


@pytest.fixture
def prompts(held_out: DigitImages, tokenizer: ChatTokenizer) -> list[Prompt]:
    return mixed_prompts(held_out, tokenizer, 8)


def test_with_targets_come_logits_and_a_float32_mean(model: VisionLanguageModel, batch: Batch) -> None:
    logits, loss = model(batch["input_ids"], batch["images"], batch["attention_mask"], batch["labels"])
    assert logits.shape == (2, 192, model.decoder.head.out_features)
    labelled = batch["labels"] != IGNORE_INDEX
    chosen = logits.detach().double().log_softmax(-1)[labelled].gather(-1, batch["labels"][labelled][:, None])
    assert loss is not None
    assert loss.dtype == torch.float32
    assert loss.requires_grad
    assert loss.item() == pytest.approx(-chosen.mean().item(), rel=1e-5)


def test_without_targets_come_hidden_states(model: VisionLanguageModel, batch: Batch) -> None:
    hidden, loss = model(batch["input_ids"], batch["images"], batch["attention_mask"])
    logits, _ = model(batch["input_ids"], batch["images"], batch["attention_mask"], batch["labels"])
    assert loss is None
    assert hidden.shape == (2, 192, model.decoder.width)
    torch.testing.assert_close(model.decoder.head(hidden), logits)


def test_the_parts_have_nanovlm_names_and_a_tied_head(model: VisionLanguageModel) -> None:
    assert [name for name, _ in model.named_children()] == ["vision_encoder", "MP", "decoder"]
    assert model.decoder.head.weight is model.decoder.token_embedding.weight
    names = [name for name, _ in model.named_parameters()]
    assert "decoder.token_embedding.weight" in names
    assert "decoder.head.weight" not in names


def test_images_as_rows_or_flat_are_the_same(model: VisionLanguageModel, batch: Batch) -> None:
    flat = [tile for row in batch["images"] for tile in row]
    nested, _ = model(batch["input_ids"], batch["images"], batch["attention_mask"])
    unnested, _ = model(batch["input_ids"], flat, batch["attention_mask"])
    assert torch.equal(nested, unnested)


def test_a_text_without_images(model: VisionLanguageModel, tokenizer: ChatTokenizer) -> None:
    ids = torch.tensor([tokenizer.encode("Which digit is this?")])
    hidden, _ = model(ids, [])
    assert torch.isfinite(hidden).all()


def test_positions_see_their_own_document_only() -> None:
    seen = visible(torch.tensor([[0, 1, 1, 0, 1, 1, 0]]), num_queries=7)[0, 0]
    assert seen.nonzero().tolist() == [
        [0, 0],
        [1, 1],
        [2, 1],
        [2, 2],
        [3, 3],
        [4, 4],
        [5, 4],
        [5, 5],
        [6, 6],
    ]
    assert torch.equal(visible(torch.tensor([[0, 1, 1, 0, 1, 1, 0]]), num_queries=2)[0, 0], seen[-2:])


def test_a_packed_sample_does_not_read_its_neighbours(model: VisionLanguageModel, batch: Batch) -> None:
    mask = batch["attention_mask"][0]
    separator = int((mask == 0).nonzero()[-2])
    last_sample = slice(separator + 1, 191)
    ids = batch["input_ids"][:1].clone()
    before, _ = model(ids, batch["images"][:1], mask[None])
    is_text = (ids[0, :separator] != model.image_token_id) & (mask[:separator] == 1)
    ids[0, :separator][is_text] = 100
    after, _ = model(ids, batch["images"][:1], mask[None])
    torch.testing.assert_close(before[0, last_sample], after[0, last_sample])
    assert not torch.allclose(before[0, :separator], after[0, :separator])


def test_the_image_reaches_the_answer(model: VisionLanguageModel, prompts: list[Prompt]) -> None:
    ids = torch.tensor([prompts[0].ids])
    seen, _ = model(ids, [prompts[0].tiles])
    other, _ = model(ids, [prompts[1].tiles])
    assert not torch.allclose(seen[0, -1], other[0, -1])


def test_too_many_positions_are_refused(model: VisionLanguageModel) -> None:
    ids = torch.zeros((1, MAX_POSITIONS + 1), dtype=torch.int64)
    with pytest.raises(ValueError, match="1025 positions"):
        model(ids, [])


def test_generate_equals_whole_forwards_without_a_cache(model: VisionLanguageModel, prompts: list[Prompt]) -> None:
    prompt = prompts[0]
    ids = torch.tensor([prompt.ids])
    new_ids = model.generate(ids, [prompt.tiles], max_new_tokens=6, greedy=True)
    for position in range(6):
        hidden, _ = model(ids, [prompt.tiles])
        expected = int(model.decoder.head(hidden[:, -1]).argmax())
        assert int(new_ids[0, position]) == expected
        ids = torch.cat((ids, new_ids[:, position : position + 1]), dim=1)


def test_batched_generation_equals_one_by_one(
    model: VisionLanguageModel, tokenizer: ChatTokenizer, prompts: list[Prompt]
) -> None:
    ids, mask = left_pad([prompt.ids for prompt in prompts], tokenizer.pad_token_id)
    assert int((mask == 0).sum()) > 0
    together = model.generate(ids, [prompt.tiles for prompt in prompts], mask, max_new_tokens=5, greedy=True)
    alone = [
        model.generate(torch.tensor([prompt.ids]), [prompt.tiles], max_new_tokens=5, greedy=True) for prompt in prompts
    ]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("greedy", [True, False])
def test_generate_fills_with_eos_and_never_stops_early(
    model: VisionLanguageModel, prompts: list[Prompt], greedy: bool
) -> None:
    chosen: list[int] = []

    def end_after_two(_module: torch.nn.Module, _arguments: object, logits: torch.Tensor) -> torch.Tensor:
        wanted = (100, 101, model.eos_token_id, 102, 103)[len(chosen)]
        chosen.append(wanted)
        return torch.full_like(logits, -1e4).index_fill_(-1, torch.tensor([wanted]), 1e4)

    model.decoder.head.register_forward_hook(end_after_two)
    ids = torch.tensor([prompts[0].ids])
    new_ids = model.generate(ids, [prompts[0].tiles], max_new_tokens=5, greedy=greedy)
    end = model.eos_token_id
    assert new_ids.tolist() == [[100, 101, end, end, end]]
    assert new_ids.is_inference()
    assert len(chosen) == 5


def test_sampling_keeps_to_the_likeliest() -> None:
    torch.manual_seed(0)
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(200, -1)
    assert set(sample(logits, top_k=2, top_p=1.0, temperature=1.0).tolist()) == {0, 1}
    assert set(sample(logits, top_k=4, top_p=0.4, temperature=1.0).tolist()) == {0}
    assert set(sample(logits, top_k=50, top_p=1.0, temperature=1.0).tolist()) == {0, 1, 2, 3}


def test_pixel_shuffle_joins_neighbours() -> None:
    patches = torch.arange(16.0).view(1, 16, 1)
    assert pixel_shuffle(patches, factor=4).tolist() == [[list(range(16))]]
    assert pixel_shuffle(patches, factor=2)[0].tolist() == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [8, 9, 12, 13],
        [10, 11, 14, 15],
    ]


def test_prompts_are_mixed_and_end_before_the_answer(tokenizer: ChatTokenizer, prompts: list[Prompt]) -> None:
    assert [prompt.kind for prompt in prompts] == list(Kind)
    for prompt in prompts:
        text = tokenizer.decode(prompt.ids)
        assert text.endswith("<|im_start|>assistant\n")
        assert prompt.question in text
        assert tokenizer.decode(prompt.answer_ids) == prompt.answer
        assert prompt.ids.count(tokenizer.image_token_id) == len(prompt.tiles)
        assert prompt.picture.shape == (48, 48 * len(prompt.tiles))
