"""Healthy trainings that look alarming, held out with `known_third_failures.py`; each is a sixteenth of the steps."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from benchmarks.detection.case import Case, Family, Setup, Twist, healthy_case
from benchmarks.detection.cases.known_model import decoder_blocks
from benchmarks.detection.cases.known_optimisation import peak_rate
from benchmarks.detection.cases.known_third_model import EmbeddingNoise
from benchmarks.detection.cases.known_third_optimisation import Lion, OtherOptimiser
from benchmarks.detection.lab import Lab
from benchmarks.detection.scenes_suite import GLYPHS
from benchmarks.detection.talks import Encoded, Talk
from torch import nn
from torch.nn import functional

from sidestep.examples.digits_vqa.packing import IGNORE_INDEX, Batch
from sidestep.examples.digits_vqa.questions import WORDS

_ADAFACTOR_RATE_SHARE = 3.0
_ADAPTER_RANK = 8
_DROPS = ((0.85, 0.01), (0.6, 0.1))
"""Share of the run and share of the rate from there on, the last one first."""
_BATCHES = ((0.0, 6), (0.25, 12), (0.5, 24), (0.75, 48))
_FIRST_STAGE_SHARE = 0.3
_FOCUS = 2.0
_SHARE_UNREADABLE = 0.45
_TAIL = 2.0
_NUM_TURNS = 8
_LOW_RESOLUTION_SHARE, _LOW_RESOLUTION_FACTOR = 0.4, 2
_SHARE_OF_BLOCKS_LEFT_OUT = 0.2


def _begins_next(lab: Lab, share: float) -> bool:
    return lab.step + 1 == int(share * lab.num_steps)


class LowRankLinear(nn.Module):
    """A frozen linear map and an adapter of low rank beside it, which begins at zero."""

    def __init__(self, frozen: nn.Linear, rng: np.random.Generator) -> None:
        """Keep the map and draw the adapter's first half."""
        super().__init__()
        self.frozen = frozen.requires_grad_(requires_grad=False)
        drawn = rng.normal(scale=frozen.in_features**-0.5, size=(_ADAPTER_RANK, frozen.in_features))
        self.down = nn.Parameter(torch.from_numpy(drawn).float())
        self.up = nn.Parameter(torch.zeros(frozen.out_features, _ADAPTER_RANK))

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """Return the sum of both, [..., out_features]."""
        mapped: torch.Tensor = self.frozen(given)
        return mapped + functional.linear(functional.linear(given, self.down), self.up)


class WithAdapters(Twist):
    """A trained model is adapted by maps of rank 8 (Hu et al. 2021, arXiv:2106.09685); nothing else learns."""

    def begin(self, lab: Lab) -> None:
        """Put adapters beside all linear maps of the blocks, and step them alone."""
        for replica in lab.replicas:
            replica.model.requires_grad_(requires_grad=False)
            for block in replica.model.decoder.blocks:
                for name, part in list(block.named_children()):
                    if isinstance(part, nn.Linear):
                        setattr(block, name, LowRankLinear(part, lab.rng))
            learned = [each for each in replica.model.parameters() if each.requires_grad]
            replica.optimizer = torch.optim.AdamW(learned, lr=peak_rate(lab), weight_decay=0.0)


class RateInSteps(Twist):
    """The rate is a tenth after 60 % of the run and a hundredth after 85 % (He et al. 2015, arXiv:1512.03385)."""

    def rate(self, lab: Lab, rate: float) -> float:
        """Follow the steps after the usual warm-up."""
        for begins, share in _DROPS:
            if lab.step >= begins * lab.num_steps:
                return peak_rate(lab) * share
        return rate if lab.step < lab.num_steps // 10 else peak_rate(lab)


class BatchGrows(Twist):
    """A step begins with 6 samples and ends with 48, in announced stages (Brown et al. 2020, arXiv:2005.14165)."""

    def begin(self, lab: Lab) -> None:
        """Begin with the smallest."""
        lab.setup = replace(lab.setup, batch_samples=_BATCHES[0][1])

    def after_step(self, lab: Lab) -> None:
        """Go on to the next size."""
        for share, size in _BATCHES[1:]:
            if _begins_next(lab, share):
                lab.setup = replace(lab.setup, batch_samples=size)
                lab.announce(f"batches_of_{size}")


