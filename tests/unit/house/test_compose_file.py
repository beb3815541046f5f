"""What the containers promise: one private socket, no open port, the key with the worker only, no health gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def test_the_services_are_a_worker_and_two_trainers() -> None:
    assert set(SERVICES) == {"second-trainer", "trainer", "worker"}


@pytest.mark.parametrize("service", ["second-trainer", "trainer", "worker"])
def test_a_service_is_closed(service: str) -> None:
    settings = SERVICES[service]
    assert not settings.keys() & {"ports", "expose", "privileged", "pid", "ipc"}
    assert settings["read_only"] is True
    assert settings["init"] is True
    assert settings["cap_drop"] == ["ALL"]
    assert settings["security_opt"] == ["no-new-privileges:true"]
    assert settings["user"].split(":")[0] not in {"0", "root"}
    assert "mem_limit" in settings


def test_the_transport_is_a_socket_file_open_to_one_user() -> None:
    worker, trainer = SERVICES["worker"], SERVICES["trainer"]
    endpoint = trainer["environment"]["SIDESTEP_ENDPOINT"]
    assert endpoint.startswith("ipc:///run/sidestep/")
    assert endpoint in worker["command"]
    assert worker["user"] == trainer["user"]
    assert "socket:/run/sidestep" in worker["volumes"]
    assert "socket:/run/sidestep" in trainer["volumes"]
    user, group = worker["user"].split(":")
    options = COMPOSE["volumes"]["socket"]["driver_opts"]
    assert options["type"] == "tmpfs"
    assert {f"uid={user}", f"gid={group}", "mode=0700"} <= set(options["o"].split(","))


def test_the_key_is_the_workers_only() -> None:
    assert {name for name in SERVICES["trainer"]["environment"] if name.startswith("WANDB")} == set()
    assert SERVICES["worker"]["environment"]["WANDB_API_KEY"] is None
    assert SERVICES["worker"]["environment"]["WANDB_MODE"] == "${WANDB_MODE:-offline}"


def test_the_workers_health_never_keeps_the_trainer_from_starting() -> None:
    assert SERVICES["trainer"]["depends_on"] == {"worker": {"condition": "service_started"}}
    assert "depends_on" not in SERVICES["worker"]


def test_the_worker_has_time_to_end() -> None:
    assert int(SERVICES["worker"]["stop_grace_period"].removesuffix("s")) >= 45


def test_the_journal_outlives_the_containers() -> None:
    assert "runs:/data" in SERVICES["worker"]["volumes"]
    assert "runs" in COMPOSE["volumes"]


@pytest.mark.parametrize("image", ["worker", "trainer"])
def test_an_image_runs_as_the_user_of_the_compose_file(image: str) -> None:
    lines = (ROOT / "docker" / f"Dockerfile.{image}").read_text(encoding="utf-8").splitlines()
    assert f"USER {SERVICES[image]['user']}" in lines


def test_the_workers_image_takes_the_base_dependencies_only() -> None:
    text = (ROOT / "docker" / "Dockerfile.worker").read_text(encoding="utf-8")
    assert "optional-dependencies" not in text
    assert "HEALTHCHECK" in text
