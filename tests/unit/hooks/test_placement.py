"""Where rank 0 puts a worker, which run its starts belong to, and what the other ranks make of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sidestep.protocol.errors import EndpointError
from sidestep.trainer_hooks.agreement import Agreed
from sidestep.trainer_hooks.console import Console
from sidestep.trainer_hooks.launch_identity import launch_identity, num_nodes
from sidestep.trainer_hooks.launcher import place_worker, run_folder
from sidestep.trainer_hooks.opening import way_there
from sidestep.trainer_hooks.placement import FAR_AWAY, choose_endpoint, reachable_address
from sidestep.worker.keys import make_keys

PUBLIC = "bQ{5-L01rs<^g65}L{lANw3lTzdCl^DcCd^pak(*"


@pytest.mark.parametrize(
    ("environment", "nodes"),
    [
        ({}, 1),
        ({"GROUP_WORLD_SIZE": "3"}, 3),
        ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, 2),
        ({"WORLD_SIZE": "9", "LOCAL_WORLD_SIZE": "8"}, 2),
        ({"SLURM_JOB_NUM_NODES": "4", "WORLD_SIZE": "32"}, 4),
        ({"WORLD_SIZE": "2"}, 1),
        ({"GROUP_WORLD_SIZE": "nonsense"}, 1),
    ],
)
def test_launchers_say_how_many_nodes_there_are(environment: dict[str, str], nodes: int) -> None:
    assert num_nodes(environment) == nodes


def test_starts_by_one_agent_are_one_launch_and_others_are_others() -> None:
    ask = (
        "import os; from sidestep.trainer_hooks.launch_identity import launch_identity; "
        "print(launch_identity(os.environ))"
    )

    def start(run_id: str) -> str:
        environment = {**os.environ, "TORCHELASTIC_RUN_ID": run_id}
        return subprocess.run(
            [sys.executable, "-c", ask], env=environment, capture_output=True, text=True, timeout=50, check=True
        ).stdout.strip()

    assert start("job") == start("job") != ""
    assert start("job") != start("other")
    assert launch_identity({"TORCHELASTIC_RUN_ID": "job"}) != start("job"), "another parent is another agent"
    assert launch_identity({}) == ""


def test_on_one_host_it_is_a_private_socket(tmp_path: Path) -> None:
    lines: list[str] = []
    chosen = choose_endpoint({"SIDESTEP_RUNTIME": str(tmp_path)}, Console(lines.append))
    assert chosen.is_private
    assert lines == []


def test_on_several_hosts_without_keys_a_line_says_what_to_do(tmp_path: Path) -> None:
    lines: list[str] = []
    environment = {"SIDESTEP_RUNTIME": str(tmp_path), "GROUP_WORLD_SIZE": "2"}
    assert choose_endpoint(environment, Console(lines.append)).is_private
    assert len(lines) == 1
    assert "2 nodes" in lines[0]
    assert "`sidestep keys DIR`" in lines[0]


def test_the_address_is_one_that_others_reach_or_a_line_says_what_to_do(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys")
    lines: list[str] = []
    environment = {
        "SIDESTEP_RUNTIME": str(tmp_path), "SIDESTEP_KEYS": str(tmp_path / "keys"), "GROUP_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
    }  # fmt: skip
    assert reachable_address("127.0.0.1") == ""
    chosen = choose_endpoint(environment, Console(lines.append))
    address = reachable_address(FAR_AWAY)
    if address:
        assert chosen.address.startswith(f"tcp://{address}:")
        assert chosen.port > 0
        assert lines == []
    else:  # a machine without a network
        assert chosen.is_private
        assert "SIDESTEP_ENDPOINT" in lines[0]


def test_an_endpoint_off_loopback_without_keys_is_a_mistake_at_attach() -> None:
    with pytest.raises(EndpointError, match="`sidestep keys DIR`"):
        place_worker("tcp://10.1.2.3:5757", environment={})


def test_a_run_goes_on_in_the_folder_that_holds_it(tmp_path: Path) -> None:
    first = run_folder(tmp_path, "abc")
    assert first.name.endswith("-abc")
    (first / "journal").mkdir(parents=True)
    assert run_folder(tmp_path, "abc") == first
    for other in ("bc", "c", "xabc", "", "../abc", "a/bc", "*"):
        assert run_folder(tmp_path, other) != first
        assert run_folder(tmp_path, other).parent == tmp_path
    (tmp_path / "20260101-000000-more-abc" / "journal").mkdir(parents=True)
    assert run_folder(tmp_path, "abc") == first, "another run's name ends alike"


def agreed(endpoint: str, host: str) -> Agreed:
    return Agreed(run_id="r", incarnation="i", endpoint=endpoint, server_key=PUBLIC, host=host)


def test_a_rank_elsewhere_does_not_take_its_own_private_socket_for_rank_0s(tmp_path: Path) -> None:
    lines: list[str] = []
    console = Console(lines.append)
    there = f"ipc://{tmp_path}/s"
    assert way_there(agreed(there, "another-host"), None, 1, console) is None
    assert "goes on without hooks" in lines[0]
    assert "another-host" in lines[0]
    (tmp_path / "s").touch()  # a folder that both have: containers of one host
    way = way_there(agreed(there, "another-host"), None, 1, console)
    assert way is not None
    assert way[0].address == there
    own = way_there(agreed(there, "another-host"), "tcp://127.0.0.1:7000", 1, console)
    assert own is not None
    assert own[0].address == "tcp://127.0.0.1:7000", "what this rank was told goes first"


def test_a_rank_takes_the_servers_key_from_rank_0_where_it_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_keys(tmp_path / "keys")
    monkeypatch.setenv("SIDESTEP_KEYS", str(tmp_path / "keys"))
    pinned = way_there(agreed("tcp://10.1.2.3:5757", "a"), None, 1, Console())
    (tmp_path / "keys" / "server.public").unlink()
    told = way_there(agreed("tcp://10.1.2.3:5757", "a"), None, 1, Console())
    assert pinned is not None
    assert told is not None
    assert pinned[1] is not None
    assert told[1] is not None
    assert pinned[1].server_key != PUBLIC
    assert told[1].server_key == PUBLIC
    monkeypatch.delenv("SIDESTEP_KEYS")
    with pytest.raises(EndpointError, match="`sidestep keys DIR`"):
        way_there(agreed("tcp://10.1.2.3:5757", "a"), None, 1, Console())