class TwoStages(Twist):
    """One kind of talk for 30 % of the run, under a frozen language model if so wished; then all, announced."""

    def __init__(self, kind: str, following: str, *, is_frozen: bool = False) -> None:
        """Begin with `kind`, and announce `following`."""
        self._kind, self._following, self._is_frozen = kind, following, is_frozen

    def begin(self, lab: Lab) -> None:
        """Set the first stage's mix, and freeze."""
        lab.mix = {self._kind: 1.0}
        for replica in lab.replicas:
            replica.model.decoder.requires_grad_(requires_grad=not self._is_frozen)

    def after_step(self, lab: Lab) -> None:
        """Bring in all tasks and all weights."""
        if _begins_next(lab, _FIRST_STAGE_SHARE):
            lab.mix = dict(lab.setup.mix or lab.suite.mix)
            for replica in lab.replicas:
                replica.model.requires_grad_(requires_grad=True)
            lab.announce(self._following)


class Focal(Twist):
    """The focal loss with gamma 2 (Lin et al. 2017, arXiv:1708.02002): what is known counts for little."""

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Weigh each token by how uncertain it is."""
        labelled = batch["labels"] != IGNORE_INDEX
        each = functional.cross_entropy(logits[labelled].float(), batch["labels"][labelled], reduction="none")
        return ((1 - (-each).exp()) ** _FOCUS * each).mean()


class OftenUnanswerable(Twist):
    """45 % of the photographs show nothing, and their answer says so (VizWiz, Gurari et al. 2018, arXiv:1802.08218)."""

    def __init__(self) -> None:
        self._shows_nothing = False

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """Draw whether it can be answered."""
        self._shows_nothing = bool(rng.random() < _SHARE_UNREADABLE)
        return replace(talk, answer="unanswerable") if self._shows_nothing else talk

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Blur those beyond recognition."""
        if not self._shows_nothing:
            return sample
        return replace(sample, images=[image.mean().expand_as(image).clone() for image in sample.images])


class LongTailOfClasses(Twist):
    """A class is as frequent as one over the square of its number (as of iNaturalist, arXiv:1707.06642)."""

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:
        """Draw again most times when the class is a rare one."""
        names = GLYPHS if lab.suite.name == "scenes" else WORDS
        while rng.random() >= (1 + [name in talk.answer for name in names].index(True)) ** -_TAIL:
            talk = lab.suite.draw(talk.kind, int(rng.choice(lab.image_pool)), rng)
        return talk


class AnswersInJson(Twist):
    """Answers are objects in JSON, of which most tokens are always the same."""

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """Write the object."""
        return replace(talk, answer=json.dumps({"task": talk.kind, "answer": talk.answer, "source": "image"}))


class TasksInTurn(Twist):
    """Short and long answers take turns, eight times, each announced: domains are trained one after another."""

    _TURNS: tuple[dict[str, float], ...] = ({"yes_no": 0.5, "naming": 0.5}, {"caption": 0.5, "table": 0.5})

    def begin(self, lab: Lab) -> None:
        """Begin with short ones."""
        lab.mix = dict(self._TURNS[0])

    def after_step(self, lab: Lab) -> None:
        """Give the other ones their turn."""
        for turn in range(1, _NUM_TURNS):
            if _begins_next(lab, turn / _NUM_TURNS):
                lab.mix = dict(self._TURNS[turn % len(self._TURNS)])
                lab.announce(f"turn_{turn}")


