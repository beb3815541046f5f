"""Images: the same one over and over, a projector that gives nothing, and a model that does not look (``Probe``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from sidestep.protocol.messages import Json
from sidestep.worker.detectors.reading import Reading
from sidestep.worker.detectors.running import Window
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.detectors.view import StepView
from sidestep.worker.records import RunContext
from sidestep.worker.step_record import StepRecord

MIN_IMAGES: Final = 4
MANY_IMAGES: Final = 8
"""Images from which some alike are too many alike: fewer may be questions about one and the same picture."""
FLAT_SHARE: Final = 0.7
"""Share of images without any detail from which they are black: blank tiles of a page are fewer ..."""
ALL_FLAT_SHARE: Final = 0.98
"""... and share from which they are even if they always were: samples of text have a blank one in some data."""
USUAL_STEPS: Final = 64
LEAST_USUAL_STEPS: Final = 16
CHANCE: Final = 1e-5
CHANGE: Final = 0.2
"""Change of a share of images against the usual one from which it is another."""
DISTINCT_SHARE: Final = 0.9
"""Share of images that must differ for a projector that does not tell them apart to be at fault."""


class Images:
    """Images as they come in, as the projector gives them on, and what they are worth to the model."""

    name = "images"

    def __init__(self, settings: DetectorSettings) -> None:
        self._settings = settings
        self._gains: list[float] = []
        self._num_probes = 0
        self._unused = 0  # probes in a row in which images were worth nothing
        self._best = 0.0  # highest pooled gain so far
        self._steps = [0, 0, 0]  # steps with images, all steps, steps without images in a row
        self._is_first_stage = True
        self._reset_pixels()

    def _reset_pixels(self) -> None:
        size = self._settings.image_scale.median_readings
        self._means, self._deviations = Window(size), Window(size)
        self._distinct, self._flat = Window(USUAL_STEPS), Window(USUAL_STEPS)  # shares of the images of a step
        self._odd = Window(USUAL_STEPS)  # 1: images of a step were alike or blank

    def read(self, view: StepView) -> Sequence[Reading]:
        """Judge one step."""
        record = view.record
        return [
            *self._missing(view),
            *self._alike(record),
            *self._scaled(record),
            *self._projector(record),
            *self._probe(record, view.knowledge),
        ]

    def _missing(self, view: StepView) -> Iterator[Reading]:
        """No image comes any more, or none ever came though the run's samples have images."""
        record, rule = view.record, self._settings.images_missing
        if not record.labelled:
            return  # another finding
        is_seen = record.images > 0 or record.projector_rms is not None
        with_images, steps, without = self._steps
        without = 0 if is_seen else without + 1
        self._steps = [with_images + is_seen, steps + 1, without]
        before = steps + 1 - without
        evidence = ""
        if before >= rule.warmup and with_images >= rule.share * before:
            evidence = f"no image in {without} steps, and in {with_images} of the {before} steps before"
        elif self._is_first_stage and not with_images and (share := _share_with_images(view.context)) >= rule.share:
            evidence = f"no batch of {without} steps has had an image, though {share:.0%} of the run's samples have one"
        if evidence:
            value, limit = float(without), rule.threshold
            yield Reading(name="images_missing", value=value, limit=limit, is_beyond=value >= limit, evidence=evidence)

    def _alike(self, record: StepRecord) -> Iterator[Reading]:
        if record.images < MIN_IMAGES and not record.constant_image_ranks:
            return
        limit, share = self._settings.image_constant.threshold, record.distinct_images / record.images
        flat = max(record.flat_images, 0) / record.images
        # Steps may have many questions on each of a few images: then they always have, and more than one a forward.
        is_one_each = record.distinct_images <= max(record.count("batches") or 1, 1)
        is_few = record.images >= MANY_IMAGES and share <= limit
        is_alike = record.distinct_images == 1 or (is_few and (is_one_each or self._is_new(self._distinct, share)))
        is_blank = flat >= ALL_FLAT_SHARE or (flat >= FLAT_SHARE and self._is_new(self._flat, flat))
        self._distinct.add(share)
        self._flat.add(flat)
        is_odd = is_alike or is_blank or bool(record.constant_image_ranks)
        is_chance = self._is_chance(is_odd=is_odd)
        is_beyond = is_odd and not is_chance
        evidence = f"{record.distinct_images} of {record.images} images differ"
        if record.flat_images > 0:
            evidence += f", {record.flat_images} are of one colour"
        if record.constant_image_ranks:
            evidence += f"; rank {', '.join(map(str, record.constant_image_ranks))} has one image, or blank ones"
        yield Reading(name="image_constant", value=share, limit=limit, is_beyond=is_beyond, evidence=evidence)

    def _is_chance(self, *, is_odd: bool) -> bool:
        """Whether steps are now and then so, as where a tenth has blank images for guidance, and this is one of them.

        It takes so many in a row that they are no chance among the last ones.
        """
        self._odd.add(float(is_odd))
        odd = self._odd.values
        in_a_row = next((place for place, each in enumerate(reversed(odd)) if not each), len(odd))
        before = odd[: len(odd) - in_a_row]
        return bool(before) and (sum(before) / len(before)) ** max(in_a_row, 1) > CHANCE

    @staticmethod
    def _is_new(usual: Window, share: float) -> bool:
        """Whether a share is far from the usual one; one that is not known yet is what it is."""
        return len(usual) >= LEAST_USUAL_STEPS and abs(share - usual.median()) >= CHANGE

    def _scaled(self, record: StepRecord) -> Iterator[Reading]:
        """Pixels against what they were, and against what no preprocessing gives."""
        mean, deviation = record.image_mean, record.image_deviation
        if deviation is None or not deviation > 0:
            return  # one colour: `image_constant` says that
        rule = self._settings.image_scale
        enough = max(rule.warmup, rule.window + 1)  # the last few may be beyond already, and are left out
        usual = self._deviations.median() if len(self._deviations) >= enough else None
        ratio = 1.0
        if usual is not None:  # beyond all of the last steps: where images are of two kinds, a median is of either
            seen = self._deviations.values[: -rule.window]
            ratio = max(deviation / max(seen), min(seen) / deviation)
        evidence = f"pixels deviate by {deviation:.3g} around {mean or 0.0:.3g}"
        if usual is not None and mean is not None and len(self._means) >= enough:
            seen = self._means.values[: -rule.window]
            ratio = max(ratio, (mean - max(seen)) / usual, (min(seen) - mean) / usual)
            evidence += f", usually by {usual:.3g} around {self._means.median():.3g}"
        is_beyond = ratio > rule.threshold or not rule.lowest <= deviation <= rule.highest
        yield Reading(
            name="image_scale", value=ratio, limit=rule.threshold, is_beyond=is_beyond, reference=usual,
            evidence=evidence,
        )  # fmt: skip
        self._deviations.add(deviation)
        if mean is not None:
            self._means.add(mean)

    def _projector(self, record: StepRecord) -> Iterator[Reading]:
        settings = self._settings
        rms, spread = record.projector_rms, record.projector_spread
        if rms is not None:
            limit = settings.image_embed_zero.threshold
            evidence = f"the root mean square of the image embeddings is {rms:.3g}"
            yield Reading(name="image_embed_zero", value=rms, limit=limit, is_beyond=rms < limit, evidence=evidence)
        if spread is None or (rms is not None and rms < settings.image_embed_zero.threshold):
            return
        # Images that are alike have embeddings that are alike: only distinct ones tell of the projector.
        if record.images and record.distinct_images < DISTINCT_SHARE * record.images:
            return
        limit = settings.image_embed_constant.threshold
        evidence = f"the image embeddings of distinct images differ by {spread:.3g} (root mean square)"
        yield Reading(
            name="image_embed_constant", value=spread, limit=limit, is_beyond=spread < limit, evidence=evidence
        )

    def _probe(self, record: StepRecord, knowledge: float | None) -> Iterator[Reading]:
        """What images are worth. A model that knows nothing else either has not learned yet: another finding."""
        if record.probe_loss is None or record.probe_rolled_loss is None:
            return
        unused, lost = self._settings.image_unused, self._settings.image_lost
        gain = record.probe_rolled_loss - record.probe_loss
        self._num_probes += 1
        self._gains = [*self._gains, gain][-max(unused.pooled, lost.pooled) :]
        pooled = self._gains[-unused.pooled :]
        mean = sum(pooled) / len(pooled)
        evidence = f"with the images of other samples the loss is only {mean:+.3f} nats higher ({len(pooled)} probes)"
        if len(pooled) == unused.pooled and (knowledge is None or knowledge >= unused.knowledge):
            self._unused = self._unused + 1 if max(mean, gain) < unused.threshold else 0
        if self._num_probes >= unused.warmup and (knowledge is None or knowledge >= unused.knowledge):
            is_beyond = self._unused >= unused.lasting and record.step >= unused.first_step
            yield Reading(
                name="image_unused", value=mean, limit=unused.threshold, is_beyond=is_beyond,
                reference=self._best, evidence=evidence,
            )  # fmt: skip
        recent = self._gains[-lost.pooled :]
        newest = sum(recent) / len(recent)
        if self._best >= lost.had:
            limit = max(lost.threshold, 0.1 * self._best)
            evidence = f"images were worth {self._best:.2f} nats and are worth {newest:.3f}"
            yield Reading(
                name="image_lost", value=newest, limit=limit, is_beyond=newest < limit, reference=self._best,
                evidence=evidence,
            )  # fmt: skip
        if len(pooled) == unused.pooled:
            self._best = max(self._best, mean)

    def forget(self) -> None:
        """Let go of what images were worth, and of what they were like."""
        self._gains, self._best, self._num_probes, self._unused = [], 0.0, 0, 0
        self._reset_pixels()
        self._steps = [0, 0, 0]
        self._is_first_stage = False  # one of text alone may begin

    def state(self) -> Json:
        """Return all that ``restore`` needs."""
        return {
            "gains": self._gains,
            "probes": [self._num_probes, self._unused],
            "best": self._best,
            "steps": [*self._steps, int(self._is_first_stage)],
            "pixels": [self._means.values, self._deviations.values],
            "shares": [each.values for each in (self._distinct, self._flat, self._odd)],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        self._gains = [float(gain) for gain in state["gains"]]
        self._num_probes, self._unused = map(int, state["probes"])
        self._best = float(state["best"])
        *steps, is_first = state.get("steps", (0, 0, 0, 1))
        self._steps, self._is_first_stage = [int(count) for count in steps], bool(is_first)
        pixels = state.get("pixels", ((), ()))  # there are none in a state of before there was `image_scale`
        self._means.values, self._deviations.values = ([float(value) for value in values] for values in pixels)
        shares = state.get("shares", ((), (), ()))
        for window, values in zip((self._distinct, self._flat, self._odd), shares, strict=True):
            window.values = [float(value) for value in values]


def _share_with_images(context: RunContext | None) -> float:
    """Share of the samples that are generated from that have an image; 0 without any."""
    samples = context.samples.get("samples") if context is not None else None
    if not isinstance(samples, list | tuple) or not samples:
        return 0.0
    return sum(isinstance(each, Mapping) and each.get("image") is not None for each in samples) / len(samples)
