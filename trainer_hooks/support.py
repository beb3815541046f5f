"""What can be seen of this training, per family: the support matrix as far as it is known at attach."""

from __future__ import annotations

from collections.abc import Mapping

from sidestep.trainer_hooks.capture import ForwardReader
from sidestep.trainer_hooks.config import HooksConfig
from sidestep.trainer_hooks.schedule import Schedule
from sidestep.trainer_hooks.topology import Topology
from sidestep.trainer_hooks.vocabulary import Vocabulary

EXACT = "exact"
_ABSENT = "absent: "
_SWITCHED_OFF = "absent: its interval is 0"
_SHARDED = "absent: the model is sharded, where {} on one rank would hang the others"
_TEXTS = "a table of texts: this one cannot be written as JSON"

_FAMILY_ANCHORS = {"tokens": "tokens", "loss": "loss", "answers": "answers", "lr": "lr"}


def capabilities(
    config: HooksConfig,
    topology: Topology,
    reader: ForwardReader,
    vocabulary: Vocabulary,
    *,
    num_ids: int,
    has_samples: bool,
) -> dict[str, str]:
    """Per family ``exact`` or ``absent: reason``; and how ``labels`` are read, and ``tokenizer`` where it is marked."""
    schedule = Schedule(config)
    known = dict.fromkeys(_FAMILY_ANCHORS, EXACT)
    if not num_ids:
        known["tokens"] = "absent: neither a tokenizer nor the model's head tells how many ids there are"
    known["gradients"] = gradients_support(topology)
    known["generation"] = known["collapse"] = generation_support(
        topology, has_samples=has_samples, when_sharded=config.generate_when_sharded
    )
    for family in known:
        if schedule.shortest_interval_steps(family) == 0:
            known[family] = _SWITCHED_OFF
    if topology.sharded and config.signal_rows_per_step:
        if config.image_probe_interval:
            known["image probe"] = _SHARDED.format("a probe")
        if config.wiring_probe_interval:
            known["wiring probe"] = _SHARDED.format("a probe")
    known["labels"] = _labels(config, reader)
    if vocabulary.texts:
        known["tokenizer"] = _TEXTS
    return known


def support_line(known: Mapping[str, str]) -> str:
    """What is not exact and was not switched off, each with its reason, as one line; empty where all is."""
    families: dict[str, list[str]] = {}
    for name, support in known.items():
        if name != "labels" and support not in {EXACT, _SWITCHED_OFF}:
            families.setdefault(support.removeprefix(_ABSENT), []).append(name)
    absent = [f"{', '.join(names)} ({reason})" for reason, names in families.items() if "tokenizer" not in names]
    said = [f"absent from this run: {'; '.join(absent)}"] if absent else []
    if "tokenizer" in known:
        said.append(f"the tokenizer travels as {_TEXTS}")
    return "; ".join(said) + "." if said else ""


def gradients_support(topology: Topology) -> str:
    """Whether gradients can be read parameter by parameter."""
    if topology.wrapper == "fsdp1":
        return "absent: FSDP1 keeps gradients of flat parameters"
    if topology.wrapper == "deepspeed" and topology.sharded:
        return "absent: ZeRO-3 keeps gradients apart from the parameters"
    return EXACT


def generation_support(topology: Topology, *, has_samples: bool, when_sharded: bool = False) -> str:
    """Whether the model can be generated from: without its other ranks, or with all of them where that is wanted."""
    if not has_samples:
        return "absent: no samples were given"
    if topology.sharded and topology.mesh is None:
        return "absent: the model is sharded, and its forward cannot be called beside the training's"
    if topology.sharded and not when_sharded:
        return _SHARDED.format("a generation")
    return EXACT


def _labels(config: HooksConfig, reader: ForwardReader) -> str:
    if config.shifted is not None:
        return f"{_convention(shifted=config.shifted)}, as configured"
    if reader.shifted is not None:
        return f"{_convention(shifted=reader.shifted)}, by the forward's argument {reader.label_argument!r}"
    return f"{_convention(shifted=False)}, unless a call says otherwise"


def _convention(*, shifted: bool) -> str:
    return "already shifted" if shifted else "not shifted"
