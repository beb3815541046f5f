"""What a training forward shows: ids, labels, mask, logits and loss, found in its arguments and its output."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from sidestep.trainer_hooks.heads import find_head, head_sizes, parameter_names
from sidestep.trainer_hooks.meshes import whole_or_none
from sidestep.trainer_hooks.parameters import unwrapped

_IDS = ("input_ids", "tokens", "idx", "input")
_SHIFTED_LABELS = ("shift_labels", "targets", "target")
_PLAIN_LABELS = ("labels",)
_MASKS = ("attention_mask", "padding_mask")
_DOCUMENTS = ("document_ids", "documents", "seq_idx")
_POSITIONS = ("position_ids",)
_CUMULATED = ("cu_seqlens", "cu_seq_lens_q")
_DECODER_IDS = ("decoder_input_ids",)
_DECODER_MASKS = ("decoder_attention_mask",)
_DECODER_POSITIONS = ("decoder_position_ids",)
_PADDED_VOCABULARY_SHARE = 1.1
_PADDED_VOCABULARY_ROWS = 1024

SPREAD_LOGITS = (
    "the logits are spread over ranks (loss parallel): no rank has a whole row of them, and joining them would be a "
    "collective"
)
"""Why there are no per-token losses under a loss that is computed on shares of the vocabulary."""


@dataclass(slots=True, kw_only=True, eq=False)
class Batch:
    """One micro-batch as far as it is known; nothing here outlives the call that made it.

    Not frozen: a frozen one takes four times as long to make, and one is made in every micro-batch.
    """

    input_ids: torch.Tensor | None = None
    """[b, t]"""
    labels: torch.Tensor | None = None
    """[b, t]"""
    attention_mask: torch.Tensor | None = None
    """[b, t]; masks of other shapes are left out (docs/metrics.md, "Real")."""
    position_ids: torch.Tensor | None = None
    """[b, t], [1, t], or [k, b, t] of which the first is read."""
    documents: torch.Tensor | None = None
    """Document number of each position [b, t]."""
    logits: torch.Tensor | None = None
    """[b, t, v]"""
    loss: torch.Tensor | float | None = None
    """The trainer's own number."""
    token_losses: torch.Tensor | None = None
    """The trainer's own losses per position [b, t], unreduced."""
    hidden: torch.Tensor | None = None
    """Last hidden states [b, t, d], where there are no logits."""
    head: nn.Module | torch.Tensor | None = None
    """What turns them into logits."""
    encoder_ids: torch.Tensor | None = None
    """What an encoder reads [b, s], where the labels are those of a decoder: it tells samples apart."""
    cu_seqlens: torch.Tensor | None = None
    """Cumulated lengths of the documents over the flattened positions [documents + 1]."""
    shifted: bool | None = None
    """Whether ``labels[t]`` is the target of ``logits[t]``; None: not told."""
    epoch: int | None = None
    captured: bool = False
    """Seen by the forward hook, not passed by the trainer."""
    reason: str = ""
    """Why there are no logits, where that is known."""


_TENSOR_FIELDS = (  # in the order in which whole_batch takes them
    "input_ids", "labels", "attention_mask", "position_ids", "documents", "logits", "loss", "token_losses", "hidden",
    "cu_seqlens", "encoder_ids",
)  # fmt: skip


_PLAIN = frozenset((torch.Tensor, type(None), float))


def whole_batch(batch: Batch) -> Batch:
    """Return the batch with local values for distributed tensors, and without those of which this rank has a part."""
    values = (  # written out: an attrgetter takes twice as long among cold caches
        batch.input_ids, batch.labels, batch.attention_mask, batch.position_ids, batch.documents, batch.logits,
        batch.loss, batch.token_losses, batch.hidden, batch.cu_seqlens, batch.encoder_ids,
    )  # fmt: skip
    if _PLAIN.issuperset(map(type, values)):  # in nearly all trainings, and much cheaper to ask
        return batch
    spread = {
        name: value
        for name, value in zip(_TENSOR_FIELDS, values, strict=True)
        if isinstance(value, torch.Tensor) and type(value) is not torch.Tensor
    }
    if not spread:
        return batch
    whole: dict[str, Any] = {name: whole_or_none(value) for name, value in spread.items()}
    lost = "logits" in whole and whole["logits"] is None
    return replace(batch, **whole, reason=SPREAD_LOGITS if lost else batch.reason)


