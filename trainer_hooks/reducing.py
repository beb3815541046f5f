"""From a batch to what is kept of it: the reductions that are due, none of whose results is the trainer's memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from sidestep.trainer_hooks.capture import Batch
from sidestep.trainer_hooks.config import HooksConfig
from sidestep.trainer_hooks.late_answers import LabelReading
from sidestep.trainer_hooks.open_step import MicroBatch, Tensors
from sidestep.trainer_hooks.reductions.alignment import AlignedBatch, align
from sidestep.trainer_hooks.reductions.answers import reduce_answers
from sidestep.trainer_hooks.reductions.loss import reduce_loss
from sidestep.trainer_hooks.reductions.tokens import reduce_tokens
from sidestep.trainer_hooks.vocabulary import Vocabulary

_SEEDS_PER_STEP = 4096


class Reducer:
    """Knows the ids and the convention of the labels; makes a ``MicroBatch`` of a batch.

    Args:
        config: the hooks' configuration.
        vocabulary: the tokenizer's ids.
        num_ids: ids that token counts have a place for; 0: as many as the logits are wide.
        shifted: what the name of the forward's label argument says.
    """

    def __init__(self, config: HooksConfig, vocabulary: Vocabulary, *, num_ids: int, shifted: bool | None) -> None:
        self._config = config
        self._vocabulary = vocabulary
        self._num_ids = num_ids
        self._shifted = shifted
        self._readings = tuple(
            LabelReading(shifted=each, ignore_index=config.ignore_index, eos_id=vocabulary.eos_id)
            for each in (False, True)
        )

    def is_shifted(self, batch: Batch) -> bool:
        """Explicit, else configured, else told by the argument's name, else as Hugging Face: not shifted."""
        if batch.shifted is not None and not batch.captured:
            return batch.shifted
        told = (self._config.shifted, batch.shifted, self._shifted)
        return next((value for value in told if value is not None), False)

    def reduce(self, batch: Batch, due: frozenset[str], step: int, microstep: int, epoch: int = 0) -> MicroBatch:
        """Reduce what is due of a micro-batch, and count its answers in any case; never waits for a device."""
        made = MicroBatch(captured=batch.captured, epoch=epoch)
        tokens_due, loss_due = "tokens" in due, "loss" in due
        if not tokens_due and not loss_due:
            if batch.labels is not None:
                self._count_answers(made, batch)
            return made
        aligned = self.aligned(batch, with_ids=True)
        sources = [
            value for value in (batch.input_ids, batch.labels, batch.loss, batch.token_losses) if _is_tensor(value)
        ]
        if batch.labels is not None:
            made.answers = reduce_answers(aligned)
        if tokens_due and aligned.input_ids is not None:
            num_ids = self._num_ids or (batch.logits.shape[-1] if batch.logits is not None else 0)
            if num_ids:
                made.tokens = _owned(reduce_tokens(aligned, num_ids), sources)
        if loss_due and batch.labels is not None:
            made.losses = _owned(self._losses(aligned, batch, step * _SEEDS_PER_STEP + microstep), sources)
            if "losses" not in made.losses:
                made.reason = batch.reason or (
                    "the trainer's forward shows no logits [b, t, v]; pass logits= or token_losses= to on_batch"
                )
        return made

    def _count_answers(self, made: MicroBatch, batch: Batch) -> None:
        """Count a micro-batch's answers, or copy its labels to be counted later where they are on the host."""
        labels = batch.labels
        has_documents = not (batch.documents is None and batch.cu_seqlens is None and batch.position_ids is None)
        if labels is None or has_documents or not labels.is_cpu:
            made.answers = reduce_answers(self.aligned(batch, with_ids=False))
            return
        made.labels = self._readings[self.is_shifted(batch)], labels.numpy().copy()

    def _losses(self, aligned: AlignedBatch, batch: Batch, seed: int) -> Tensors:
        return reduce_loss(
            aligned,
            logits=batch.logits,
            token_losses=batch.token_losses,
            hidden=batch.hidden,
            head=batch.head,
            trainer_loss=batch.loss,
            max_rows=self._config.loss_rows_per_microbatch,
            seed=seed,
        )

    def aligned(self, batch: Batch, *, with_ids: bool = True) -> AlignedBatch:
        """Align a batch with its logits, on its labels' device."""
        return align(
            input_ids=batch.input_ids if with_ids else None,
            labels=batch.labels,
            attention_mask=batch.attention_mask if with_ids else None,
            documents=batch.documents,
            cu_seqlens=batch.cu_seqlens,
            position_ids=batch.position_ids,
            shifted=self.is_shifted(batch),
            ignore_index=self._config.ignore_index,
            pad_id=self._vocabulary.pad_id,
            eos_id=self._vocabulary.eos_id,
        )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _owned(parts: Tensors, sources: Iterable[Any]) -> Tensors:
    """Copy what shares memory with the trainer's tensors: it is kept to the end of the step, they may change before."""
    taken = {_memory(source) for source in sources}
    return {name: part.clone() if _memory(part) in taken else part for name, part in parts.items()}


def _memory(tensor: torch.Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage()._cdata  # noqa: SLF001  (of tensors without memory too: fake ones)
