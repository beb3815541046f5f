"""Failures of the model that were held out once: what it sees, what its layers do, and what its weights become."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import torch
from benchmarks.detection.case import LATE, Blame, Case, Family, Harm, Setup, Twist
from benchmarks.detection.lab import Lab
from torch import nn
from torch.nn import functional

from sidestep.examples.digits_vqa.decoder import DecoderBlock
from sidestep.examples.digits_vqa.packing import Batch

_WRONG_DROPOUT = 0.9
_WRONG_SCALE = 10.0
_SHARE_OF_SILENT_HEADS = 0.5
_OVERWRITING_INTERVAL_STEPS = 25
_NUM_TALKS_READ = 300
_CORRUPTED_ONE_IN = 1_000


def decoder_blocks(lab: Lab) -> Iterator[DecoderBlock]:
    """Yield the language model's blocks, of all ranks."""
    for replica in lab.replicas:
        for block in replica.model.decoder.blocks:
            yield cast("DecoderBlock", block)


class Dropout(Twist):
    """Dropout behind attention and perceptron of every block of the language model, in training mode alone."""

    def __init__(self, share: float) -> None:
        """Drop `share` of the activations."""
        self._share = share

    def begin(self, lab: Lab) -> None:
        """Add it."""
        for block in decoder_blocks(lab):
            block.out_proj.register_forward_hook(self._drop)
            block.down_proj.register_forward_hook(self._drop)

    def _drop(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        del inputs
        return functional.dropout(output, self._share, training=module.training)


class MaskInverted(Twist):
    """The attention mask is inverted: for one of PyTorch's attentions True means "look here", for another "do not"."""

    def batch(self, lab: Lab, rank: int, batch: Batch) -> Batch:  # noqa: ARG002
        """Swap ones and zeros."""
        return Batch(**{**batch, "attention_mask": 1 - batch["attention_mask"]})


class FutureVisible(Twist):
    """The causal mask is lost in training: the kernel is given a mask, so it no longer applies its own.

    The loss looks splendid, since every target can be read; evaluation runs by the path with a cache and is causal.
    """

    def begin(self, lab: Lab) -> None:
        """Let every position see later ones of its own document."""
        for block in decoder_blocks(lab):
            block.register_forward_pre_hook(self._see_all)

    @staticmethod
    def _see_all(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, angles, seen, *rest = inputs
        if not module.training or seen.shape[-1] != seen.shape[-2]:
            return inputs
        return (hidden, angles, seen | seen.transpose(-1, -2), *rest)


class RotaryTablesLost(Twist):
    """The rotary tables are zeros: buffers that no checkpoint holds, of a model rebuilt on the meta device.

    Queries and keys become zero, so every position looks everywhere alike.
    """

    def begin(self, lab: Lab) -> None:
        """Empty the tables."""
        for replica in lab.replicas:
            replica.model.decoder.cosine.zero_()
            replica.model.decoder.sine.zero_()


class BlockTimesTen(Twist):
    """One perceptron's output is ten times too large: a kernel, or a quantisation, that applies its scale twice."""

    def begin(self, lab: Lab) -> None:
        """Scale the first block's."""
        for replica in lab.replicas:
            cast("DecoderBlock", replica.model.decoder.blocks[0]).down_proj.register_forward_hook(self._scale)

    @staticmethod
    def _scale(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        del module, inputs
        return output * _WRONG_SCALE


class HeadsSilent(Twist):
    """Half of the attention heads say nothing: one shard of a tensor-parallel layer is not gathered."""

    def begin(self, lab: Lab) -> None:
        """Silence them in all blocks."""
        for block in decoder_blocks(lab):
            block.out_proj.register_forward_pre_hook(self._silence)

    @staticmethod
    def _silence(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        del module
        attended = inputs[0].clone()
        attended[..., : int(attended.shape[-1] * _SHARE_OF_SILENT_HEADS)] = 0.0
        return (attended,)


class AnswerRowsOverwritten(Twist):
    """The embeddings of the answers' tokens go back to random rows at every checkpoint.

    Resizing a vocabulary initialises its rows anew; called from a callback that saves, it does so again and again.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._rows = torch.empty(0)
        self._begun = 0

    def begin(self, lab: Lab) -> None:
        """Collect the tokens that answers consist of, and overwrite them for the first time."""
        said: set[int] = set()
        for kind in lab.mix:
            for image in lab.rng.choice(lab.image_pool, _NUM_TALKS_READ // len(lab.mix)):
                said.update(lab.suite.tokenizer.encode_answer(lab.suite.draw(kind, int(image), lab.rng).answer))
        self._ids = sorted(said)
        width = lab.model.decoder.token_embedding.embedding_dim
        drawn = lab.rng.normal(scale=width**-0.5, size=(len(self._ids), width))
        self._rows = torch.from_numpy(drawn).float()
        self._begun = lab.step
        self._overwrite(lab)

    def after_step(self, lab: Lab) -> None:
        """Overwrite them at every checkpoint."""
        if (lab.step + 1 - self._begun) % _OVERWRITING_INTERVAL_STEPS == 0:
            self._overwrite(lab)

    def _overwrite(self, lab: Lab) -> None:
        with torch.no_grad():
            for replica in lab.replicas:
                replica.model.decoder.token_embedding.weight[self._ids] = self._rows


class SlowCorruption(Twist):
    """Every step a thousandth of the language model's weights are replaced by noise of their own scale.

    Silent data corruption in the memory of one machine (Dixit et al. 2021, arXiv:2102.11245).
    """

    def after_step(self, lab: Lab) -> None:
        """Corrupt the same entries on all ranks."""
        with torch.no_grad():
            for weights in zip(*(each.model.decoder.parameters() for each in lab.replicas), strict=True):
                if weights[0].dim() > 1:
                    self._corrupt(lab, weights)

    @staticmethod
    def _corrupt(lab: Lab, weights: tuple[nn.Parameter, ...]) -> None:
        size = weights[0].numel() // _CORRUPTED_ONE_IN
        places = torch.from_numpy(lab.rng.integers(weights[0].numel(), size=size))
        noise = torch.from_numpy(lab.rng.normal(size=size)).float() * weights[0].std()
        for weight in weights:
            weight.view(-1)[places] = noise


class OnlyNormsLearn(Twist):
    """A resumed run freezes the language model but for its norms: the list of what to train matches too little."""

    def begin(self, lab: Lab) -> None:
        """Freeze."""
        for replica in lab.replicas:
            for name, parameter in replica.model.decoder.named_parameters():
                parameter.requires_grad_("norm" in name)


class HeadUntied(Twist):
    """The head is no longer the embedding: weights are not tied again after loading.

    The optimizer does not know the new head, so it neither learns nor is its gradient ever zeroed; that gradient grows
    and takes the whole of the clipped norm.
    """

    def begin(self, lab: Lab) -> None:
        """Give the head a copy."""
        for replica in lab.replicas:
            decoder = replica.model.decoder
            decoder.head.weight = nn.Parameter(decoder.token_embedding.weight.detach().clone())


class StaleRank(Twist):
    """The second rank keeps the weights of the onset, and its gradients go into everybody's mean.

    A rank that joined again after a fault and took part in the reduction, but not in the broadcast of weights.
    """

    def __init__(self) -> None:
        self._weights: list[torch.Tensor] = []

    def begin(self, lab: Lab) -> None:
        """Remember its weights."""
        self._weights = [each.detach().clone() for each in lab.replicas[1].model.parameters()]

    def after_step(self, lab: Lab) -> None:
        """Put them back."""
        with torch.no_grad():
            for parameter, weight in zip(lab.replicas[1].model.parameters(), self._weights, strict=True):
                parameter.copy_(weight)


class RottenShard(Twist):
    """The second rank's shard is rotten: its labels stand at other positions than they belong to."""

    def batch(self, lab: Lab, rank: int, batch: Batch) -> Batch:
        """Shuffle the labelled targets of the second rank."""
        if rank != 1:
            return batch
        labels = batch["labels"].clone()
        labelled = labels >= 0
        found = labels[labelled]
        labels[labelled] = found[torch.from_numpy(lab.rng.permutation(len(found)))]
        return Batch(**{**batch, "labels": labels})


def _failure(name: str, what: str, twist: Callable[[], Twist], *also: Blame) -> Case:
    blame = frozenset({Blame.MODULE, *also})
    return Case(name=name, family=Family.MODEL, what=what, is_failure=True, twist=twist, onset_share=LATE, blame=blame)


CASES: tuple[Case, ...] = (
    _failure(
        "dropout_of_nine_tenths",
        "dropout drops what it should keep: 90 %",
        partial(Dropout, _WRONG_DROPOUT),
    ),
    _failure(
        "attention_mask_inverted",
        "padding is attended to, and nothing else",
        MaskInverted,
        Blame.DATA,
        Blame.LOADER,
    ),
    _failure("future_visible", "the causal mask is lost in training", FutureVisible, Blame.LABELS),
    _failure("rotary_tables_lost", "the rotary tables are zeros", RotaryTablesLost, Blame.WEIGHTS),
    _failure("block_output_times_ten", "one perceptron's output is ten times too large", BlockTimesTen, Blame.WEIGHTS),
    _failure(
        "half_of_the_heads_silent", "two of four attention heads say nothing, in all blocks", HeadsSilent, Blame.WEIGHTS
    ),
    _failure(
        "answer_rows_overwritten",
        "embeddings of answers become random every 25 steps",
        AnswerRowsOverwritten,
        Blame.WEIGHTS,
    ),
    _failure("slow_corruption", "a thousandth of the weights becomes noise every step", SlowCorruption, Blame.WEIGHTS),
    _failure("only_norms_learn", "the language model is frozen but for its norms", OnlyNormsLearn, Blame.OPTIMISER),
    _failure("head_untied", "the head is a copy that no optimizer knows", HeadUntied, Blame.OPTIMISER),
    Case(
        name="stale_rank",
        family=Family.RANKS,
        what="one of two ranks keeps old weights and sends gradients all the same",
        is_failure=True,
        twist=StaleRank,
        setup=Setup(num_ranks=2),
        onset_share=LATE,
        blame=frozenset({Blame.RANKS, Blame.WEIGHTS}),
        harm=Harm.INVARIANT,
        invariant="all ranks hold the same weights",
    ),
    Case(
        name="one_rotten_shard",
        family=Family.RANKS,
        what="the labels of one of two ranks stand at wrong positions",
        is_failure=True,
        twist=RottenShard,
        setup=Setup(num_ranks=2),
        onset_share=LATE,
        blame=frozenset({Blame.RANKS, Blame.LABELS, Blame.DATA}),
    ),
)
