"""What one rank of a data-parallel training says, step by step, cheap enough to be said for a thousand of them.

The mix is that of the hooks with their default intervals under DDP, one micro-batch of 8 samples with an image each:

- every rank, every step: ``Signals`` (counts, hashes, sampled weights; rows only where it is the rank's turn, as
  ``trainer_hooks/signals/watch.py`` takes turns; the modules' norms every 10 steps), ``Answers``, ``StepEnd``;
- every rank, every 25 steps: ``Tokens`` and ``Losses``;
- rank 0: ``Scalars`` every step (what the trainer logs), ``LearningRates`` every 25, ``Gradients`` every 100,
  ``Generation`` every 50.

Frames are made by the real encoder once; rank, step, sequence number, accounts, clock, weights and hashes are then
written into the bytes. What carries rows, and all that rank 0 says, is encoded anew each time.
"""

from __future__ import annotations

import hashlib
import os
import platform
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sidestep.protocol.frames import Envelope, encode
from sidestep.protocol.messages import (
    SIGNAL_COUNTS,
    Answers,
    Generation,
    Goodbye,
    Gradients,
    Heartbeat,
    Hello,
    LearningRates,
    Losses,
    Message,
    Role,
    Scalars,
    Signals,
    StepEnd,
    Tokens,
)
from sidestep.protocol.tables import digest, encode_table

SAMPLES: Final = 8
LABELLED: Final = 192
POSITIONS: Final = SAMPLES * 256
VOCABULARY: Final = 49_152
PARAMETERS: Final = 160
ROWS_PER_STEP: Final = 896
"""``HooksConfig.signal_rows_per_step``."""
LEAST_ROWS: Final = 64
"""``LEAST_ROWS_PER_STEP`` of ``trainer_hooks/signals/budget.py``: more ranks than 896 / 64 take turns."""
WEIGHTS: Final = 128
NORMS_EVERY, DUE_EVERY, SAMPLES_EVERY, GRADIENTS_EVERY = 10, 25, 50, 100
COUNTED: Final = ("signals", "answers", "step_end", "tokens", "losses")
"""The kinds of all ranks but 0, as their accounts name them."""
MODULES: Final = ("vision_encoder", "MP", "decoder", "head")

_RANK, _SEQUENCE, _STEP = 0x7EADBEE0, 0x7EADBEE1, 0x7EADBEE2
_PRODUCED: Final = 0x7EAD0000
_CLOCK, _TOOK = 1_234_567_890.123456, 0.987654321
_WORD, _DOUBLE = struct.Struct(">I"), struct.Struct(">d")
_INTERVALS: Final = (
    ("tokens", DUE_EVERY), ("loss", DUE_EVERY), ("gradients", GRADIENTS_EVERY), ("generation", SAMPLES_EVERY),
    ("collapse", GRADIENTS_EVERY), ("answers", SAMPLES_EVERY), ("lr", DUE_EVERY),
)  # fmt: skip


def due_families(step: int) -> tuple[str, ...]:
    """Return the families that are due at a step, as ``StepEnd`` names them."""
    return tuple(name for name, interval in _INTERVALS if step % interval == 0)


def make_tables() -> dict[str, bytes]:
    """Return the run's tables by name, encoded."""
    parameters = [
        {
            "name": f"{MODULES[at % 4]}.blocks.{at}.weight", "module": at % 4, "param": f"blocks.{at}.weight",
            "shape": [576, 576], "numel": 576 * 576, "offset": [0, 0], "local_shape": [576, 576], "trainable": True,
            "group": at % 2,
        }
        for at in range(PARAMETERS)
    ]  # fmt: skip
    texts = {at: f"t{at}" for at in range(VOCABULARY)}
    made: dict[str, Any] = {
        "parameters": {"modules": list(MODULES), "parameters": parameters},
        "groups": {"names": ["vision_encoder", "language_model"]},
        "tokenizer": {
            "kind": "texts", "texts": texts, "eos_id": 0, "pad_id": 1, "vocabulary_size": VOCABULARY,
            "special_ids": [0, 1], "image_token_id": 2,
        },
        "samples": {
            "samples": [
                {"question": f"question {at}", "target": f"t{at + 5}", "target_ids": [at + 5, 0], "image": None}
                for at in range(16)
            ]
        },
    }  # fmt: skip
    return {name: encode_table(table) for name, table in made.items()}


