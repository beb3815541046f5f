"""What the demo's tests share: the tokenizer, the images and an untrained model."""

from __future__ import annotations

import pytest
import torch

from sidestep.examples.digits_vqa.digits import DigitImages, load_splits
from sidestep.examples.digits_vqa.model import VisionLanguageModel
from sidestep.examples.digits_vqa.tokenizer import ChatTokenizer


@pytest.fixture(scope="session")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer()


@pytest.fixture(scope="session")
def splits() -> tuple[DigitImages, DigitImages]:
    return load_splits()


@pytest.fixture
def training_images(splits: tuple[DigitImages, DigitImages]) -> DigitImages:
    return splits[0]


@pytest.fixture
def held_out(splits: tuple[DigitImages, DigitImages]) -> DigitImages:
    return splits[1]


@pytest.fixture
def model(tokenizer: ChatTokenizer) -> VisionLanguageModel:
    torch.manual_seed(7)
    return VisionLanguageModel(
        vocabulary_size=len(tokenizer), image_token_id=tokenizer.image_token_id, eos_token_id=tokenizer.eos_token_id
    )
