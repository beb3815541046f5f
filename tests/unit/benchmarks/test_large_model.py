"""The model of nanoVLM-460M's shape: its parameter table, and that its small form does what it is to be timed at."""

from __future__ import annotations

import pytest
import torch
from benchmarks.large_model import LargeModel, Shape, scaled_down
from benchmarks.large_model_step import figures_of, main, parameter_table
from benchmarks.nanovlm_rows import Rows, WordTokenizer

SMALL = scaled_down(2)


@pytest.fixture
def tokenizer() -> WordTokenizer:
    return WordTokenizer(SMALL.vocabulary)


@pytest.fixture
def rows(tokenizer: WordTokenizer) -> Rows:
    return Rows(
        tokenizer, length=128, tile_pixels=SMALL.tile_pixels, vocabulary_size=tokenizer.image_token_id,
        image_tokens=SMALL.image_tokens(), asked_words=(10, 20), said_words=(4, 8),
    )  # fmt: skip


def test_the_table_is_that_of_nanovlm_460m() -> None:
    assert parameter_table(Shape()) == {"tensors": 440, "parameters": 460_113_984}
    with torch.device("meta"):
        model = LargeModel(Shape(), image_token_id=0)
    parts = {
        name: (len(list(part.parameters())), sum(p.numel() for p in part.parameters()))
        for name, part in model.named_children()
    }
    assert parts == {"vision_encoder": (149, 86_433_024), "MP": (1, 11_796_480), "decoder": (290, 361_884_480)}
    assert Shape().image_tokens() == 64


def test_words_and_marks_have_ids_and_the_placeholder_is_the_last_one(tokenizer: WordTokenizer) -> None:
    assert len(tokenizer) == SMALL.vocabulary == tokenizer.image_token_id + 1
    ids = tokenizer.convert_tokens_to_ids(["<|im_end|>", "w0", "<|image|>"])
    assert ids == [tokenizer.eos_token_id, 5, tokenizer.image_token_id]
    assert tokenizer.decode(ids[1:2]) == "w0"
    with pytest.raises(KeyError):
        tokenizer.convert_tokens_to_ids(["no such word"])


def test_every_tile_of_a_batch_has_its_placeholders(tokenizer: WordTokenizer, rows: Rows) -> None:
    batch = rows.batch(2)
    for ids, tiles in zip(batch["input_ids"], batch["images"], strict=True):
        assert (ids == tokenizer.image_token_id).sum() == len(tiles) * SMALL.image_tokens() > 0
    assert (batch["labels"] != tokenizer.image_token_id).all()


def test_every_parameter_gets_a_gradient_and_only_labelled_positions_make_it(
    tokenizer: WordTokenizer, rows: Rows
) -> None:
    torch.manual_seed(0)
    model = LargeModel(SMALL, image_token_id=tokenizer.image_token_id)
    batch = rows.batch(1)
    logits, loss = model(batch["input_ids"], batch["images"], batch["attention_mask"], batch["labels"])
    assert loss is not None
    losses = -logits.log_softmax(-1)[0].gather(-1, batch["labels"][0].clamp(min=0)[:, None])[:, 0]
    torch.testing.assert_close(loss, losses[batch["labels"][0] != -100].mean())
    loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_a_picture_stands_where_its_placeholders_are(tokenizer: WordTokenizer, rows: Rows) -> None:
    torch.manual_seed(0)
    model = LargeModel(SMALL, image_token_id=tokenizer.image_token_id)
    (first, second) = (row["images"][0] for row in rows.validation(2))
    ids = torch.tensor([[5, *[tokenizer.image_token_id] * 4, 6], [7, 8, *[tokenizer.image_token_id] * 4]])
    mask = torch.ones_like(ids)
    plain, _ = model(ids, [[first], [second]], mask)
    other, _ = model(ids, [[first], [first]], mask)
    torch.testing.assert_close(plain[0], other[0])
    torch.testing.assert_close(plain[1, :2], other[1, :2])
    assert (plain[1, 2:] - other[1, 2:]).abs().amax(-1).gt(1e-6).all()


def test_generation_from_the_cache_is_what_the_whole_forward_says(tokenizer: WordTokenizer, rows: Rows) -> None:
    torch.manual_seed(0)
    model = LargeModel(SMALL, image_token_id=tokenizer.image_token_id).double()
    row = rows.validation(1)[0]
    ids, images = row["input_ids"][None], [[tile.double() for tile in row["images"]]]
    made = model.generate(ids, images, torch.ones_like(ids), 4, greedy=True)
    for _ in range(4):
        hidden, _ = model(ids, images, torch.ones_like(ids))
        ids = torch.cat((ids, model.decoder.head(hidden[:, -1:]).argmax(-1)), dim=1)
    assert torch.equal(made, ids[:, -4:])
    with pytest.raises(ValueError, match="greedily"):
        model.generate(ids, images, torch.ones_like(ids), 4, greedy=False)


def test_medians_are_those_of_turns_and_the_first_steps_do_not_count() -> None:
    walls = [9.0] * 10 + [0.1] * 4 + [0.6] + [0.3] * 5 + [0.4] * 5
    clocks = {"thread_cpu": 0.05, "process_cpu": 0.06, "calls": [("after_step", 0.01, 0.02)]}
    found = figures_of([{"step": step, "wall": wall, **clocks} for step, wall in enumerate(walls)])
    assert found["steps"] == 15
    assert found["wall"]["median"] == pytest.approx(300.0)
    assert found["wall"]["mean"] == pytest.approx(300.0)
    assert found["wall"]["max"] == pytest.approx(400.0)
    assert (found["in_calls_cpu_mean"], found["in_calls_wall_mean"]) == (pytest.approx(10.0), pytest.approx(20.0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device for the full model")
def test_without_a_device_the_full_model_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["large_model_step.py"])
    with pytest.raises(SystemExit):
        main()
    assert "no CUDA device" in capsys.readouterr().err
