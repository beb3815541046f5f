"""Whatever arrays the wire lets pass, a step is projected: nothing raises, and what is not finite stays out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, get_type_hints

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sidestep.protocol.messages import MESSAGE_TYPES, STEP_KINDS, ArraySpec, Message, Notice, StepEnd
from sidestep.worker.projection import RunProjection
from sidestep.worker.records import AssembledStep, Part, RunContext
from sidestep.worker.text.detokenizer import Detokenizer

UNHURRIED = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on busy cores
PARAMETERS = {
    "modules": ["m"],
    "parameters": [{"name": f"p{i}", "module": 0, "param": f"p{i}", "shape": [2], "numel": 2} for i in range(2)],
}
CONTEXT = RunContext(
    run_id="run",
    attempt=0,
    text=Detokenizer({}),
    tokenizer={"eos_id": 0, "vocabulary_size": 4},
    parameters=PARAMETERS,
    settings={"generation_eval_interval": 1, "collapse_detection_interval": 1, "answer_length_interval": 1},
)


def arrays(draw: st.DrawFn, spec: ArraySpec, length: int) -> NDArray[Any]:
    dtype = np.dtype(spec.dtype)
    shape = (length,) if spec.axes == 1 else (length, draw(st.sampled_from([0, 2, 64])))
    if dtype.kind == "f":
        info = np.finfo(dtype)
        odd = [0.0, 1.0, 2.0, -1.0, math.nan, math.inf, -math.inf, float(info.max), float(info.tiny), -float(info.max)]
        values: Sequence[float] = draw(st.lists(st.sampled_from(odd), min_size=1, max_size=12))
    else:
        limits = np.iinfo(dtype)
        usual = [0, 1, 2, 3]
        values = draw(
            st.lists(st.sampled_from([*usual, *usual, int(limits.max), int(limits.min)]), min_size=1, max_size=12)
        )
    return np.resize(np.array(values, dtype), shape)


@st.composite
def hostile(draw: st.DrawFn) -> Message:
    """A message of a step whose arrays have the right types and any length and value."""
    cls = MESSAGE_TYPES[draw(st.sampled_from(STEP_KINDS))]
    hints = get_type_hints(cls, include_extras=True)
    common = draw(st.integers(0, 3))
    chosen: dict[str, Any] = {}
    for field in fields(cls):
        hint = hints[field.name]
        specs = [item for item in getattr(hint, "__metadata__", ()) if isinstance(item, ArraySpec)]
        if specs:
            length = common if draw(st.integers(0, 5)) else draw(st.sampled_from([0, 1, 10, 2_048]))
            chosen[field.name] = arrays(draw, specs[0], length)
        elif hint is int:
            chosen[field.name] = draw(st.sampled_from([0, 1, 2, -1, 2**62]))
        elif hint is float:
            chosen[field.name] = draw(st.sampled_from([1.0, 0.0, -1.0, 1e-320, math.nan, math.inf]))
        elif hint is bool:
            chosen[field.name] = draw(st.booleans())
        elif hint is str:
            chosen[field.name] = draw(st.sampled_from(["", "x", "long" * 2_000, "\ud800"]))
    if "values" in hints:
        chosen["values"] = {"a": draw(st.sampled_from([1, math.nan, None, "t", {"b": [1]}, b"x", 2**64])), "": 1}
    if "failures" in hints:
        chosen["failures"] = ("boom",)
    return cls(**chosen)


@UNHURRIED
@given(
    messages=st.lists(hostile(), max_size=5),
    late=st.lists(hostile(), max_size=2),
    time=st.sampled_from([1.0, math.nan]),
)
def test_hostile_parts_are_counted_and_break_nothing(messages: list[Message], late: list[Message], time: float) -> None:
    parts: dict[Any, tuple[Part, ...]] = {}
    for rank, message in enumerate(messages):
        parts[message.kind] = (*parts.get(message.kind, ()), Part(rank=rank, message=message))
    end = StepEnd(step=0, unix_time=time, hook_seconds=time, dropped={"tokens": 2**62})
    step = AssembledStep(
        run_id="run",
        attempt=0,
        step=0,
        reason="complete",
        parts=parts,
        ends={0: end, 1: end},
        late_parts=tuple(Part(rank=0, message=message) for message in late),
        notices=(Notice(text="n" * 99_999, code="c" * 99_999, level="?"),),
        unix_time=time,
        lag_seconds=time,
    )
    projection = RunProjection(CONTEXT)
    for number in range(3):
        made = projection.project(replace(step, step=number))
        for entry in made.entries:
            for key, value in entry.value().items():
                assert value is not None, key
                assert not isinstance(value, float) or math.isfinite(value), key
        again = RunProjection(CONTEXT)
        again.restore(projection.state())
        assert again.state() == projection.state()
        assert len(projection.state()) < 400_000
