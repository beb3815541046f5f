"""The pages of a real worker, scraped while trainers speak to it, and what ``sidestep status`` makes of them."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from tests.support.wire_trainer import CONTENTS, WireTrainer, make_hello
from tests.support.worker_process import WorkerProcess, wait_until

from sidestep.protocol.frames import Envelope
from sidestep.protocol.messages import LearningRates, Notice, Scalars, StepEnd
from sidestep.trainer_hooks.publisher import Publisher
from sidestep.worker.heard import MAX_SHOWN_RANKS

MARK = "a text of the training"
RATES: NDArray[np.float64] = np.array([0.1, 0.2])


@pytest.fixture
def worker() -> Iterator[WorkerProcess]:
    made = WorkerProcess()
    made.start()
    yield made
    made.remove()


@pytest.fixture
def feeding_worker() -> Iterator[WorkerProcess]:
    """A worker with a W&B process beside it, which ends with it and not after it."""
    made = WorkerProcess(wandb_mode="offline")
    made.start()
    yield made
    made.terminate()
    made.remove()


def page(worker: WorkerProcess, name: str) -> str:
    url = json.loads((worker.journal / "worker.json").read_text())["health_url"]
    with urllib.request.urlopen(url.replace("healthz", name), timeout=10) as answer:  # noqa: S310  (loopback)
        return str(answer.read().decode())


def scrape(worker: WorkerProcess) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(page(worker, "metrics"))}


def value(scraped: dict[str, Metric], name: str, **labels: str) -> float:
    """Return the one sample of ``name`` that has these labels."""
    (only,) = values(scraped, name, **labels)
    return only


def values(scraped: dict[str, Metric], name: str, **labels: str) -> list[float]:
    found = scraped[f"sidestep_{name}"].samples
    return [float(sample.value) for sample in found if labels.items() <= sample.labels.items()]


def sink_state(worker: WorkerProcess) -> str:
    samples = scrape(worker)["sidestep_sink_state"].samples
    (state,) = [sample.labels["state"] for sample in samples if sample.value]
    return str(state)


def test_the_figures_of_a_run_are_those_of_its_trainer_and_its_journal(
    feeding_worker: WorkerProcess,
) -> None:
    worker = feeding_worker
    hello = make_hello(run_config={"note": MARK})
    identity = Envelope(run_id="run-1", incarnation="inc-1", rank=0)
    publisher = Publisher(worker.address, identity, hello, blobs=CONTENTS).start()
    try:
        for step in range(20):
            publisher.submit(Scalars(step=step, values={MARK: step, "said": MARK}))
            publisher.submit(Notice(text=MARK, code=MARK, step=step))
            publisher.submit(StepEnd(step=step, unix_time=1.7e9 + step, sent={"scalars": 1}))
        wait_until(lambda: values(scrape(worker), "run_closed_step", run="run-1") == [19], "all steps close")
        wait_until(lambda: sink_state(worker) == "running", "W&B's process has opened the run")
        wait_until(lambda: values(scrape(worker), "sink_unsent_entries", run="run-1") == [0], "W&B has all")
        said = scrape(worker)
        assert value(said, "healthy") == 1
        assert value(said, "rank_last_step", run="run-1", rank="0") == 19
        assert value(said, "run_closed_steps", run="run-1", reason="complete") == 20
        assert value(said, "run_open_steps", run="run-1") == 0
        assert value(said, "run_lag_seconds", run="run-1") == 0
        assert 0 <= value(said, "run_since_heard_seconds", run="run-1") < 30
        for kind, count in {"scalars": 20, "notice": 20, "step_end": 20}.items():
            assert value(said, "messages_produced", run="run-1", kind=kind) == count
            assert value(said, "messages_dropped", run="run-1", kind=kind) == 0
            assert value(said, "messages_refused", run="run-1", kind=kind) == 0
        assert value(said, "messages_resent", run="run-1") == publisher.statistics().num_resends
        assert value(said, "journal_messages") == 60
        assert value(said, "receiver_events", event="journaled") == 60
        on_disk = sum(file.stat().st_size for file in worker.journal.glob("*.sqlite*"))
        assert value(said, "journal_bytes") >= on_disk > 0
        assert value(said, "journal_segments") == 1
        assert value(said, "sink_state", run="run-1", sink="wandb", state="running") == 1
        assert value(said, "sink_restarts", run="run-1", sink="wandb") == 0
        for name in ("metrics", "healthz"):
            assert MARK not in page(worker, name), "training texts are private"
    finally:
        publisher.close()


def test_names_and_types_are_as_prometheus_wants_them(worker: WorkerProcess) -> None:
    with WireTrainer(worker.address) as trainer:
        trainer.greet()
        trainer.wait_for_acks(trainer.send_step(0))
    for family in scrape(worker).values():
        assert family.documentation, family.name
        assert family.name.startswith(("sidestep_", "process_"))
        if family.type == "counter":
            assert {sample.name for sample in family.samples} <= {f"{family.name}_total"}
        else:
            assert not family.name.endswith("_total")


def test_of_more_ranks_than_a_page_holds_the_first_and_the_last_are_told(worker: WorkerProcess) -> None:
    num_ranks = MAX_SHOWN_RANKS + 2
    with WireTrainer(worker.address) as trainer:
        for rank in range(num_ranks):  # a connection each: it greets, sends its step and goes
            trainer.rank, trainer.sequence = rank, 0
            trainer.acked.clear()
            trainer.connect()
            trainer.greet(make_hello(world_size=num_ranks))
            trainer.send(LearningRates(step=rank % 3, rates=RATES))
            trainer.wait_for_acks([trainer.send(StepEnd(step=rank % 3, unix_time=1.7e9))])
        wait_until(lambda: values(scrape(worker), "run_ranks_heard") == [num_ranks], "all ranks are heard")
    said = scrape(worker)
    assert value(said, "run_ranks", run="run-1") == num_ranks
    assert said["sidestep_rank_last_step"].samples == []
    assert (value(said, "run_slowest_step", run="run-1"), value(said, "run_newest_step", run="run-1")) == (0, 2)
    shown = worker.run("status").stdout
    assert f"{num_ranks} of {num_ranks} heard; last step 0 to 2" in shown


def test_status_shows_a_run_and_what_to_do_about_it(worker: WorkerProcess) -> None:
    with WireTrainer(worker.address) as trainer:
        trainer.greet(make_hello(world_size=2))
        trainer.wait_for_acks([*trainer.send_step(0), *trainer.send_step(1)])
        wait_until(lambda: "sidestep_rank_last_step{" in page(worker, "metrics"), "the rank is heard")
        shown = worker.run("status", str(worker.out))
        assert shown.returncode == 0, "a rank that is missing is no illness of the worker"
        assert shown.stdout.startswith("healthy: process ")
        assert "run run-1: heard " in shown.stdout
        assert "1 of 2 heard; last step 1" in shown.stdout
        assert "2 steps open" in shown.stdout
        assert "to be looked at:" in shown.stdout
        assert "1 of 2 ranks are heard. Every rank needs attach()" in shown.stdout
        said = json.loads(worker.run("status", "--json").stdout)
        assert said["runs"]["run-1"]["last_steps"] == {"0": 1}
        assert said["warnings"]


def test_status_of_a_killed_worker_tells_since_when_and_what_is_kept(worker: WorkerProcess) -> None:
    with WireTrainer(worker.address) as trainer:
        trainer.greet()
        trainer.wait_for_acks(trainer.send_step(0))
        wait_until(worker.closed_steps, "the step closes")
    assert worker.process is not None
    pid = worker.process.pid
    worker.kill()
    shown = worker.run("status")
    assert shown.returncode == 1
    assert f"not healthy: no worker: the last one (process {pid}, started at " in shown.stdout
    assert "is gone without a word" in shown.stdout
    assert "4 messages; last written " in shown.stdout
    assert "run run-1: not ended, step 0 closed, " in shown.stdout
    assert f"sidestep worker --journal {worker.journal}" in shown.stdout
    assert f"sidestep replay {worker.journal}" in shown.stdout
    said = json.loads(worker.run("status", "--json").stdout)
    assert (said["healthy"], said["worker"]) == (False, "gone")
    assert said["holds"]["messages"] == 4
    assert said["holds"]["runs"]["run-1"]["is_ended"] is False


def test_status_of_a_worker_that_ended_in_order_says_so(worker: WorkerProcess) -> None:
    with WireTrainer(worker.address) as trainer:
        trainer.greet()
        trainer.wait_for_acks([*trainer.send_step(0), trainer.goodbye(0)])
        wait_until(lambda: worker.query("SELECT * FROM ending"), "the run ends")
    assert worker.terminate() == 0
    shown = worker.run("status")
    assert shown.returncode == 1
    assert " ended in order at " in shown.stdout
    assert "run run-1: ended with 0, step 0 closed" in shown.stdout
    assert json.loads(worker.run("status", "--json").stdout)["worker"] == "ended"
