"""Writes one frame of every kind in the current wire version to tests/golden/wire/; run it when the version changes.

    python tests/golden/record_wire.py

Frames of older versions stay: every released version must decode for ever (docs/wire_protocol.md).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sidestep.protocol import messages as m
from sidestep.protocol.frames import Envelope, encode
from sidestep.protocol.tables import digest
from sidestep.protocol.version import WIRE_MAJOR, WIRE_MINOR


def i32(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.int32)


def i64(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def f16(*values: float) -> NDArray[np.float16]:
    return np.array(values, np.float16)


def u8(*values: int) -> NDArray[np.uint8]:
    return np.array(values, np.uint8)


def u16(*values: int) -> NDArray[np.uint16]:
    return np.array(values, np.uint16)


def f32(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def f64(*values: float) -> NDArray[np.float64]:
    return np.array(values, np.float64)


def every_kind() -> list[m.Message]:
    """One message of each kind with every field set to something other than its default."""
    return [
        m.Hello(
            project="p",
            entity="e",
            name="n",
            tags=("a", "b"),
            start_step=7,
            world_size=4,
            topology={"local_rank": 1, "host": "h", "data_parallel_rank": 1, "copy": 1, "shares": 2},
            settings={"lr_interval": 25},
            run_config={"lr": 1e-3, "x": [1, None]},
            environment={"python": "3.11"},
            tables={"groups": digest(b"t")},
            capabilities={"loss": "exact"},
        ),
        m.Blob(digest=digest(b"table"), content=b"table"),
        m.Tokens(
            step=7,
            microstep=1,
            positions=10,
            padding=2,
            answers=2,
            real_ids=i32(1, 5),
            real_counts=i64(3, 5),
            labelled_ids=i32(5),
            labelled_counts=i64(4),
            content_counts=i64(2),
        ),
        m.Losses(
            step=7,
            microstep=1,
            labelled=3,
            sampled=True,
            losses=f32(0.5, np.inf, 2.0),
            target_ids=i32(1, 2, 3),
            roles=np.array([5, 6, 0], np.uint8),
            highest=i32(2),
            highest_losses=f32(2.0),
            highest_targets=i32(3),
            contexts=np.array([[-1, 4]], np.int32),
            trainer_loss=f32(1.25),
            histogram=i64(0, 3),
            partials=f64(*range(10)),
            reason="why",
        ),
        m.Gradients(
            step=7,
            parameters=i32(0, 2),
            counts=i64(6, 1),
            nonfinite=i64(1, 0),
            zeros=i64(2, 0),
            exponents=i32(-3, 4),
            means=f64(0.25, -1.0),
            m2=f64(1.5, 0.0),
            absmax=f64(0.125, 16.0),
            without_gradient=i32(1),
            histogram_modules=i32(0),
            histograms=np.arange(64, dtype=np.int64)[None],
            scale=1024.0,
            clipped=True,
            partial=i32(3),
        ),
        m.Answers(
            step=7, epoch=1, lengths=i32(1, 4), counts=i64(2, 3), labelled=30, batches=2, batches_without_labels=1
        ),
        m.Generation(
            step=7,
            samples=i32(0, 2),
            offsets=i64(0, 2, 3),
            ids=i32(8, 9, 2),
            failed=i32(1),
            failures=("ValueError: x",),
            max_new_tokens=32,
            seconds=0.5,
        ),
        m.LearningRates(step=7, rates=f64(1e-3, 2e-4)),
        m.Scalars(step=7, values={"val_loss": 1.5, "note": "ok"}, step_key="eval_step", key_step=3, reduce="mean"),
        m.StepEnd(
            step=7,
            unix_time=1.75e9,
            applied=False,
            epoch=1,
            sent={"losses": 2},
            dropped={"tokens": 1},
            due=("tokens", "loss"),
            hook_seconds=0.001,
            stage="long answers",
        ),
        m.Signals(
            step=7,
            counts=i64(*range(40, 40 + len(m.SIGNAL_COUNTS))),
            labelled=4,
            sampled=True,
            vocabulary=11,
            targets=i32(4, 2),
            predictions=i32(4, 9),
            losses=f16(0.25, 3.0),
            entropies=f16(0.5, 1.0),
            eos_probabilities=f16(0.0, 0.75),
            places=u8(0, 1),
            answers=u16(3, 3),
            top_probability=0.5,
            mean_ids=i32(9, 4),
            mean_probabilities=f32(0.5, 0.25),
            trainer_losses=f32(1.5),
            sample_hashes=i64(-5, 6),
            image_hashes=i64(8),
            image_deviations=f32(0.125),
            projector_rms=1.5,
            projector_spread=0.25,
            gradient_norm=f32(2.0),
            module_norms=f32(1.0, -1.0),
            heartbeat=f32(0.5, -0.5),
            heartbeat_digest=77,
            rates=f64(1e-3),
            step_seconds=0.5,
            wait_seconds=0.125,
            signal_seconds=0.001,
            device_seconds=0.0005,
            rows_share=0.5,
            norm_shares=2,
            norms_clipped=True,
            forward_seconds=0.25,
            image_means=f32(-0.5),
            weight_norms=f32(3.0, -1.0),
            heartbeat_ungrouped=1,
            optimizer_steps=f64(12.0, -1.0),
            group_settings=f32(0.5, 0.75, 1e-3, 0.125),
            gradients_lost=2,
        ),
        m.Probe(
            step=7,
            loss=1.0,
            rolled_loss=1.5,
            labelled=30,
            images=4,
            seconds=0.25,
            future_rows=3,
            future_change=0.125,
            apart_rows=4,
            apart_change=0.25,
            padding_rows=5,
            padding_change=0.5,
            image_rows=6,
            image_change=0.75,
            last_image_rows=7,
            last_image_change=0.875,
            misplaced_rows=8,
            misplaced_change=0.0625,
        ),
        m.Heartbeat(newest_step=7),
        m.Goodbye(newest_step=7, exit_code=1, reason="an exception"),
        m.Notice(text="Averages are fine", code="fine", level="info", step=7),
        m.Welcome(
            instance="w", committed=np.array([[1, 4], [6, 6]], np.int64), hello_known=True, wanted=(digest(b"t"),)
        ),
        m.Ack(committed=np.array([[1, 9]], np.int64), wanted=(digest(b"t"),)),
        m.NoAck(reason="disk full"),
        m.Refuse(sequence=5, reason="not decodable"),
        m.Reject(reason="wire version 2"),
        m.Command(action="stop", command_id="c1", reason="asked", at_step=20),
    ]


def envelope_of(message: m.Message) -> Envelope:
    sequence = 0 if message.kind in m.UNSEQUENCED else 11
    return Envelope(
        run_id="golden-run",
        incarnation="golden-incarnation",
        rank=3,
        sequence=sequence,
        accounts={"losses": (4, 1, 0)} if sequence else {},
        resent=2 if sequence else 0,
    )


def main() -> None:
    folder = Path(__file__).parent / "wire"
    folder.mkdir(exist_ok=True)
    for message in every_kind():
        name = f"{WIRE_MAJOR}.{WIRE_MINOR}-{message.kind.name.lower()}.frame"
        (folder / name).write_bytes(encode(envelope_of(message), message))


if __name__ == "__main__":
    main()