class ResolutionGrows(Twist):
    """Images have half their resolution at first, and all of it later, announced (Touvron et al., arXiv:1906.06423)."""

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Coarsen the images of the first stage."""
        if lab.step >= int(_LOW_RESOLUTION_SHARE * lab.num_steps):
            return sample
        coarse = [functional.avg_pool2d(image, _LOW_RESOLUTION_FACTOR) for image in sample.images]
        return replace(sample, images=[functional.interpolate(each, scale_factor=2, mode="nearest") for each in coarse])

    def after_step(self, lab: Lab) -> None:
        """Announce the second stage."""
        if _begins_next(lab, _LOW_RESOLUTION_SHARE):
            lab.announce("full_resolution")


class StochasticDepth(Twist):
    """In training each sample leaves out a fifth of all blocks (Huang et al. 2016, arXiv:1603.09382)."""

    def __init__(self) -> None:
        self._generator = torch.Generator()

    def begin(self, lab: Lab) -> None:
        """Put it behind the blocks of encoder and language model."""
        self._generator.manual_seed(int(lab.rng.integers(2**31)))
        for replica in lab.replicas:
            for block in replica.model.vision_encoder.blocks:
                block.register_forward_hook(self._thinned)
        for decoder_block in decoder_blocks(lab):
            decoder_block.register_forward_hook(self._thinned)

    def _thinned(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> Any:
        if not module.training:
            return output
        given = inputs[0]
        hidden = cast("torch.Tensor", output[0] if isinstance(output, tuple) else output)
        is_kept = torch.rand((len(given), 1, 1), generator=self._generator) >= _SHARE_OF_BLOCKS_LEFT_OUT
        thinned = given + (hidden - given) * is_kept / (1 - _SHARE_OF_BLOCKS_LEFT_OUT)
        return (thinned, *output[1:]) if isinstance(output, tuple) else thinned


_data, _model = (partial(healthy_case, family=family) for family in (Family.DATA, Family.MODEL))

CASES: tuple[Case, ...] = (
    healthy_case("lion", "Lion at a tenth of the rate", "as advised", twist=partial(OtherOptimiser, Lion, 0.1)),
    healthy_case(
        "adafactor",
        "Adafactor, whose rates follow the weights' own scale (arXiv:1804.04235)",
        "an optimizer of choice",
        twist=partial(OtherOptimiser, torch.optim.Adafactor, _ADAFACTOR_RATE_SHARE),
    ),
    healthy_case("rate_in_steps", "the rate falls to a tenth twice, at once", "a classic schedule", twist=RateInSteps),
    healthy_case("batch_grows", "6 samples a step become 48, announced", "a usual ramp", twist=BatchGrows),
    healthy_case("focal_loss", "the loss is a fraction of the cross-entropy", "a usual loss", twist=Focal),
    healthy_case(
        "polished_at_a_small_rate",
        "a trained model is trained on, at 3 % of the rate, and nothing seems to move",
        "the last stage of a training",
        setup=Setup(pretrained=True, rate_factor=0.03),
    ),
    _model(
        "low_rank_adapters",
        "a trained model learns two tasks by adapters; all else has no gradients, half of theirs are zero at first",
        "the usual fine-tuning",
        twist=WithAdapters,
        setup=Setup(pretrained=True, mix={"caption": 0.5, "table": 0.5}),
    ),
    _model("embedding_noise", "noise on the embeddings, alpha 5", "NEFTune", twist=EmbeddingNoise),
    _model("stochastic_depth", "a fifth of the blocks is left out", "a usual regularisation", twist=StochasticDepth),
    _model(
        "aligned_then_instructed",
        "captions under a frozen language model, then everything, announced",
        "two stages, as of LLaVA (arXiv:2304.08485)",
        twist=partial(TwoStages, "caption", "instruction_tuning", is_frozen=True),
        setup=Setup(warm_start=True),
    ),
    _data("text_then_images", "text, then all, announced", "two stages", twist=partial(TwoStages, "text", "images")),
    _data(
        "tasks_in_turn",
        "two groups of tasks take turns, announced",
        "one domain at a time",
        twist=TasksInTurn,
        setup=Setup(mix=dict.fromkeys(("yes_no", "naming", "caption", "table"), 0.25)),
    ),
    _data(
        "often_unanswerable",
        "45 % of the answers are the same word",
        "photographs are as they are",
        twist=OftenUnanswerable,
        is_skewed=True,
    ),
    _data(
        "long_tail_of_classes",
        "six answers in ten are one class",
        "classes are as frequent as they are",
        twist=LongTailOfClasses,
        setup=Setup(mix={"naming": 1.0}),
        is_skewed=True,
    ),
    _data("answers_in_json", "most tokens are always the same", "as asked", twist=AnswersInJson, is_skewed=True),
    healthy_case(
        "resolution_grows",
        "coarse images become fine ones, announced",
        "two stages",
        family=Family.IMAGE,
        twist=ResolutionGrows,
    ),
)
