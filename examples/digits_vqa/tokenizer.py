"""A byte-level BPE trained from the demo's own texts, and the chat template written with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from sidestep.examples.digits_vqa.questions import Turn, every_text

START = "<|im_start|>"
END = "<|im_end|>"
IMAGE = "<|image|>"
_MAX_VOCABULARY = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedTurns:
    """A conversation in ids."""

    ids: list[int]
    """Token ids of the whole conversation, template included."""
    is_answer: list[bool]
    """Whether the id at the same place belongs to an answer: its content, the end token and the newline after it."""


class ChatTokenizer:
    """Text to ids and back; as in nanoVLM the padding id is the end-of-sequence id."""

    def __init__(self) -> None:
        """Train the BPE; the texts do not depend on a run's seed, so neither do the ids."""
        self.backend_tokenizer = Tokenizer(BPE())
        self.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.backend_tokenizer.decoder = decoders.ByteLevel()
        trainer = BpeTrainer(
            vocab_size=_MAX_VOCABULARY,
            show_progress=False,
            special_tokens=[START, END, IMAGE],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )
        template = ("user\n", "assistant\n", "\n")
        self.backend_tokenizer.train_from_iterator([*template, *every_text()], trainer=trainer)
        self.eos_token_id = self._id_of(END)
        self.pad_token_id = self.eos_token_id
        self.image_token_id = self._id_of(IMAGE)
        self._start_token_id = self._id_of(START)
        self._cache: dict[str, tuple[int, ...]] = {}

    def __len__(self) -> int:
        """Count all ids, special tokens included."""
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=True))

    def to_str(self) -> str:
        """Return the tokenizer as the text of a `tokenizer.json`."""
        return str(self.backend_tokenizer.to_str())

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; few texts come again and again, hence the cache."""
        if text not in self._cache:
            self._cache[text] = tuple(self.backend_tokenizer.encode(text).ids)
        return list(self._cache[text])

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of `ids`."""
        return str(self.backend_tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def until_end(self, ids: Sequence[int]) -> list[int]:
        """Return what stands before the first end token."""
        ids = list(ids)
        return ids[: ids.index(self.eos_token_id)] if self.eos_token_id in ids else ids

    def encode_prompt(self, question: str, *, num_images: int) -> list[int]:
        """Return the ids of a user turn and of the assistant's prefix; the answer would come next.

        A turn with images begins with one placeholder for each of them.
        """
        user = [self._start_token_id, *self.encode("user\n"), *[self.image_token_id] * num_images]
        end_of_turn = [self.eos_token_id, *self.encode("\n")]
        return [*user, *self.encode(question), *end_of_turn, self._start_token_id, *self.encode("assistant\n")]

    def encode_answer(self, answer: str) -> list[int]:
        """Return the ids of an answer as it is trained on: content, end token, newline."""
        return [*self.encode(answer), self.eos_token_id, *self.encode("\n")]

    def encode_turns(self, turns: Sequence[Turn], *, num_images: int) -> EncodedTurns:
        """Return a whole conversation; its images stand before the first question."""
        ids: list[int] = []
        is_answer: list[bool] = []
        for position, turn in enumerate(turns):
            prompt = self.encode_prompt(turn.question, num_images=num_images if position == 0 else 0)
            answer = self.encode_answer(turn.answer)
            ids += prompt + answer
            is_answer += [False] * len(prompt) + [True] * len(answer)
        return EncodedTurns(ids=ids, is_answer=is_answer)

    def _id_of(self, token: str) -> int:
        token_id = self.backend_tokenizer.token_to_id(token)
        if token_id is None:
            raise ValueError(f"the trained tokenizer has no {token}")
        return int(token_id)
