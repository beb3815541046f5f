"""A worker and its trainers on two hosts, with keys: cut, half-open, without power. All that was promised is there."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.support.namespaces import TRAINER, WORKER, TwoHosts, why_not
from tests.support.run_balance import check_balance, rows_of
from tests.support.torchrun import AGENT, Launches, RankLog, query, rank_logs
from tests.support.two_hosts import CUTS, PORT, Scene
from tests.support.worker_process import wait_until

from sidestep.worker.keys import make_keys

TRAINING = str(Path(__file__).with_name("elastic_training.py"))
CUT_SECONDS = 5.0
NO_HOSTS = why_not()

LONG_CUTS = bool(os.environ.get("SIDESTEP_LONG_CUTS"))
pytestmark = [
    pytest.mark.skipif(bool(NO_HOSTS), reason=NO_HOSTS or "there are two hosts"),
    pytest.mark.timeout(280),
]


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    make_keys(tmp_path / "keys")
    with ExitStack() as stack:
        hosts = stack.enter_context(TwoHosts())
        made = Scene(hosts, tmp_path / "keys")
        stack.callback(made.worker.remove)
        yield made


@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_of_five_seconds_costs_nothing(scene: Scene, tmp_path: Path, cut: str) -> None:
    begin, end = CUTS[cut]
    with scene.rank() as rank:
        scene.train(rank, 1.0)
        rank.flush()
        begin(scene.hosts)
        scene.train(rank, CUT_SECONDS)
        held = rank.accounts()
        end(scene.hosts)
        scene.train(rank, 1.0)
        rank.flush()
        told = rank.accounts()
        scene.finish(rank, tmp_path / "replayed")
    assert held["in_window"] > 0, "it was cut"
    assert (told["dropped"], told["refused"]) == (0, 0)
    assert told["accepted"] == told["produced"]
    assert scene.closed() == scene.steps()
    assert {reason for _, _, reason in scene.worker.closed_steps()} <= {"complete", "tail"}


@pytest.mark.skipif(
    not LONG_CUTS, reason="two minutes of waiting: SIDESTEP_LONG_CUTS=1 runs it, benchmarks/two_hosts.py too"
)
@pytest.mark.parametrize("cut", ["packets vanish", "the worker's cable"])
def test_a_cut_of_twenty_seconds_costs_nothing(scene: Scene, tmp_path: Path, cut: str) -> None:
    """Longer than a publisher waits for an answer: it has given up sockets meanwhile, and opened others in vain."""
    begin, end = CUTS[cut]
    with scene.rank() as rank:
        scene.train(rank, 0.5)
        rank.flush()
        begin(scene.hosts)
        scene.train(rank, 20.0)
        end(scene.hosts)
        rank.flush()
        told = rank.accounts()
        scene.finish(rank, tmp_path / "replayed")
    assert told["dropped"] == 0
    assert told["accepted"] == told["produced"]
    assert scene.closed() == scene.steps()


def test_a_connection_that_is_half_open_is_given_up_for_a_new_one(scene: Scene, tmp_path: Path) -> None:
    """The host on the way has forgotten this connection (a firewall's table): nothing ever says so."""
    with scene.rank() as rank:
        scene.train(rank, 0.5)
        rank.flush()
        (own_port,) = scene.hosts.connections_to(PORT)
        scene.hosts.drop("-p", "tcp", "--sport", str(own_port))
        scene.train(rank, 0.5)
        rank.flush()
        told = rank.accounts()
        assert scene.hosts.connections_to(PORT) != [own_port]
        scene.finish(rank, tmp_path / "replayed")
    assert told["resent"] > 0
    assert told["accepted"] == told["produced"]
    assert scene.closed() == scene.steps()


def test_the_workers_host_loses_its_power(scene: Scene, tmp_path: Path) -> None:
    """Not one packet tells the trainer: its worker is gone, and another one opens the same journal."""
    with scene.rank() as rank:
        scene.train(rank, 1.0)
        scene.hosts.link(WORKER, up=False)
        scene.hosts.kill_all(WORKER)
        scene.worker.kill()
        scene.train(rank, 2.0)
        scene.hosts.link(WORKER, up=True)
        scene.worker.start()
        scene.train(rank, 0.5)
        rank.flush()
        told = rank.accounts()
        scene.finish(rank, tmp_path / "replayed")
    assert told["accepted"] == told["produced"]
    assert scene.closed() == scene.steps()


def test_what_is_beyond_the_window_is_counted_to_the_last_message(scene: Scene, tmp_path: Path) -> None:
    with scene.rank(RANK_WINDOW_BYTES="40000") as rank:
        scene.train(rank, 0.5)
        wait_until(lambda: rank.accounts()["in_window"] == 0, "all before the cut has arrived", 60.0)
        scene.hosts.drop()
        scene.train(rank, 8.0)
        lost = rank.accounts()["dropped"]
        scene.hosts.pass_again()
        wait_until(lambda: rank.accounts()["in_window"] == 0, "all that is left has arrived", 60.0)
        scene.train(rank, 0.3)
        wait_until(lambda: rank.accounts()["in_window"] == 0, "and what came after", 60.0)
        told = rank.accounts()
        scene.finish(rank, tmp_path / "replayed")
    assert lost > 0
    assert told["dropped"] == lost, "nothing more, once it passes again"
    assert told["accepted"] + told["dropped"] == told["produced"]
    last: dict[str, float] = {}
    for kind, payload in scene.worker.outbox():
        if kind == "row":
            last.update({name: value for name, value in payload.items() if name.startswith("sidecar/dropped/")})
    assert sum(last.values()) == told["dropped"], json.dumps(last)
    assert scene.closed() == scene.steps(), "a step's end is never dropped"


def test_torchrun_over_two_hosts_has_one_worker_one_run_and_no_wait_in_a_cut(tmp_path: Path) -> None:
    """Nobody names an endpoint: rank 0 starts the worker where the other host reaches it, and tells it by the store."""
    out, enough = tmp_path / "out", tmp_path / "enough"
    out.mkdir()
    make_keys(tmp_path / "keys")
    short = tmp_path / "home"
    settings = {
        "SIDESTEP_KEYS": str(tmp_path / "keys"), "SIDESTEP_HOME": str(short), "WANDB_MODE": "disabled",
        "SIDESTEP_RUNTIME": str(short / "sockets"), "SIDESTEP_ASSEMBLY_DEADLINE_SECONDS": "60",
        "GLOO_SOCKET_IFNAME": "cable",
    }  # fmt: skip
    with TwoHosts() as hosts, Launches(settings) as launches:
        for host in (WORKER, TRAINER):
            place = [
                "--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint={hosts.addresses[WORKER]}:29400",
                f"--rdzv-conf=is_host={int(host == WORKER)}", f"--local-addr={hosts.addresses[host]}",
            ]  # fmt: skip
            command = [*AGENT, "--nproc-per-node=1", *place, TRAINING, str(out), "--until", str(enough)]
            launches.start([*hosts.at(host), *command])
        runs = short / "runs"
        launches.until(lambda: list(runs.glob("*/journal/worker.json")), "a worker listens")
        (folder,) = runs.iterdir()
        journal = folder / "journal"
        address = json.loads((journal / "worker.json").read_text())["endpoint"]
        assert address.startswith(f"tcp://{hosts.addresses[WORKER]}:")
        launches.until(lambda: _num_complete(journal) >= 5, "steps of both hosts are stored")
        match = ("-p", "tcp", "--dport", address.rpartition(":")[2])
        hosts.drop(*match)
        before = len(_rank_1(out).steps)
        time.sleep(CUT_SECONDS)
        during = len(_rank_1(out).steps) - before
        hosts.pass_again(*match)
        held = _num_complete(journal)
        launches.until(lambda: _num_complete(journal) > held + during, "what the cut held up has come")
        enough.touch()
        launches.wait()
        launches.until(lambda: query(journal, "SELECT attempt FROM ending"), "the run has ended")
        said = launches.said()
    assert during > 10, "the training went on"
    assert list(runs.iterdir()) == [folder], "one worker"
    newest = min(log.steps[-1]["step"] for log in rank_logs(out))
    closed = query(journal, "SELECT attempt, step, reason FROM step_closed WHERE reason != 'tail'")
    assert closed == [(0, step, "complete") for step in range(newest + 1)]
    assert query(journal, "SELECT DISTINCT run_id, world_size FROM incarnation")[0][1:] == (2,)
    assert query(journal, "SELECT tail_unknown, exit_code FROM ending") == [(0, 0)]
    for row in rows_of(journal, rank_logs(out)[0].head["run"]):
        assert "sidecar/ranks_seen" not in row
    assert max(step["hooks"] for log in rank_logs(out) for step in log.steps) < 1.0, "no hook has waited"
    assert said.count("sidestep: started a worker") == 1
    check_balance(journal, tmp_path / "replayed")


def _num_complete(journal: Path) -> int:
    return len(query(journal, "SELECT step FROM step_closed WHERE reason = 'complete'"))


def _rank_1(out: Path) -> RankLog:
    return next((log for log in rank_logs(out) if log.rank == 1), RankLog.none())
