"""Trainers that say what no trainer says, to a real worker: it stays, and serves the next one as well as ever."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import zmq
from tests.fuzz.front import seeds
from tests.fuzz.mutations import Mutator
from tests.support.wire_trainer import CONTENTS, WireTrainer, make_hello
from tests.support.worker_process import WorkerProcess, wait_until

from sidestep.protocol.frames import Envelope, encode
from sidestep.protocol.limits import MAX_FRAME_BYTES
from sidestep.protocol.messages import Generation, Gradients, Json, Message, Notice, Scalars, StepEnd, Tokens
from sidestep.protocol.tables import digest, encode_table

JUNK: tuple[Json, ...] = (
    None, True, -1, 1 << 62, 1.5, float("nan"), "x", "", b"b", [], {}, [1, "a", None], {"a": {"b": 1}}, [[[]]],
    {"names": 5}, [{"name": 1}], "x" * 500, {"1": 2},
)  # fmt: skip
SETTINGS = ("lr_interval", "loss_breakdown_interval", "answer_length_interval", "gradient_interval", "verdict")
PARAMETER = ("name", "module", "param", "shape", "numel", "offset", "local_shape", "trainable", "group")


@pytest.fixture(scope="module")
def worker() -> Iterator[WorkerProcess]:
    made = WorkerProcess("--assembly-deadline-seconds", "0.5")
    made.start()
    yield made
    code = made.terminate()
    made.remove()
    assert code == 0


@pytest.fixture(autouse=True)
def others_are_served(worker: WorkerProcess, request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    name = f"good-{request.node.name[-20:].strip('[]')}"
    with WireTrainer(worker.address, run_id=name, incarnation=name) as trainer:
        trainer.greet()
        trainer.wait_for_acks([*trainer.send_step(0), trainer.goodbye(0)])
    closed = (name, 0, "complete")
    wait_until(lambda: closed in worker.query("SELECT run_id, step, reason FROM step_closed"), "a good step closes")
    assert worker.run("status").returncode == 0


def hostile_tables(rng: random.Random) -> dict[str, bytes]:
    def junk() -> Json:
        return rng.choice(JUNK)

    image = {"shape": [junk(), 2, 3], "pixels": b"x" * 12}
    values: dict[str, Json] = {
        "parameters": {"modules": ["m"], "parameters": [{name: junk() for name in PARAMETER}]},
        "groups": {"names": junk()},
        "tokenizer": {"kind": rng.choice(("json", "texts", 5))}
        | {name: junk() for name in ("content", "texts", "eos_id", "pad_id", "vocabulary_size", "special_ids")},
        "samples": {"samples": [{"question": junk(), "target": junk(), "target_ids": junk(), "image": image}]},
    }
    return {name: encode_table(rng.choice((value, value, junk()))) for name, value in values.items()}


def hostile_messages(rng: random.Random) -> list[Message]:
    def array(dtype: type[np.generic], *values: float) -> np.ndarray[Any, Any]:
        return np.array(values, dtype)

    return [
        Scalars(step=2, values={"a": rng.choice(JUNK), "train/step": rng.choice(JUNK)}, step_key="_step", key_step=-1),
        Generation(
            step=1, samples=array(np.int32, 0, 5, -1), offsets=array(np.int64, 0, 7, -3, 1 << 60),
            ids=array(np.int32, 1),
        ),
        Gradients(
            step=1, parameters=array(np.int32, 0, -4, 1 << 30), counts=array(np.int64, 1),
            nonfinite=array(np.int64, -1), zeros=array(np.int64), exponents=array(np.int32, 1 << 30),
            means=array(np.float64, np.nan), m2=array(np.float64, -1.0), absmax=array(np.float64, np.inf),
        ),
        Tokens(
            step=1, microstep=0, positions=-5, padding=1 << 60, answers=-1, real_ids=array(np.int32, -9, 1 << 30),
            real_counts=array(np.int64, -1), labelled_ids=array(np.int32, 3), labelled_counts=array(np.int64, 1 << 62),
            content_counts=array(np.int64),
        ),
        StepEnd(
            step=rng.choice((2, 1 << 62)), unix_time=float("nan"), sent={"losses": 1 << 62, "x": -1},
            dropped={"tokens": -5},
        ),
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_tables_settings_and_messages_that_make_no_sense(worker: WorkerProcess, seed: int) -> None:
    rng = random.Random(seed)
    contents = hostile_tables(rng)
    CONTENTS.update({digest(content): content for content in contents.values()})
    hello = make_hello(
        tables={name: digest(content) for name, content in contents.items()},
        settings={name: rng.choice(JUNK) for name in SETTINGS},
        topology={name: rng.choice(JUNK) for name in ("host", "pid", "local_rank", "data_parallel_rank")},
        start_step=rng.choice((0, -5, 1 << 62)),
    )
    with WireTrainer(worker.address, run_id=f"odd-{seed}", incarnation=f"odd-{seed}") as trainer:
        trainer.greet(hello)
        sent = [*trainer.send_step(0), *map(trainer.send, hostile_messages(rng)), trainer.goodbye(2)]
        trainer.wait_for_acks(sent)
    ended = (f"odd-{seed}", 0)
    wait_until(lambda: ended in worker.query("SELECT run_id, exit_code FROM ending"), "its run ends", 20.0)


def test_frames_that_are_none(worker: WorkerProcess) -> None:
    mutator = Mutator(11, seeds())
    with WireTrainer(worker.address, run_id="mutant", incarnation="mutant") as trainer:
        trainer.greet()
        trainer.send_frames([mutator.mutate(mutator.rng.choice(mutator.corpus)) for _ in range(500)])
        trainer.wait_for_acks([trainer.send(Notice(text="after all that"))])


def test_multiparts_giants_and_what_is_not_zeromq(worker: WorkerProcess) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.connect(worker.address)
        good = encode(Envelope(run_id="r", incarnation="i", rank=0), make_hello())
        for parts in ([b"one", b"two"], [good, b"forged id", good], [b""] * 50):
            dealer.send_multipart(parts)
        dealer.send(bytes(MAX_FRAME_BYTES + 1))  # libzmq hangs up on it
        dealer.send(good)
        assert dealer.poll(10_000), "a connection made anew is served"
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(worker.address.removeprefix("ipc://"))
        raw.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(200))
