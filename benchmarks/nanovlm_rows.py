"""Made-up rows of nanoVLM's shape: packed conversations with pictures, padded on the left, labels rolled by one."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

VOCABULARY_SIZE = 1024
IMAGE_TOKENS_PER_TILE = 4
IGNORE_INDEX = -100
_MARKS = ("<|im_start|>", "<|im_end|>", "\n", "user", "assistant")


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of whole words, with ChatML's marks, as nanoVLM's configuration can name it."""
    words = [*_MARKS, *(f"w{n}" for n in range(VOCABULARY_SIZE - len(_MARKS)))]
    made = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    importlib.import_module("transformers").PreTrainedTokenizerFast(tokenizer_object=made, **marks).save_pretrained(
        folder
    )


class WordTokenizer:
    """The same tokenizer by ``tokenizers`` alone, the image's placeholder its last id."""

    def __init__(self, vocabulary_size: int) -> None:
        words = [*_MARKS, *(f"w{n}" for n in range(vocabulary_size - len(_MARKS) - 1)), "<|image|>"]
        self.backend_tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}))
        self.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        self.eos_token_id = self.pad_token_id = words.index("<|im_end|>")
        self.image_token_id = vocabulary_size - 1

    def __len__(self) -> int:
        """Count all ids."""
        return self.image_token_id + 1

    def convert_tokens_to_ids(self, tokens: Sequence[str]) -> list[int]:
        """Return the id of each word; raises KeyError for one that there is not."""
        known = self.backend_tokenizer.get_vocab()
        return [known[token] for token in tokens]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the words of ids."""
        return str(self.backend_tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))


class Rows:
    """Draws rows from a generator of its own.

    Args:
        tokenizer: nanoVLM's, of ``write_tokenizer``, or a ``WordTokenizer``.
        length: positions of a packed row.
        tile_pixels: side of a tile.
        vocabulary_size: words are drawn below it.
        image_tokens: placeholders of a tile.
        asked_words: least words of a question, and one more than the most.
        said_words: the same of an answer.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        length: int,
        tile_pixels: int,
        vocabulary_size: int = VOCABULARY_SIZE,
        image_tokens: int = IMAGE_TOKENS_PER_TILE,
        asked_words: tuple[int, int] = (4, 20),
        said_words: tuple[int, int] = (1, 8),
    ) -> None:
        self._length, self._tile_pixels, self._image_tokens = length, tile_pixels, image_tokens
        self._vocabulary_size, self._asked_words, self._said_words = vocabulary_size, asked_words, said_words
        self._image, self._pad = tokenizer.image_token_id, tokenizer.eos_token_id
        self._marks = dict(zip(_MARKS, tokenizer.convert_tokens_to_ids(list(_MARKS)), strict=True))
        self._random = torch.Generator().manual_seed(7)

    def batch(self, num_rows: int) -> dict[str, Any]:
        """What nanoVLM's collator returns.

        Returns:
            ``input_ids``, ``labels``, ``attention_mask``, int64 [num_rows, length], and ``images``, for each row a list
            of float32 tensors [1, 3, side, side].
        """
        rows = [self._packed() for _ in range(num_rows)]
        stacked = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels", "attention_mask")}
        return {**stacked, "images": [row["images"] for row in rows]}

    def validation(self, count: int = 32) -> list[dict[str, Any]]:
        """Conversations one by one, the same at every call."""
        random = torch.Generator().manual_seed(11)
        return [self._conversation(random) for _ in range(count)]

    def _conversation(self, random: torch.Generator) -> dict[str, Any]:
        spoken, said = self._words(random, *self._asked_words), self._words(random, *self._said_words)
        answer = [*said, self._marks["<|im_end|>"]]
        start, end, line = (self._marks[mark] for mark in ("<|im_start|>", "<|im_end|>", "\n"))
        asked = [start, self._marks["user"], line, *[self._image] * self._image_tokens, *spoken, end, line]
        prefix = [*asked, start, self._marks["assistant"], line]
        ids = torch.tensor([*prefix, *answer, line])
        labels = ids.clone()
        labels[: len(prefix)] = IGNORE_INDEX
        labels = labels.roll(-1)
        labels[-1] = IGNORE_INDEX
        tile = torch.rand(1, 3, self._tile_pixels, self._tile_pixels, generator=random)
        return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "images": [tile]}

    def _packed(self) -> dict[str, Any]:
        held: dict[str, list[torch.Tensor]] = {"input_ids": [], "labels": [], "attention_mask": []}
        separator = {"input_ids": self._pad, "labels": IGNORE_INDEX, "attention_mask": 0}
        images: list[torch.Tensor] = []
        filled = 0
        while True:
            made = self._conversation(self._random)
            if filled + made["input_ids"].numel() + 1 > self._length:
                break
            filled += made["input_ids"].numel() + 1
            images += made["images"]
            for name, pieces in held.items():
                pieces += [made[name], torch.tensor([separator[name]])]
        padding = self._length - filled
        return {
            "images": images,
            **{name: torch.cat([torch.full((padding,), separator[name]), *pieces]) for name, pieces in held.items()},
        }

    def _words(self, random: torch.Generator, least: int, below: int) -> list[int]:
        count = int(torch.randint(least, below, (), generator=random))
        drawn: list[int] = torch.randint(len(_MARKS), self._vocabulary_size, (count,), generator=random).tolist()
        return drawn
