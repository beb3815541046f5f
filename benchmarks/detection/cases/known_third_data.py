"""Held-out failures of the data: what is asked and answered, which samples come when, and what their images become."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from benchmarks.detection.case import LATE, Blame, Case, Family, Harm, Twist, failure_case
from benchmarks.detection.cases.known_data import split_answer, with_answer
from benchmarks.detection.lab import Lab
from benchmarks.detection.talks import Encoded, Talk
from torch.nn import functional

from sidestep.examples.digits_vqa.packing import IGNORE_INDEX, Batch

_LABELS = frozenset({Blame.LABELS, Blame.DATA})
_LOADER = frozenset({Blame.LOADER, Blame.DATA})
_IMAGES = frozenset({Blame.IMAGES, Blame.DATA})
_NUM_WORKERS = 4
_NUM_REWOUND_STEPS = 20
_LARGEST_ID_IN_A_BYTE = 255
_LEAST_AREA = 0.08
_WIDEST_RATIO = 4 / 3
_NUM_IMAGES_SEEN = 100
_SHARE_FLIPPED = 0.5


class WorkersDrawAlike(Twist):
    """Four workers of a loader have one seed between them, so each batch comes four times in a row.

    pytorch/pytorch#5059 and #41329: a stream that draws with numpy's generator, forked into every worker.
    """

    def __init__(self) -> None:
        self._kept: Batch | None = None

    def batch(self, lab: Lab, rank: int, batch: Batch) -> Batch:  # noqa: ARG002
        """Return the first worker's batch in the place of the other ones'."""
        if self._kept is None or lab.step % _NUM_WORKERS == 0:
            self._kept = batch
        return self._kept


class HeaderTwice(Twist):
    """The assistant's header stands twice, the second time as a part of the answer.

    The prompt was rendered with `add_generation_prompt=True`, and the answer with the whole template
    (huggingface/transformers#27443 on templates in training, huggingface/trl#1675).
    """

    def __init__(self) -> None:
        self._header: list[int] = []

    def begin(self, lab: Lab) -> None:
        """Find what the template puts between any question and its answer."""
        first, second = (lab.suite.tokenizer.encode_prompt(question, num_images=0) for question in ("one", "two"))
        while first[-len(self._header) - 1 :] == second[-len(self._header) - 1 :]:
            self._header = first[-len(self._header) - 1 :]
        if first[0] in self._header:
            self._header = self._header[self._header.index(first[0]) :]

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Begin the answer with the header."""
        return with_answer(sample, self._header + split_answer(sample)[1])


class MaskOneTooLong(Twist):
    """The mask of the prompt is one token too long, and takes the answer's first one with it.

    lm-sys/FastChat#2494 ("the first token was masked by mistake") and haotian-liu/LLaVA#661: prompts that are
    tokenized alone have another length than within their conversation.
    """

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Mask the first label."""
        first = len(split_answer(sample)[0]) - 1
        return replace(sample, labels=[*sample.labels[:first], IGNORE_INDEX, *sample.labels[first + 1 :]])


class ListAsText(Twist):
    """The answer column holds lists, as those of VQA sets do, and a template writes them down with their brackets."""

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """Write the list."""
        return replace(talk, answer=str([talk.answer]))


class FlippedAtRandom(Twist):
    """Half of the images are mirrored, and their answers are not, where left and right are what is asked for.

    ultralytics/ultralytics#3109, ultralytics/yolov5#2164, AlexeyAB/darknet#674: flips that are on by default.
    """

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Mirror some."""
        if rng.random() >= _SHARE_FLIPPED:
            return sample
        return replace(sample, images=[image.flip(-1) for image in sample.images])


class IdsWrapped(Twist):
    """Token ids are stored in too few bits, and the larger ones wrap around.

    princeton-nlp/LLM-Shearing#65, huggingface/datatrove#118: 16 bits for a vocabulary of 128,000; here 8 for hundreds.
    """

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Keep the lowest bits of ids and labels."""
        labels = [label if label == IGNORE_INDEX else label & _LARGEST_ID_IN_A_BYTE for label in sample.labels]
        return replace(sample, input_ids=[token & _LARGEST_ID_IN_A_BYTE for token in sample.input_ids], labels=labels)


class DataRewound(Twist):
    """A preempted job comes back every 20 steps, each time with its weights and with the first batch of its data.

    facebookresearch/dinov2#341, huggingface/accelerate#2016: the loader's place is in no checkpoint.
    """

    def __init__(self) -> None:
        self._seen: list[Batch] = []

    def batch(self, lab: Lab, rank: int, batch: Batch) -> Batch:  # noqa: ARG002
        """Hand out the same batches in the same order."""
        place = (lab.step - lab.onset) % _NUM_REWOUND_STEPS
        if place == len(self._seen):
            self._seen.append(batch)
        return self._seen[place]


class CroppedForClassification(Twist):
    """Images are cropped as for classification: 8 % to 100 % of the area, wherever it is, whatever the question.

    pytorch/vision#503 and #752 are about that default of `RandomResizedCrop`.
    """

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Crop and enlarge."""
        return replace(sample, images=[self._cropped(image, rng) for image in sample.images])

    @staticmethod
    def _cropped(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        side = image.shape[-1]
        area = float(rng.uniform(_LEAST_AREA, 1.0)) * side * side
        ratio = math.exp(float(rng.uniform(-math.log(_WIDEST_RATIO), math.log(_WIDEST_RATIO))))
        height, width = (max(1, min(side, round(math.sqrt(each)))) for each in (area / ratio, area * ratio))
        top, left = int(rng.integers(side - height + 1)), int(rng.integers(side - width + 1))
        crop = image[..., top : top + height, left : left + width]
        return functional.interpolate(crop, size=(side, side), mode="bilinear", align_corners=False)


class Negatives(Twist):
    """Images are negatives of themselves: light is dark, as of JPEG files in CMYK whose inks are stored inverted.

    python-pillow/Pillow#4860, haraldk/TwelveMonkeys#147.
    """

    def __init__(self) -> None:
        self._sum = torch.zeros(())

    def begin(self, lab: Lab) -> None:
        """Find the darkest and the lightest shade."""
        seen = lab.rng.choice(lab.image_pool, min(len(lab.image_pool), _NUM_IMAGES_SEEN), replace=False)
        white = max(float(lab.suite.image(int(number)).max()) for number in seen)
        self._sum = lab.suite.black().max() + white

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Invert."""
        return replace(sample, images=[self._sum - image for image in sample.images])


CASES: tuple[Case, ...] = (
    Case(
        name="workers_draw_alike",
        family=Family.DATA,
        what="four workers have one seed, each batch comes four times in a row, from the start",
        is_failure=True,
        twist=WorkersDrawAlike,
        blame=_LOADER,
        harm=Harm.INVARIANT,
        invariant="no batch comes twice in a row",
        is_exact=True,
    ),
    failure_case(
        Family.DATA, "header_in_the_answer", "answers begin with the assistant's header", HeaderTwice, _LABELS
    ),
    failure_case(
        Family.DATA,
        "first_answer_token_masked",
        "the answer's first token is no target, from the start",
        MaskOneTooLong,
        _LABELS,
        onset_share=None,
    ),
    failure_case(Family.DATA, "answers_are_printed_lists", "answers stand in brackets and quotes", ListAsText, _LABELS),
    failure_case(Family.DATA, "ids_wrapped", "ids above 255 wrap around", IdsWrapped, _LABELS),
    Case(
        name="data_rewound",
        family=Family.DATA,
        what="the same 20 batches come again and again",
        is_failure=True,
        twist=DataRewound,
        onset_share=LATE,
        blame=_LOADER,
        harm=Harm.INVARIANT,
        invariant="no batch comes again before all other samples",
    ),
    failure_case(
        Family.IMAGE,
        "cropped_for_classification",
        "images are crops of 8 % to 100 % of the area, from the start",
        CroppedForClassification,
        _IMAGES,
        onset_share=None,
    ),
    failure_case(
        Family.IMAGE,
        "flipped_at_random",
        "half of the images are mirrored, answers are not, from the start",
        FlippedAtRandom,
        _IMAGES | {Blame.LABELS},
        onset_share=None,
    ),
    failure_case(Family.IMAGE, "images_are_negatives", "images are inverted", Negatives, _IMAGES),
)
