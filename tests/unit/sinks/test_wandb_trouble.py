"""What is said when W&B does not take rows: the kind, the rows' safety, and what to do."""

from __future__ import annotations

import pytest

from sidestep.worker.delivery import wandb_patience
from sidestep.worker.errors import ConfigError
from sidestep.worker.sinks.wandb_server import Answer, ServerRun, ServerWatch, complaint_of
from sidestep.worker.sinks.wandb_trouble import told, trouble_of


@pytest.mark.parametrize(
    ("detail", "code"),
    [
        (complaint_of(Answer(status=429, text="slow down")), "wandb_rate_limited"),
        (complaint_of(Answer(status=503, text="")), "wandb_unreachable"),
        (complaint_of(Answer(status=400, text='{"error": "x"}')), "wandb_refused"),
        (complaint_of(Answer(status=401, text="")), "wandb_refused"),
        ("W&B's server does not answer (context deadline exceeded)", "wandb_unreachable"),
        ('CommError: Failed to get resume status: Post "http://h/graphql": connection refused', "wandb_unreachable"),
        ("CommError: Run initialization has timed out after 20.0 sec.", "wandb_unreachable"),
        ("CommError: failed to upsert bucket: returned error 403: permission denied", "wandb_refused"),
        ("UsageError: Invalid project name 'no/slash'", "wandb_refused"),
        ("no progress for 60 s with 12 entries waiting", "wandb_stalled"),
        ("ConnectionResetError: Connection lost", "wandb_sink_ended"),
        ("3 of 9 rows are missing at W&B's server after the end", "wandb_rows_sent_again"),
    ],
)
def test_each_trouble_has_a_name_and_says_what_to_do(detail: str, code: str) -> None:
    trouble = trouble_of(detail)
    assert trouble.code == code
    line = told("run-7", f"{detail}\n", trouble)
    assert "\n" not in line
    assert "run run-7" in line
    assert "kept in the journal" in line
    assert line.endswith(trouble.advice)
    assert len(trouble.advice) > 40


def test_rows_of_another_run_are_not_waited_for() -> None:
    trouble = trouble_of("W&B's run has 3 rows, this outbox 2", is_given_up=True)
    assert trouble.code == "wandb_foreign_rows"
    assert "SIDESTEP_RUN_ID" in trouble.advice


class Server:
    """A server's answers, as a test sets them."""

    def __init__(self) -> None:
        self.num_rows = 0
        self.is_away = False
        self.answers: list[Answer] = []

    def ask(self) -> ServerRun:
        if self.is_away:
            raise ConnectionError("nobody there")
        return ServerRun(num_rows=self.num_rows, state="running")

    def take_answers(self) -> list[Answer]:
        taken, self.answers = self.answers, []
        return taken


def test_a_complaint_stands_until_the_rows_of_that_moment_are_there() -> None:
    server, handed = Server(), 10
    watch = ServerWatch(server.ask, server.take_answers, lambda: handed)
    server.num_rows = 4
    watch.look(1e12)
    assert (watch.rows, watch.complaint) == (4, "")
    server.answers = [Answer(status=503, text="busy")]
    watch.look(1e12)
    assert "HTTP 503 busy" in watch.complaint
    server.num_rows = 9
    watch.look(1e12)
    assert (watch.rows, watch.complaint != "") == (9, True)
    server.num_rows = 10
    watch.look(1e12)
    assert (watch.rows, watch.complaint) == (10, "")


def test_a_server_that_is_away_is_said_and_what_it_said_before_is_kept() -> None:
    server = Server()
    watch = ServerWatch(server.ask, server.take_answers, lambda: 3)
    server.is_away = True
    watch.look(1e12)
    assert "does not answer (nobody there)" in watch.complaint
    server.answers = [Answer(status=400, text="")]
    watch.look(1e12)
    assert "refused an upload for good (HTTP 400)" in watch.complaint
    assert watch.rows is None
    server.is_away, server.num_rows = False, 3
    watch.look(1e12)
    assert watch.complaint == ""


def test_the_environment_tunes_the_sink() -> None:
    assert wandb_patience({}) == {}
    said = {"SIDESTEP_WANDB_ROWS_PER_SECOND": "0", "SIDESTEP_WANDB_STALL_SECONDS": "2.5"}
    assert wandb_patience(said) == {"rows_per_second": 0.0, "stall_seconds": 2.5}


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "inf", "0"])
def test_a_patience_that_is_none_is_named(value: str) -> None:
    with pytest.raises(ConfigError, match="SIDESTEP_WANDB_STALL_SECONDS"):
        wandb_patience({"SIDESTEP_WANDB_STALL_SECONDS": value})