class Template:
    """One encoded message, and where what changes stands in it."""

    def __init__(self, identity: Envelope, message: Message, changing: Mapping[str, bytes]) -> None:
        """Encode ``message``, whose step is ``_STEP``; ``changing`` gives the bytes of each field that changes."""
        accounts = {name: (_PRODUCED + place + 1, 0, 0) for place, name in enumerate(COUNTED)}
        self.content = bytearray(encode(identity._replace(rank=_RANK, sequence=_SEQUENCE, accounts=accounts), message))
        self._rank_at, self._sequence_at, self._step_at = map(self._word, (_RANK, _SEQUENCE, _STEP))
        self._produced_at = [self._word(_PRODUCED + place + 1) for place in range(len(COUNTED))]
        self._at = {name: (self._only(content), len(content)) for name, content in changing.items()}

    def _word(self, number: int) -> int:
        return self._only(b"\xce" + _WORD.pack(number)) + 1

    def _only(self, content: bytes) -> int:
        if self.content.count(content) != 1:
            raise ValueError("what is to be changed does not stand in the message exactly once")
        return self.content.index(content)

    def frame(
        self, rank: int, sequence: int, step: int, produced: Sequence[int], changed: Mapping[str, bytes]
    ) -> bytes:
        """Return the frame of this rank and step; ``changed`` gives the new bytes of the fields that change."""
        content, write = self.content, _WORD.pack_into
        write(content, self._rank_at, rank)
        write(content, self._sequence_at, sequence)
        write(content, self._step_at, step)
        for at, count in zip(self._produced_at, produced, strict=True):
            write(content, at, count)
        for name, (at, size) in self._at.items():
            content[at : at + size] = changed[name]
        return bytes(content)


