from __future__ import annotations

from tokenizers import Tokenizer

from sidestep.examples.digits_vqa.questions import Kind, every_text, single_turn
from sidestep.examples.digits_vqa.tokenizer import END, IMAGE, START, ChatTokenizer


def test_every_text_comes_back(tokenizer: ChatTokenizer) -> None:
    texts = set(every_text())
    assert len(texts) > 100
    assert [text for text in texts if tokenizer.decode(tokenizer.encode(text)) != text] == []


def test_a_text_it_never_saw_comes_back(tokenizer: ChatTokenizer) -> None:
    text = "Ünseen, 例\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_padding_is_the_end_token(tokenizer: ChatTokenizer) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert tokenizer.decode([tokenizer.eos_token_id]) == END
    assert tokenizer.decode([tokenizer.image_token_id]) == IMAGE
    assert max(tokenizer.backend_tokenizer.get_vocab().values()) == len(tokenizer) - 1


def test_a_second_training_gives_the_same_ids(tokenizer: ChatTokenizer) -> None:
    assert ChatTokenizer().to_str() == tokenizer.to_str()


def test_it_travels_as_json(tokenizer: ChatTokenizer) -> None:
    travelled = Tokenizer.from_str(tokenizer.to_str())
    prompt = tokenizer.encode_prompt("Which digit is this?", num_images=1)
    assert travelled.encode(tokenizer.decode(prompt)).ids == prompt


def test_the_template(tokenizer: ChatTokenizer) -> None:
    turns = [single_turn(Kind.NAME, 3, 0, 0), single_turn(Kind.EVEN, 3, 0, 0)]
    encoded = tokenizer.encode_turns(turns, num_images=1)
    text = (
        f"{START}user\n{IMAGE}Which digit is this?{END}\n{START}assistant\nthree{END}\n"
        f"{START}user\nIs this digit even?{END}\n{START}assistant\nno{END}\n"
    )
    assert tokenizer.decode(encoded.ids) == text
    assert tokenizer.backend_tokenizer.encode(text).ids == encoded.ids
    answered = [token for token, answer in zip(encoded.ids, encoded.is_answer, strict=True) if answer]
    assert tokenizer.decode(answered) == f"three{END}\nno{END}\n"


def test_an_answer_ends_before_its_first_end_token(tokenizer: ChatTokenizer) -> None:
    end = tokenizer.eos_token_id
    assert tokenizer.until_end([5, 6, end, end, 7]) == [5, 6]
    assert tokenizer.until_end([end, end]) == []
    assert tokenizer.until_end([5, 6]) == [5, 6]