@dataclass(frozen=True, slots=True)
class Outputs:
    """Weak references to what the newest forward gave, for an explicit call that does not pass it."""

    logits: weakref.ref[torch.Tensor] | None
    loss: weakref.ref[torch.Tensor] | None


def remember_outputs(logits: torch.Tensor | None, loss: Any) -> Outputs:
    """Return weak references to what a forward gave."""
    return Outputs(
        weakref.ref(logits) if isinstance(logits, torch.Tensor) else None,
        weakref.ref(loss) if isinstance(loss, torch.Tensor) else None,
    )


def complete_batch(batch: Batch, outputs: Outputs) -> Batch:
    """Return an explicit batch, with the logits and the loss of its forward where the trainer did not pass them."""
    logits = outputs.logits() if outputs.logits is not None and batch.logits is None else batch.logits
    loss = outputs.loss() if outputs.loss is not None and batch.loss is None else batch.loss
    shape = batch.labels if batch.labels is not None else batch.input_ids
    fits = logits is not None and shape is not None and logits.shape[:-1].numel() == shape.numel()
    wanted = batch.token_losses is None and batch.hidden is None
    return replace(batch, logits=logits if batch.logits is not None or (fits and wanted) else None, loss=loss)


class ForwardReader:
    """Reads batches off the outermost module's forward, by the names of the innermost one's arguments.

    The names are looked up once. Hidden states are never taken for logits: the last axis must be as wide as the model's
    head, or else as the tokenizer's vocabulary (docs/trainer.md, section 1).
    """

    def __init__(self, model: nn.Module, vocabulary_size: int) -> None:
        inner = unwrapped(model)
        self._names = parameter_names(inner.forward)
        self._has_encoder = has_encoder(inner)
        sizes = head_sizes(find_head(inner))
        self._head_size = sizes[0] if sizes is not None else 0
        self._vocabulary_size = vocabulary_size

    @property
    def shifted(self) -> bool | None:
        """What the name of the label argument says; None where there is none or both.

        A decoder behind an encoder is given the labels moved by one, or moves them itself: its logits are beside them.
        """
        already = any(name in self._names for name in _SHIFTED_LABELS)
        plain = any(name in self._names for name in _PLAIN_LABELS)
        if plain and self._has_encoder:
            return True
        return None if already == plain else already

    @property
    def label_argument(self) -> str:
        """The forward's argument that holds the labels, or empty."""
        return next((name for name in (*_SHIFTED_LABELS, *_PLAIN_LABELS) if name in self._names), "")

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a forward's arguments by the innermost module's names of them."""
        return {**dict(zip(self._names, args, strict=False)), **kwargs}

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Batch | None:
        """The batch of one forward; None where its token ids cannot be found."""
        given = self.arguments(args, kwargs)
        if self._has_encoder:
            return self._read_decoder(given, output)
        ids = _found_ids(given)
        shifted_labels = _integers(given, _SHIFTED_LABELS)
        labels = shifted_labels if shifted_labels is not None else _integers(given, _PLAIN_LABELS)
        if ids is None and labels is None:
            return None
        shape = (ids if ids is not None else labels).shape  # type: ignore[union-attr]
        logits, loss = self.outputs(output, shape)
        positions = given.get(_POSITIONS[0])
        cumulated = next((value for name in _CUMULATED if isinstance(value := given.get(name), torch.Tensor)), None)
        made = Batch(
            input_ids=ids,
            labels=labels if labels is not None and labels.shape == shape else None,
            attention_mask=_of_shape(given, _MASKS, shape),
            position_ids=positions if isinstance(positions, torch.Tensor) and positions.dim() <= 3 else None,
            cu_seqlens=cumulated,
            documents=_of_shape(given, _DOCUMENTS, shape),
            logits=logits,
            loss=loss,
            shifted=None if labels is None else shifted_labels is not None,
            captured=True,
        )
        return whole_batch(made)

    def _read_decoder(self, given: Mapping[str, Any], output: Any) -> Batch | None:
        """Read the decoder's part of an encoder-decoder; its ids are not there where it makes them of the labels."""
        ids, labels = _integers(given, _DECODER_IDS), _integers(given, _PLAIN_LABELS)
        told = ids if labels is None else labels
        if told is None:
            return None
        shape = told.shape
        logits, loss = self.outputs(output, shape)
        positions = given.get(_DECODER_POSITIONS[0])
        made = Batch(
            input_ids=ids if ids is not None and ids.shape == shape else None,
            encoder_ids=_integers(given, _IDS),
            labels=labels,
            attention_mask=_of_shape(given, _DECODER_MASKS, shape),
            position_ids=positions if isinstance(positions, torch.Tensor) else None,
            logits=logits,
            loss=loss,
            shifted=None if labels is None else True,
            captured=True,
        )
        return whole_batch(made)

    def outputs(self, output: Any, shape: torch.Size | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Logits [b, t, v] and scalar loss of a forward's output: by name, else by shape in a tuple or alone."""
        is_plain = type(output) is tuple  # asked first: whether it is a Mapping is a dear question among cold caches
        named = not is_plain and (isinstance(output, Mapping) or hasattr(output, "logits") or hasattr(output, "loss"))
        if is_plain:
            candidates: Sequence[Any] = output
        elif isinstance(output, Mapping):
            candidates = [output.get("logits"), output.get("loss")]
        elif named:
            candidates = [getattr(output, "logits", None), getattr(output, "loss", None)]
        else:
            candidates = list(output) if isinstance(output, tuple | list) else [output]
        tensors = [value for value in candidates if isinstance(value, torch.Tensor) and value.is_floating_point()]
        logits = next((value for value in tensors if self._is_logits(value, shape, named=named)), None)
        loss = next((value for value in tensors if value.numel() == 1 and value is not logits), None)
        return logits, loss

    def _is_logits(self, value: torch.Tensor, shape: torch.Size | None, *, named: bool) -> bool:
        if value.dim() != 3 or (shape is not None and value.shape[:2] != shape):
            return False
        width = value.shape[-1]
        if self._head_size:
            return width == self._head_size
        if self._vocabulary_size:
            most = max(
                self._vocabulary_size * _PADDED_VOCABULARY_SHARE, self._vocabulary_size + _PADDED_VOCABULARY_ROWS
            )
            return self._vocabulary_size <= width <= most
        return named


def has_encoder(model: nn.Module) -> bool:
    """Return whether an unwrapped model is an encoder-decoder, by its configuration or its forward's arguments."""
    told = getattr(getattr(model, "config", None), "is_encoder_decoder", None)
    return told if isinstance(told, bool) else _DECODER_IDS[0] in parameter_names(model.forward)


def ids_argument(given: Mapping[str, Any]) -> str | None:
    """Return the name of the argument that holds the token ids [b, t]; None where there is none."""
    ids = _found_ids(given)
    return None if ids is None else next(name for name, value in given.items() if value is ids)


def mask_argument(given: Mapping[str, Any], shape: torch.Size) -> torch.Tensor | None:
    """Return the attention mask among a forward's arguments; None where there is none of the ids' shape [b, t]."""
    return _of_shape(given, _MASKS, shape)


def _found_ids(given: Mapping[str, Any]) -> torch.Tensor | None:
    return _integers(given, _IDS) if any(name in given for name in _IDS) else _first_ids(given)


def _integers(given: Mapping[str, Any], names: tuple[str, ...]) -> torch.Tensor | None:
    for name in names:
        value = given.get(name)
        if isinstance(value, torch.Tensor) and value.dim() == 2 and _is_integer(value):
            return value
    return None


def _first_ids(given: Mapping[str, Any]) -> torch.Tensor | None:
    known = {*_SHIFTED_LABELS, *_PLAIN_LABELS, *_MASKS, *_DOCUMENTS, *_POSITIONS}
    for name, value in given.items():
        if name not in known and isinstance(value, torch.Tensor) and value.dim() == 2 and _is_integer(value):
            return value
    return None


def _of_shape(given: Mapping[str, Any], names: tuple[str, ...], shape: torch.Size) -> torch.Tensor | None:
    values = (given.get(name) for name in names)
    return next((value for value in values if isinstance(value, torch.Tensor) and value.shape == shape), None)


def _is_integer(value: torch.Tensor) -> bool:
    return not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool
