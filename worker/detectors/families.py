"""All families of detectors, in the order in which they read a step."""

from __future__ import annotations

from sidestep.worker.detectors.absolute import AbsoluteChecks
from sidestep.worker.detectors.answers import AnswerContent
from sidestep.worker.detectors.composition import CompositionAdjusted
from sidestep.worker.detectors.confidence import Confidence
from sidestep.worker.detectors.data_shift import DataShift
from sidestep.worker.detectors.exact import ExactChecks
from sidestep.worker.detectors.generation import GeneratedAnswers
from sidestep.worker.detectors.gradient_changes import GradientChanges
from sidestep.worker.detectors.images import Images
from sidestep.worker.detectors.loss_changes import LossChanges
from sidestep.worker.detectors.mass_excess import MassExcess
from sidestep.worker.detectors.missing_targets import MissingTargets
from sidestep.worker.detectors.optimizer_settings import OptimizerSettings
from sidestep.worker.detectors.prior import PriorKnowledge
from sidestep.worker.detectors.ranks import RankDifferences
from sidestep.worker.detectors.reading import Family
from sidestep.worker.detectors.repeats import RepeatedData
from sidestep.worker.detectors.rows import Rows
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.detectors.trainer_loss import TrainerLoss
from sidestep.worker.detectors.updates import Updates
from sidestep.worker.detectors.weights import Weights
from sidestep.worker.detectors.wiring import Wiring


def make_families(settings: DetectorSettings) -> tuple[Family, ...]:
    """Return every family; those that others read come first (``StepView.residuals``, ``knowledge``)."""
    return (
        ExactChecks(settings),
        Rows(settings),
        RepeatedData(settings),
        PriorKnowledge(settings),
        Images(settings),
        Wiring(settings),
        Updates(settings),
        Weights(settings),
        OptimizerSettings(settings),
        AbsoluteChecks(settings),
        CompositionAdjusted(settings),
        LossChanges(settings),
        TrainerLoss(settings),
        Confidence(settings),
        MassExcess(settings),
        AnswerContent(settings),
        RankDifferences(settings),
        GradientChanges(settings),
        GeneratedAnswers(settings),
        DataShift(settings),
        MissingTargets(settings),
    )
