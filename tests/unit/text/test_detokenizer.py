"""Ids to text with real tokenizers of the tokenizers library, hostile ones included."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from sidestep.worker.text.clipping import clip
from sidestep.worker.text.detokenizer import MAX_TOKEN_BYTES, Detokenizer

TEXTS = ["Which digit is it? A", "Is it a seven?\nyes", "no it is a three", "größer 数字"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A byte-level BPE, as nanoVLM's and the demo's are."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    made.add_special_tokens([AddedToken("<|im_end|>", special=True), AddedToken("<|image|>", special=True)])
    return made


def id_of(tokenizer: Tokenizer, piece: str) -> int:
    found = tokenizer.token_to_id(piece)
    assert found is not None, piece
    return found


def table(tokenizer: Tokenizer, **fields: Any) -> dict[str, Any]:
    return {"kind": "json", "content": tokenizer.to_str().encode(), **fields}


@pytest.fixture(scope="module")
def text(tokenizer: Tokenizer) -> Detokenizer:
    return Detokenizer(table(tokenizer))


def test_text_is_what_the_tokenizer_decodes_without_specials(tokenizer: Tokenizer, text: Detokenizer) -> None:
    for sentence in TEXTS:
        ids = tokenizer.encode(sentence).ids
        assert text.text([*ids, id_of(tokenizer, "<|im_end|>")]) == sentence
    assert text.text([]) == ""
    assert text.problem == ""


def test_a_token_is_its_text(tokenizer: Tokenizer, text: Detokenizer) -> None:
    assert text.token(id_of(tokenizer, "A")) == "A"
    assert text.token(id_of(tokenizer, "<|im_end|>")) == "<|im_end|>"


def test_what_cannot_be_seen_is_made_visible(tokenizer: Tokenizer, text: Detokenizer) -> None:
    assert text.token(id_of(tokenizer, "Ċ")) == "\\n"
    assert text.token(id_of(tokenizer, "Ġ")) == "␣"
    assert text.token(id_of(tokenizer, "æ")) == "æ", "a piece of a character shows the vocabulary's spelling"
    everything = [text.token(i) for i in range(tokenizer.get_vocab_size(with_added_tokens=True))]
    assert all(shown.strip() and shown.isprintable() for shown in everything)


@pytest.mark.parametrize("unknown", [99_999, -1, -100, 2**31, 2**32 + 5, 2**70])
def test_unknown_ids_stand_for_themselves(tokenizer: Tokenizer, text: Detokenizer, unknown: int) -> None:
    assert text.token(unknown) == f"<id {unknown}>"
    letter = id_of(tokenizer, "A")
    assert text.text([letter, unknown, letter]) == f"A<id {unknown}>A"


def test_special_ids_of_the_table_are_left_out_too(tokenizer: Tokenizer) -> None:
    letter, other = id_of(tokenizer, "A"), id_of(tokenizer, "W")
    assert Detokenizer(table(tokenizer, special_ids=[letter])).text([letter, other]) == "W"


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"\xff\xfe", b'{"model": {"type": "BPE"}}', None, "text", 5, b"[" * 9000]
)
def test_hostile_tokenizer_bytes_give_a_problem_and_ids(content: Any) -> None:
    hostile = Detokenizer({"kind": "json", "content": content})
    assert "cannot be used" in hostile.problem
    assert len(hostile.problem) < 400
    assert hostile.token(5) == "<id 5>"
    assert hostile.text([5, 6]) == "<id 5><id 6>"


def test_a_table_of_texts_serves_where_there_is_no_json() -> None:
    text = Detokenizer({"kind": "texts", "texts": {0: "a", "1": "b", 2: "\n", "x": "?", 3: "<s>"}, "special_ids": [3]})
    assert text.text([0, 1, 3, 9]) == "ab<id 9>"
    assert (text.token(2), text.token(3), text.token(9)) == ("\\n", "<s>", "<id 9>")
    assert text.problem == ""


@pytest.mark.parametrize("empty", [{}, {"kind": "texts"}, {"kind": "texts", "texts": 5}, {"special_ids": "x"}])
def test_without_a_tokenizer_ids_stand_for_themselves(empty: dict[str, Any]) -> None:
    assert Detokenizer(empty).token(7) == "<id 7>"
    assert Detokenizer(empty).problem == ""


def test_a_long_token_is_cut() -> None:
    text = Detokenizer({"kind": "texts", "texts": {0: "ä" * 10_000, 1: ""}})
    assert len(text.token(0).encode()) <= MAX_TOKEN_BYTES
    assert text.token(1) == "<id 1>"


@pytest.mark.parametrize("max_bytes", [3, 4, 5, 6, 2_048])
def test_clipping_never_breaks_a_character(max_bytes: int) -> None:
    clipped = clip("ä数😀" * 1_000, max_bytes)
    assert len(clipped.encode()) <= max_bytes
    assert clipped.endswith("…")
    assert clip("short") == "short"
    assert clip("lone \ud800 surrogate").encode()
