"""Endpoints: what is accepted, what is private, where the default lies."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidestep.protocol.endpoints import Endpoint, default_endpoint, runtime_folder
from sidestep.protocol.errors import EndpointError


@pytest.mark.parametrize(
    ("text", "private"),
    [
        ("ipc:///run/user/0/sidestep/worker.sock", True),
        ("tcp://127.0.0.1:5555", True),
        ("tcp://127.9.9.9:*", True),
        ("tcp://[::1]:5555", True),
        ("tcp://localhost:80", True),
        ("tcp://0.0.0.0:5555", False),
        ("tcp://[::]:5555", False),
        ("tcp://*:5555", False),
        ("tcp://10.0.0.3:5555", False),
        ("tcp://worker:5555", False),
    ],
)
def test_only_sockets_and_loopback_are_private(text: str, private: bool) -> None:
    endpoint = Endpoint.parse(text)
    assert endpoint.address == text
    assert endpoint.is_private is private


@pytest.mark.parametrize(
    "text",
    ["", "worker", "ipc://", "ipc://relative", "ipc://@abstract", "tcp://host", "tcp://host:0", "tcp://host:70000",
     "tcp://a b:1", "inproc://x", "tcp://host:12x", "http://host:80"],
)  # fmt: skip
def test_what_is_not_an_endpoint_is_named_in_the_error(text: str) -> None:
    with pytest.raises(EndpointError, match="endpoint"):
        Endpoint.parse(text)


def test_a_socket_path_that_the_system_cannot_hold_says_how_to_shorten_it() -> None:
    with pytest.raises(EndpointError, match="SIDESTEP_RUNTIME"):
        Endpoint.parse("ipc:///" + "x" * 200)


def test_the_runtime_folder_can_be_chosen() -> None:
    assert runtime_folder({"SIDESTEP_RUNTIME": "/short"}) == Path("/short")
    assert default_endpoint({"SIDESTEP_RUNTIME": "/short"}).address == "ipc:///short/worker.sock"
    assert runtime_folder({}).name.startswith("sidestep")