class RankMessages:
    """The frames of all ranks of one run."""

    def __init__(self, run_id: str, world_size: int) -> None:
        """Make the templates of a run of ``world_size`` ranks."""
        self._identity = Envelope(run_id=run_id, incarnation=f"{run_id}-1", rank=0)
        self._world_size = world_size
        self.tables = make_tables()
        self._digests = {name: digest(content) for name, content in self.tables.items()}
        self.blobs = {digest(content): content for content in self.tables.values()}
        lookers = max(1, min(world_size, ROWS_PER_STEP // LEAST_ROWS))
        self._turn = -(-world_size // lookers)
        self._rows = ROWS_PER_STEP // lookers
        self._rng = np.random.default_rng(0)
        self._signals = {norms: self._signals_template(norms=norms) for norms in (False, True)}
        self._answers = Template(self._identity, _answers(_STEP), {})
        self._due = [Template(self._identity, made, {}) for made in (_tokens(_STEP, 0), _losses(_STEP, 0))]
        self._ends: dict[tuple[str, ...], Template] = {}
        self._weights: tuple[int, bytes] = (-1, b"")

    def _signals_template(self, *, norms: bool) -> Template:
        message = _signals(_STEP, _TOOK, b"h" * 64, b"i" * 64, b"w" * 4 * WEIGHTS, norms=norms)
        changing = {
            "hashes": b"h" * 64,
            "images": b"i" * 64,
            "weights": b"w" * 4 * WEIGHTS,
            "took": _DOUBLE.pack(_TOOK),
        }
        return Template(self._identity, message, changing)

    def hello(self, rank: int) -> bytes:
        """Return the Hello of a rank."""
        topology = {
            "data_parallel_rank": rank, "data_parallel_size": self._world_size, "copy": rank, "shares": 1,
            "local_rank": rank % 8, "host": platform.node(), "pid": os.getpid(), "wrapper": "ddp", "compiled": False,
        }  # fmt: skip
        settings = {
            "token_stats_interval": DUE_EVERY, "loss_breakdown_interval": DUE_EVERY, "lr_interval": DUE_EVERY,
            "answer_length_interval": SAMPLES_EVERY, "generation_eval_interval": SAMPLES_EVERY,
            "gradient_log_interval": GRADIENTS_EVERY, "collapse_detection_interval": GRADIENTS_EVERY,
            "signal_rows_per_step": ROWS_PER_STEP, "signal_gradient_interval": NORMS_EVERY,
        }  # fmt: skip
        hello = Hello(
            project="ranks",
            name="ranks",
            world_size=self._world_size,
            topology=topology,
            settings=settings,
            run_config={f"option_{at}": at for at in range(60)},
            environment={"command": "train.py", "python": platform.python_version(), "host": platform.node()},
            tables=self._digests,
        )
        return encode(self._of(rank), hello)

    def _of(self, rank: int, sequence: int = 0, produced: Mapping[str, int] | None = None) -> Envelope:
        accounts = {name: (count, 0, 0) for name, count in (produced or {}).items() if count}
        return self._identity._replace(rank=rank, sequence=sequence, accounts=accounts)

    def identity(self, rank: int) -> Envelope:
        """Return the envelope of a rank's unsequenced messages."""
        return self._of(rank)

    def heartbeat(self, rank: int, step: int) -> bytes:
        """Return a heartbeat after ``step``."""
        return encode(self._of(rank, produced=_produced(step, rank)), Heartbeat(newest_step=step))

    def goodbye(self, rank: int, sequence: int, step: int) -> bytes:
        """Return the last message of a rank."""
        produced = {**_produced(step, rank), "goodbye": 1}
        return encode(self._of(rank, sequence, produced), Goodbye(newest_step=step))

    def step(self, rank: int, step: int, sequence: int, ended_at: float) -> list[bytes]:
        """Return a rank's frames of a step, numbered from ``sequence`` on; ``StepEnd`` is the last of them.

        ``ended_at`` is the unix time at which the step ended.
        """
        if rank == 0:
            return self._encoded(rank, step, sequence, ended_at)
        counts = _produced(step, rank)
        produced = [counts[name] for name in COUNTED]
        frames = []
        if step % DUE_EVERY == 0:
            frames = [each.frame(rank, sequence + at, step, produced, {}) for at, each in enumerate(self._due)]
        number = sequence + len(frames)
        if (rank + step) % self._turn == 0:
            signals = self._signals_with_rows(rank, step)
            frames.append(encode(self._of(rank, number, counts), signals))
        else:
            changed = self._changed(rank, step)
            frames.append(self._signals[step % NORMS_EVERY == 0].frame(rank, number, step, produced, changed))
        frames.append(self._answers.frame(rank, number + 1, step, produced, {}))
        end = self._end(step)
        frames.append(end.frame(rank, number + 2, step, produced, {"clock": _DOUBLE.pack(ended_at)}))
        return frames

    def _end(self, step: int) -> Template:
        due = due_families(step)
        if due not in self._ends:
            message = StepEnd(step=_STEP, unix_time=_CLOCK, sent=_sent(step, 1), due=due, hook_seconds=0.002)
            self._ends[due] = Template(self._identity, message, {"clock": _DOUBLE.pack(_CLOCK)})
        return self._ends[due]

    def _changed(self, rank: int, step: int) -> dict[str, bytes]:
        """Return what is this rank's and step's own: the samples, and the weights that all ranks have alike."""
        if self._weights[0] != step:
            self._weights = step, np.random.default_rng(step).standard_normal(WEIGHTS, np.float32).tobytes()
        place = struct.pack("<II", rank, step)
        return {
            "hashes": hashlib.blake2b(place, digest_size=64).digest(),
            "images": hashlib.blake2b(place, digest_size=64, key=b"i").digest(),
            "weights": self._weights[1],
            "took": _DOUBLE.pack(1.0 + 1e-4 * (rank % 97)),
        }

    def _signals_with_rows(self, rank: int, step: int) -> Signals:
        changed = self._changed(rank, step)
        return _signals(
            step,
            _DOUBLE.unpack(changed["took"])[0],
            changed["hashes"],
            changed["images"],
            changed["weights"],
            norms=step % NORMS_EVERY == 0,
            rows=_rows(self._rng, self._rows),
        )

    def _encoded(self, rank: int, step: int, sequence: int, ended_at: float) -> list[bytes]:
        messages: list[Message] = [Scalars(step=step, values={"loss": 2.0 + 0.01 * (step % 7), "tokens": 192 * step})]
        if step % DUE_EVERY == 0:
            messages += [_tokens(step, rank), _losses(step, rank)]
            messages.append(LearningRates(step=step, rates=np.array([3e-4, 1e-3])))
        if step % GRADIENTS_EVERY == 0:
            messages.append(_gradients(self._rng, step))
        if step % SAMPLES_EVERY == 0:
            messages.append(_generation(self._rng, step))
        messages += [self._signals_with_rows(rank, step), _answers(step)]
        end = StepEnd(step=step, unix_time=ended_at, sent=_sent(step, 0), due=due_families(step), hook_seconds=0.002)
        produced = _produced(step, rank)
        return [encode(self._of(rank, sequence + at, produced), each) for at, each in enumerate([*messages, end])]


def _sent(step: int, rank: int) -> dict[str, int]:
    """Return how many of each kind a rank sends at a step, ``StepEnd`` left out."""
    sent = {"signals": 1, "answers": 1}
    if step % DUE_EVERY == 0:
        sent |= {"tokens": 1, "losses": 1}
    if rank == 0:
        sent["scalars"] = 1
        intervals = (("learning_rates", DUE_EVERY), ("gradients", GRADIENTS_EVERY), ("generation", SAMPLES_EVERY))
        sent |= {name: 1 for name, interval in intervals if step % interval == 0}
    return sent


def _produced(step: int, rank: int) -> dict[str, int]:
    """Return how many of each kind a rank has made once ``step`` has ended."""
    due = step // DUE_EVERY + 1 if step >= 0 else 0
    made = {"signals": step + 1, "answers": step + 1, "step_end": step + 1, "tokens": due, "losses": due}
    if rank == 0 and step >= 0:
        made |= {
            "learning_rates": due, "gradients": step // GRADIENTS_EVERY + 1, "generation": step // SAMPLES_EVERY + 1,
            "scalars": step + 1,
        }  # fmt: skip
    return made


def _signals(
    step: int, took: float, hashes: bytes, images: bytes, weights: bytes, *, norms: bool,
    rows: Mapping[str, Any] | None = None,
) -> Signals:  # fmt: skip
    known = {
        "positions": POSITIONS, "padding": 300, "compared": LABELLED, "labelled": LABELLED, "labels_equal_ids": 2,
        "labels_equal_next_ids": LABELLED, "labels_masked": 0, "answers": SAMPLES, "answers_with_eos": SAMPLES,
        "batches": 1, "batches_without_labels": 0,
    }  # fmt: skip
    return Signals(
        step=step,
        counts=np.array([known.get(name, -1) for name in SIGNAL_COUNTS], np.int64),
        labelled=LABELLED,
        sampled=True,
        vocabulary=VOCABULARY,
        trainer_losses=np.array([2.0 + 0.01 * (step % 7)], np.float32),
        sample_hashes=np.frombuffer(hashes, np.int64),
        image_hashes=np.frombuffer(images, np.int64),
        image_deviations=np.full(SAMPLES, 0.25, np.float32),
        projector_rms=0.9,
        projector_spread=0.4,
        gradient_norm=np.array([1.5], np.float32),
        module_norms=np.array([0.5, 0.4, 1.2, 0.3] if norms else [], np.float32),
        heartbeat=np.frombuffer(weights, np.float32),
        heartbeat_digest=12_345,
        rates=np.array([3e-4, 1e-3]),
        step_seconds=took,
        signal_seconds=0.002,
        forward_seconds=0.3,
        **(rows or {}),
    )


def _rows(rng: np.random.Generator, num_rows: int) -> dict[str, Any]:
    """Rows of a healthy model: answers of 8 positions, right in four of ten."""
    targets = np.minimum(rng.zipf(1.3, num_rows) + 4, VOCABULARY - 1).astype(np.int32)
    is_right = rng.random(num_rows) < 0.4
    means = np.sort(rng.random(64))[::-1] / 64
    return {
        "targets": targets,
        "predictions": np.where(is_right, targets, rng.integers(5, VOCABULARY, num_rows)).astype(np.int32),
        "losses": rng.gamma(2.0, 1.0, num_rows).astype(np.float16),
        "entropies": rng.gamma(2.0, 1.0, num_rows).astype(np.float16),
        "eos_probabilities": (rng.random(num_rows) * 0.1).astype(np.float16),
        "places": (np.arange(num_rows) % 8).astype(np.uint8),
        "answers": (np.arange(num_rows) // 8).astype(np.uint16),
        "top_probability": 0.4,
        "mean_ids": rng.choice(VOCABULARY, 64, replace=False).astype(np.int32),
        "mean_probabilities": means.astype(np.float32),
    }


def _answers(step: int) -> Answers:
    return Answers(
        step=step,
        epoch=0,
        lengths=np.array([7, 23, 31], np.int32),
        counts=np.array([4, 2, 2], np.int64),
        labelled=LABELLED,
        batches=1,
    )


def _tokens(step: int, rank: int) -> Tokens:
    rng = np.random.default_rng(rank)
    real = np.sort(rng.choice(VOCABULARY, 500, replace=False)).astype(np.int32)
    labelled = np.sort(rng.choice(VOCABULARY, 100, replace=False)).astype(np.int32)
    return Tokens(
        step=step,
        microstep=0,
        positions=POSITIONS,
        padding=300,
        answers=SAMPLES,
        real_ids=real,
        real_counts=rng.integers(1, 6, 500),
        labelled_ids=labelled,
        labelled_counts=rng.integers(1, 4, 100),
        content_counts=np.ones(100, np.int64),
    )


def _losses(step: int, rank: int) -> Losses:
    rng = np.random.default_rng(rank + 1)
    losses: NDArray[np.float32] = rng.gamma(2.0, 1.0, LABELLED).astype(np.float32)
    highest = np.argsort(-losses, kind="stable")[:32].astype(np.int32)
    targets = rng.integers(5, VOCABULARY, LABELLED).astype(np.int32)
    roles = np.full(LABELLED, Role.LATER | Role.CONTENT, np.uint8)
    roles[:: LABELLED // SAMPLES] = Role.FIRST | Role.CONTENT
    return Losses(
        step=step,
        microstep=0,
        labelled=LABELLED,
        losses=losses,
        target_ids=targets,
        roles=roles,
        highest=highest,
        highest_losses=losses[highest],
        highest_targets=targets[highest],
        contexts=rng.integers(5, VOCABULARY, (32, 24)).astype(np.int32),
        trainer_loss=np.array([2.0], np.float32),
    )


def _gradients(rng: np.random.Generator, step: int) -> Gradients:
    numel = 576 * 576
    none = np.zeros(PARAMETERS, np.int64)
    return Gradients(
        step=step,
        parameters=np.arange(PARAMETERS, dtype=np.int32),
        counts=np.full(PARAMETERS, numel, np.int64),
        nonfinite=none,
        zeros=none,
        exponents=np.zeros(PARAMETERS, np.int32),
        means=rng.standard_normal(PARAMETERS) * 1e-4,
        m2=np.full(PARAMETERS, numel * 1e-6),
        absmax=np.full(PARAMETERS, 0.01),
    )


def _generation(rng: np.random.Generator, step: int) -> Generation:
    lengths = rng.integers(5, 40, 16)
    return Generation(
        step=step,
        samples=np.arange(16, dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        ids=rng.integers(5, VOCABULARY, int(lengths.sum())).astype(np.int32),
        seconds=0.5,
    )
