"""What the hooks do and how often: ``HooksConfig``, the trainer's side of docs/metrics.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from sidestep.protocol import limits

GRADIENT_DETAILS = ("param", "block", "module")
COLLAPSE_VERDICTS = ("literal", "target_relative")
ON_INCIDENT = ("warn", "stop", "checkpoint", "call")

_USER_INTERVALS = ("generation_eval_interval", "gradient_log_interval", "collapse_detection_interval")
_INTERVALS = (
    *_USER_INTERVALS,
    "token_stats_interval",
    "loss_breakdown_interval",
    "answer_length_interval",
    "lr_interval",
    "signal_gradient_interval",
    "image_probe_interval",
    "wiring_probe_interval",
)
_RATIOS = ("single_token_dominance", "excessive_eos")
_AT_LEAST_ONE = (
    "low_diversity_unique_tokens", "low_diversity_min_tokens", "max_new_tokens", "generation_samples",
    "loss_rows_per_microbatch", "window_bytes", "staging_bytes",
)  # fmt: skip
_SECONDS = ("close_timeout_seconds", "assembly_deadline_seconds")
_OPTIONAL_IDS = ("eos_id", "pad_id", "image_token_id", "vocabulary_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class HooksConfig:
    """Intervals, thresholds and bounds; every field travels with the run, so that a replay has it.

    Intervals count optimizer steps; a family is due when ``step % interval == 0`` and never when its interval is 0.

    Raises:
        ValueError: a value is out of its range; the text names the field.
    """

    generation_eval_interval: int = 50
    """Steps between two generations for the samples table (docs/metrics.md, ``generation/``)."""
    gradient_log_interval: int = 100
    """Steps between two gradient statistics."""
    collapse_detection_interval: int = 100
    """Steps between two judgements of the collapse rules; generation runs then too."""
    token_stats_interval: int = 25
    """Steps between two token statistics."""
    loss_breakdown_interval: int = 25
    """Steps between two loss breakdowns."""
    answer_length_interval: int = 50
    """Steps between two rows of the epoch's answer lengths; the answers themselves are counted at every step."""
    lr_interval: int = 25
    """Steps between two rows of learning rates."""
    log_wandb: bool = True
    """False: the hooks do nothing and no worker starts."""
    gradient_detail: str = "param"
    """``param``, ``block`` or ``module``: how finely gradients are shown."""
    collapse_verdict: str = "target_relative"
    """``target_relative`` or ``literal`` (docs/metrics.md, ``collapse/``)."""
    on_incident: str = "warn"
    """What the worker asks for when a critical incident opens: ``warn``, ``stop``, ``checkpoint`` or ``call``.

    ``warn`` is nothing. The trainer is free to ignore it; ``after_step`` returns it, on all ranks at the same step.
    ``call``: a callable that was given to ``attach`` is told.
    """
    sample_when_suspicious: bool = True
    """Whether the worker may ask for samples between two due generations when a cheap signal is suspicious."""
    detectors: Mapping[str, float] = field(default_factory=dict)
    """``NAME.FIELD`` to a value that a detector's rule is to have in place of its default (docs/detection.md)."""
    collapse_deadline: int = 500
    """Step at which a verdict that has never been 0 is reported all the same."""
    single_token_dominance: float = 0.70
    """Share of the most common content token above which the rule of that name is true."""
    low_diversity_unique_tokens: int = 10
    """Fewer distinct content tokens than this are few."""
    low_diversity_min_tokens: int = 50
    """Content tokens that there must be for ``low_diversity`` to speak."""
    excessive_eos: float = 0.80
    """Share of EOS among content tokens and EOS above which the rule of that name is true."""
    high_loss_sigmas: float = 2.0
    """Standard deviations above the step's mean loss from which a token counts as high."""
    max_new_tokens: int = 64
    """Longest generation, in tokens."""
    generation_samples: int = 16
    """Samples that are generated from; further ones are left out."""
    split_generation: bool = False
    """True: under DDP each rank generates from a part of the samples, in place of the first rank from all of them."""
    generate_when_sharded: bool = False
    """True: a sharded model (FSDP2, tensor parallel) is generated from on all ranks, to a fixed length.

    An exception in it ends the rank, since the others wait for it (docs/distributed.md).
    """
    ignore_index: int = -100
    """The label of a position without a target."""
    shifted: bool | None = None
    """True: ``labels[t]`` is the target of ``logits[t]`` (nanoVLM); False: of ``logits[t - 1]`` (Hugging Face).

    None: told by the name of the forward's argument, ``targets`` or ``shift_labels`` (shifted) or ``labels`` (not).
    """
    eos_id: int | None = None
    """Overrides the tokenizer's EOS."""
    pad_id: int | None = None
    """Overrides the tokenizer's padding id."""
    image_token_id: int | None = None
    """The image placeholder's id, where neither the model's configuration nor the tokenizer tells."""
    vocabulary_size: int | None = None
    """Overrides the tokenizer's length with added tokens."""
    loss_rows_per_microbatch: int = 1024
    """Positions that are looked at where the labels are known to the device alone and all would be too many."""
    assembly_deadline_seconds: float = 30.0
    """How long the worker waits for the parts of a step."""
    close_timeout_seconds: float = 5.0
    """How long ``close()`` waits at most for what is still to be sent."""
    window_bytes: int = limits.WINDOW_BYTES
    """Memory for what is not yet sent or not yet stored by the worker."""
    staging_bytes: int = 64 << 20
    """Pinned memory for copies that are on their way from the device."""
    signal_rows_per_step: int = 896
    """Labelled rows that are looked at in every step for the detectors, over all ranks; 0: no signals."""
    signal_gradient_interval: int = 10
    """Steps between two looks at the modules' gradient norms for the detectors; 0: never."""
    overhead_budget: float | None = None
    """Share of a step's time that every step's signals may take; rows are thinned to keep it. 0: no limit.

    None: 0.02 where the training runs on the CPU, 0.005 on a device.
    """
    image_probe_interval: int = 100
    """Steps between two probes of what the images are worth, two forwards of one micro-batch each; 0: never."""
    wiring_probe_interval: int = 500
    """Steps between two probes of how the model is wired; 0: never.

    Whether a position sees the tokens that follow it, rows of a batch see each other, padding is read, and images stand
    at their places and reach the answers. Two forwards of one micro-batch, up to four with images, in the mode that it
    is trained in; eight steps after the hooks began, then at half of each interval, apart from the image probe. Where
    something changed that must not, a step soon after is looked at once more, with one forward for each change.
    """

    def __post_init__(self) -> None:
        for each in fields(self):
            _check_type(each.name, str(each.type), getattr(self, each.name))
        for name in (*_INTERVALS, "collapse_deadline"):
            _require(getattr(self, name) >= 0, name, "must be 0 (never) or more steps", getattr(self, name))
        for name in _AT_LEAST_ONE:
            _require(getattr(self, name) >= 1, name, "must be at least 1", getattr(self, name))
        for name in _RATIOS:
            _require(0.0 <= getattr(self, name) <= 1.0, name, "must lie between 0 and 1", getattr(self, name))
        for name in _SECONDS:
            _require(0.0 <= getattr(self, name) < float("inf"), name, "must be a time in seconds", getattr(self, name))
        for name in _OPTIONAL_IDS:
            value = getattr(self, name)
            _require(value is None or value >= 0, name, "must be None or at least 0", value)
        rows, most = self.signal_rows_per_step, limits.MAX_SIGNAL_ROWS_PER_STEP
        _require(0 <= rows <= most, "signal_rows_per_step", f"must be 0 (none) to {most}", rows)
        budget = self.overhead_budget
        _require(
            budget is None or 0 <= budget < 1, "overhead_budget", "must be None, or at least 0 and below 1", budget
        )
        _require(
            0 < self.high_loss_sigmas < float("inf"), "high_loss_sigmas", "must be positive", self.high_loss_sigmas
        )
        choices = {
            "gradient_detail": GRADIENT_DETAILS,
            "collapse_verdict": COLLAPSE_VERDICTS,
            "on_incident": ON_INCIDENT,
        }
        for name, known in choices.items():
            _require(getattr(self, name) in known, name, f"must be one of {', '.join(known)}", getattr(self, name))

    @classmethod
    def from_train_config(cls, cfg: object, **overrides: Any) -> Self:
        """Take what a trainer's own configuration says, and divide its intervals by the accumulation.

        In the user's ``TrainConfig`` the three intervals count micro-batches, ``gradient_accumulation_steps * 50`` and
        so on (docs/metrics.md, "Configuration names that are the user's"); here they count optimizer steps.

        Args:
            cfg: an object with attributes, or a mapping; what it does not have keeps its default.
            **overrides: fields of this class, taken as they are.

        Raises:
            ValueError: a value is unusable; the text names the field.
        """
        accumulation = _read(cfg, "gradient_accumulation_steps", 1)
        whole = isinstance(accumulation, int) and not isinstance(accumulation, bool)
        _require(whole and accumulation >= 1, "gradient_accumulation_steps", "must be at least 1", accumulation)
        taken: dict[str, Any] = {}
        for name in _USER_INTERVALS:
            value = _read(cfg, name, None)
            if value is None:
                continue
            whole = isinstance(value, int) and not isinstance(value, bool)
            _require(whole and value >= 0, name, "must be 0 (never) or more micro-batches", value)
            taken[name] = max(1, round(value / accumulation)) if value else 0
        log_wandb = _read(cfg, "log_wandb", None)
        if log_wandb is not None:
            taken["log_wandb"] = log_wandb
        return cls(**{**taken, **overrides})

    def as_settings(self) -> dict[str, Any]:
        """All fields by name, as they travel in ``Hello.settings``."""
        return asdict(self)


def _read(cfg: object, name: str, default: Any) -> Any:
    return cfg.get(name, default) if isinstance(cfg, Mapping) else getattr(cfg, name, default)


def _require(holds: object, name: str, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"HooksConfig.{name} {rule}, not {value!r}")


def _check_type(name: str, annotation: str, value: object) -> None:
    """Hold a value against its field's annotation: bool is no number, and an int is a float."""
    if value is None and annotation.endswith("| None"):
        return
    if annotation.startswith("Mapping"):
        numbers = isinstance(value, Mapping) and all(
            isinstance(key, str) and isinstance(number, (int, float)) for key, number in value.items()
        )
        _require(numbers, name, "must map names to numbers", value)
        return
    wanted = annotation.removesuffix(" | None")
    kinds: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
    right = isinstance(value, kinds[wanted]) and (wanted == "bool" or not isinstance(value, bool))
    _require(right, name, f"must be of type {annotation}", value)
