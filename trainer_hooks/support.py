"""What can be seen of this training, per family: the support matrix as far as it is known at attach."""

from __future__ import annotations

from sidestep.trainer_hooks.capture import ForwardReader
from sidestep.trainer_hooks.config import HooksConfig
from sidestep.trainer_hooks.schedule import Schedule
from sidestep.trainer_hooks.topology import Topology

EXACT = "exact"

_FAMILY_ANCHORS = {"tokens": "tokens", "loss": "loss", "answers": "answers", "lr": "lr"}


def capabilities(
    config: HooksConfig, topology: Topology, reader: ForwardReader, *, num_ids: int, has_samples: bool
) -> dict[str, str]:
    """Per family ``exact`` or ``absent: reason``; and under ``labels`` which convention they follow, and why."""
    schedule = Schedule(config)
    known = dict.fromkeys(_FAMILY_ANCHORS, EXACT)
    if not num_ids:
        known["tokens"] = "absent: neither a tokenizer nor the model's head tells how many ids there are"
    known["gradients"] = gradients_support(topology)
    known["generation"] = known["collapse"] = generation_support(topology, has_samples=has_samples)
    for family in known:
        if schedule.shortest_interval_steps(family) == 0:
            known[family] = "absent: its interval is 0"
    known["labels"] = _labels(config, reader)
    return known


def gradients_support(topology: Topology) -> str:
    """Whether gradients can be read parameter by parameter."""
    if topology.wrapper == "fsdp1":
        return "absent: FSDP1 keeps gradients of flat parameters"
    if topology.wrapper == "deepspeed" and topology.sharded:
        return "absent: ZeRO-3 keeps gradients apart from the parameters"
    return EXACT


def generation_support(topology: Topology, *, has_samples: bool) -> str:
    """Whether the model can be generated from without its other ranks."""
    if not has_samples:
        return "absent: no samples were given"
    if topology.sharded:
        return "absent: the model is sharded, where a generation on one rank would hang the others"
    return EXACT


def _labels(config: HooksConfig, reader: ForwardReader) -> str:
    if config.shifted is not None:
        return f"{_convention(shifted=config.shifted)}, as configured"
    if reader.shifted is not None:
        return f"{_convention(shifted=reader.shifted)}, by the forward's argument {reader.label_argument!r}"
    return f"{_convention(shifted=False)}, unless a call says otherwise"


def _convention(*, shifted: bool) -> str:
    return "already shifted" if shifted else "not shifted"
