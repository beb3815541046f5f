from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sidestep.trainer_hooks.capture import ForwardReader

B, T, D, V = 2, 5, 16, 11
IDS = torch.arange(B * T).reshape(B, T) % V
LABELS = IDS.clone()
MASK = torch.ones_like(IDS)
LOGITS = torch.zeros(B, T, V)
HIDDEN = torch.zeros(B, T, D)
LOSS = torch.tensor(1.5)


class NanoLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Module()
        self.decoder.head = nn.Linear(D, V, bias=False)

    def forward(self, input_ids: Any, images: Any, attention_mask: Any = None, targets: Any = None) -> Any:
        raise NotImplementedError


class LibraryLike(nn.Module):
    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        raise NotImplementedError


def test_nanovlm_ids_are_positional_and_targets_are_shifted() -> None:
    reader = ForwardReader(NanoLike(), vocabulary_size=0)
    batch = reader.read((IDS, []), {"attention_mask": MASK, "targets": LABELS}, (LOGITS, LOSS))
    assert batch is not None
    assert (batch.input_ids is IDS, batch.labels is LABELS, batch.attention_mask is MASK) == (True, True, True)
    assert (batch.logits is LOGITS, batch.loss is LOSS, batch.shifted) == (True, True, True)
    assert reader.shifted is True


def test_hidden_states_are_never_taken_for_logits() -> None:
    reader = ForwardReader(NanoLike(), vocabulary_size=0)
    batch = reader.read((IDS, []), {}, (HIDDEN, None))
    assert batch is not None
    assert batch.logits is None
    by_vocabulary = ForwardReader(LibraryLike(), vocabulary_size=V)
    assert by_vocabulary.outputs((HIDDEN, LOSS), IDS.shape) == (HIDDEN, LOSS)  # 16 may be a padded 11 ...
    assert by_vocabulary.outputs((torch.zeros(B, T, 8), LOSS), IDS.shape)[0] is None  # ... 8 may not
    assert ForwardReader(LibraryLike(), vocabulary_size=0).outputs((HIDDEN, LOSS), IDS.shape)[0] is None


@pytest.mark.parametrize(
    "output",
    [
        SimpleNamespace(logits=LOGITS, loss=LOSS),
        {"loss": LOSS, "logits": LOGITS},
        OrderedDict(logits=LOGITS, loss=LOSS),
    ],
)
def test_named_outputs_are_read_by_name_and_labels_are_unshifted(output: Any) -> None:
    reader = ForwardReader(LibraryLike(), vocabulary_size=0)
    batch = reader.read((), {"input_ids": IDS, "labels": LABELS, "attention_mask": MASK[None, None]}, output)
    assert batch is not None
    assert (batch.logits is LOGITS, batch.loss is LOSS, batch.shifted) == (True, True, False)
    assert batch.attention_mask is None  # a 4-D mask is treated as no mask


def test_a_wrapped_model_is_read_by_its_inner_forward() -> None:
    wrapped: Any = torch.compile(NanoLike(), backend="eager")
    batch = ForwardReader(wrapped, vocabulary_size=0).read((IDS, [], MASK, LABELS), {}, (LOGITS, LOSS))
    assert batch is not None
    assert batch.labels is LABELS


def test_a_forward_without_ids_is_no_batch() -> None:
    assert ForwardReader(LibraryLike(), vocabulary_size=0).read((HIDDEN,), {}, (HIDDEN,)) is None


class EncoderDecoder(nn.Module):
    """An encoder that reads ``input_ids``, and a decoder that is trained on ``labels`` of a length of their own."""

    def forward(self, input_ids: Any = None, decoder_input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("length", [T, T + 3])
def test_of_an_encoder_decoder_the_labels_stand_beside_the_logits_and_the_ids_are_the_decoders(length: int) -> None:
    reader = ForwardReader(EncoderDecoder(), vocabulary_size=0)
    assert reader.shifted is True
    asked = torch.ones(B, length, dtype=torch.int64)
    batch = reader.read((), {"input_ids": asked, "labels": LABELS}, {"loss": LOSS, "logits": LOGITS})
    assert batch is not None
    assert (batch.labels is LABELS, batch.logits is LOGITS, batch.shifted) == (True, True, True)
    assert batch.input_ids is None, "those of the encoder do not go with the labels, whatever their length"
    assert batch.encoder_ids is asked
    moved = torch.zeros_like(IDS)
    batch = reader.read((), {"input_ids": asked, "decoder_input_ids": moved, "labels": LABELS}, {"logits": LOGITS})
    assert batch is not None
    assert batch.input_ids is moved
    assert reader.read((), {"input_ids": asked}, {"logits": LOGITS}) is None


def test_a_configuration_tells_an_encoder_decoder_whose_forward_does_not() -> None:
    class Told(LibraryLike):
        config = SimpleNamespace(is_encoder_decoder=True)

    class Denied(EncoderDecoder):
        config = SimpleNamespace(is_encoder_decoder=False)

    assert ForwardReader(Told(), vocabulary_size=0).shifted is True
    assert ForwardReader(Denied(), vocabulary_size=0).shifted is False
