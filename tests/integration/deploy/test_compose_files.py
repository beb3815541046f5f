"""The compose files, the Dockerfiles and the scripts: what linters say, and promises that no linter knows."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidestep.protocol.endpoints import Endpoint
from sidestep.worker.cli import build_parser
from sidestep.worker.config import WorkerConfig

ROOT = Path(__file__).resolve().parents[3]
OVERRIDES = ("docker-compose.gpu.yml", "docker-compose.curve.yml")
SCRIPTS = (".ci/compose", ".ci/slurm", "deploy/slurm/train.sbatch")


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # it has no types
    """Takes compose's own tags."""


_Loader.add_constructor("!reset", lambda _loader, _node: None)


def services(name: str) -> dict[str, dict[str, Any]]:
    content = yaml.load((ROOT / name).read_text("utf-8"), _Loader)  # noqa: S506 (a safe loader, and our own file)
    found: dict[str, dict[str, Any]] = content["services"]
    return found


def tool(name: str) -> str:
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    assert found is not None, f"{name} is not installed: pip install -e '.[dev]'"
    return found


def test_hadolint_finds_nothing_in_the_dockerfiles() -> None:
    files = [str(path) for path in sorted((ROOT / "docker").glob("Dockerfile.*"))]
    assert len(files) == 2
    done = subprocess.run([tool("hadolint"), *files], capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing_in_a_script(script: str) -> None:
    if not (ROOT / script).exists():
        pytest.skip("an unpacked source archive has no .ci")
    subprocess.run(["bash", "-n", ROOT / script], check=True, timeout=30)
    done = subprocess.run([tool("shellcheck"), ROOT / script], capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


def test_compose_takes_every_file_and_profile() -> None:
    compose = ["docker", "compose"]
    if not shutil.which("docker") or subprocess.run([*compose, "version"], check=False, capture_output=True).returncode:
        pytest.skip("no docker compose here; .ci/compose asks the engine's")
    for override in (None, *OVERRIDES):
        files = ["--file=docker-compose.yml", *([f"--file={override}"] if override else [])]
        for profile in ([], ["--profile=two"]):
            subprocess.run([*compose, *files, *profile, "config", "--quiet"], cwd=ROOT, check=True, timeout=30)


def test_every_service_is_hardened() -> None:
    for name, service in (
        services("docker-compose.yml") | {"keys": services("docker-compose.curve.yml")["keys"]}
    ).items():
        assert service["user"] == "10001:10001", name
        assert service["read_only"] is True, name
        assert service["init"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert service["mem_limit"] == service["memswap_limit"], name
        assert service["pids_limit"], name


def test_the_worker_keeps_its_data_and_has_the_time_to_drain() -> None:
    worker = services("docker-compose.yml")["worker"]
    assert "runs:/data" in worker["volumes"]
    assert worker["restart"] == "unless-stopped"
    grace = float(worker["stop_grace_period"].removesuffix("s"))
    assert grace > WorkerConfig().sink_drain_seconds + 2 + 8, "2 s of intake, 8 s of assembly, then the sinks"
    options = build_parser().parse_args(worker["command"])
    assert Endpoint.parse(options.endpoint).is_private


def test_off_the_host_there_are_keys() -> None:
    over_the_network = services("docker-compose.curve.yml")
    options = build_parser().parse_args(over_the_network["worker"]["command"])
    assert not Endpoint.parse(options.endpoint).is_private
    assert str(options.keys) == "/keys"
    for name in ("trainer", "second-trainer"):
        assert over_the_network[name]["environment"]["SIDESTEP_KEYS"] == "/keys"
        assert over_the_network[name]["volumes"] == ["keys:/keys:ro"]


def test_trainers_start_whatever_the_workers_health() -> None:
    found = services("docker-compose.yml")
    for name in ("trainer", "second-trainer"):
        assert found[name]["depends_on"]["worker"]["condition"] == "service_started"
    assert found["second-trainer"]["profiles"] == ["two"]


def test_gpus_are_asked_for_in_the_override_alone() -> None:
    assert all("deploy" not in service for service in services("docker-compose.yml").values())
    for name, service in services("docker-compose.gpu.yml").items():
        [device] = service["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"]), name
