"""Samples of nanoVLM's validation loader: which rows are read, and what is left alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from sidestep.examples.digits_vqa.digits import load_splits
from sidestep.examples.digits_vqa.packing import encode_sample
from sidestep.examples.digits_vqa.questions import Kind, ask
from sidestep.examples.digits_vqa.settings import Settings
from sidestep.examples.digits_vqa.tokenizer import ChatTokenizer
from sidestep.examples.digits_vqa.training import Training, build
from sidestep.trainer_hooks.integrations import nanovlm
from sidestep.trainer_hooks.transport import InProcessTransport

TOKENIZER = ChatTokenizer()


@dataclass
class Bounds:
    max_sample_length: int = 4096
    max_images_per_example: int = 4


class Conversations:
    """nanoVLM's VQADataset: an iterator over conversations, some of which its ratings filter out."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows
        self.num_read = 0

    def iter_for_worker(self) -> Iterator[Any]:
        for row in self.rows:
            self.num_read += 1
            torch.rand(3)  # an image transform that draws
            yield row


class Packed(IterableDataset[Any]):
    """nanoVLM's ConstantLengthDataset: iterating it starts a thread, indexing it raises."""

    def __init__(self, dataset: Conversations) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("the packed rows were iterated")

    def __getitem__(self, index: int) -> Any:
        raise NotImplementedError


def conversation(kind: Kind, index: int, *, ignored: bool = False) -> tuple[dict[str, Any], str]:
    _, images = load_splits()
    encoded = encode_sample(ask(kind, images, index, _rng(index)), images, TOKENIZER)
    ids = torch.tensor(encoded.input_ids)
    labels = torch.tensor(encoded.labels)
    row = {
        "input_ids": ids,
        "labels": torch.full_like(labels, -100) if ignored else labels,
        "attention_mask": torch.ones_like(ids),
        "images": encoded.images,
    }
    return row, ask(kind, images, index, _rng(index)).turns[0].answer


def _rng(seed: int) -> Any:
    return np.random.default_rng(seed)


def loader_of(rows: list[Any]) -> tuple[DataLoader[Any], Conversations]:
    conversations = Conversations(rows)
    return DataLoader(Packed(conversations), generator=torch.Generator()), conversations


def samples(rows: list[Any], count: int = 16, bounds: Any = None) -> list[Any]:
    return nanovlm.validation_samples(loader_of(rows)[0], TOKENIZER, count=count, train_cfg=bounds)


def test_prompts_end_before_the_answer_and_have_their_images_prepared() -> None:
    kinds = list(Kind)
    made = [conversation(kind, index) for index, kind in enumerate(kinds)]
    found = samples([row for row, _ in made])
    assert len(found) == len(kinds)
    for sample, (row, answer) in zip(found, made, strict=True):
        prompt, ids = sample.prompt(), row["input_ids"].tolist()
        assert prompt == ids[: len(prompt)]
        assert TOKENIZER.decode(TOKENIZER.until_end(ids[len(prompt) :])) == answer == sample.target.strip()
        assert sample.inputs["images"] == row["images"]
        assert "<|" not in sample.question


def test_what_training_would_not_take_is_left_out() -> None:
    rows = [conversation(kind, index)[0] for index, kind in enumerate(list(Kind))]
    longest = sorted(len(row["input_ids"]) for row in rows)[len(rows) // 2]
    short = samples([None, *rows], bounds=Bounds(max_sample_length=longest))
    assert len(short) == sum(len(row["input_ids"]) < longest for row in rows)
    with_one = samples(rows, bounds=Bounds(max_images_per_example=1))
    assert len(with_one) == sum(len(row["images"]) <= 1 for row in rows)


def test_no_more_is_read_than_is_wanted() -> None:
    row, _ = conversation(next(iter(Kind)), 0)
    loader, conversations = loader_of([row] * 50)
    assert len(nanovlm.validation_samples(loader, TOKENIZER, count=3)) == 3
    assert conversations.num_read == 3


def test_a_data_set_without_labels_is_not_read_to_its_end() -> None:
    row, _ = conversation(next(iter(Kind)), 0, ignored=True)
    loader, conversations = loader_of([row] * 500)
    with pytest.raises(ValueError, match="labels all ignored"):
        nanovlm.validation_samples(loader, TOKENIZER, count=2)
    assert conversations.num_read <= 17


def test_packed_rows_of_another_loader_are_cut_as_well() -> None:
    training = build(Settings(batch_size=2))
    found = nanovlm.validation_samples(training.loader, training.tokenizer, count=4)
    assert len(found) == 4
    assert all(sample.target and sample.prompt() for sample in found)


def attach(training: Training, loader: Any) -> tuple[nanovlm.NanoVLMHooks, list[InProcessTransport]]:
    opened: list[InProcessTransport] = []

    def way(*given: Any) -> InProcessTransport:
        opened.append(InProcessTransport(*given))
        return opened[-1]

    hooks = nanovlm.attach(
        training.model, training.optimizer, loader, tokenizer=training.tokenizer, transport=way, max_new_tokens=4
    )
    return hooks, opened


def test_attach_puts_random_state_back_and_touches_no_generator() -> None:
    loader, _ = loader_of([conversation(kind, 1)[0] for kind in Kind])
    assert isinstance(loader.generator, torch.Generator)
    training = build(Settings(batch_size=2))
    before = torch.get_rng_state(), loader.generator.get_state()
    hooks, opened = attach(training, loader)
    assert torch.equal(before[0], torch.get_rng_state())
    assert torch.equal(before[1], loader.generator.get_state())
    hooks.after_step(0)
    assert opened[0].hello.capabilities["generation"] == "exact"
    hooks.close()


def test_labels_that_are_all_ignored_are_said_and_training_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    loader, _ = loader_of([conversation(kind, 1, ignored=True)[0] for kind in Kind])
    hooks, opened = attach(build(Settings(batch_size=2)), loader)
    said = capsys.readouterr().err
    assert "no samples could be made of the validation loader (ValueError: no sample could be made" in said
    assert "generation and the collapse rules are off" in said
    hooks.after_step(0)
    assert opened[0].hello.capabilities["generation"].startswith("absent")
    hooks.close()
