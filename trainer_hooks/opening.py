"""What ``attach`` does once its arguments are known to be right: tables, introduction, and the way to the worker."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from sidestep.protocol import frames
from sidestep.protocol.endpoints import Endpoint
from sidestep.protocol.faults import Faults
from sidestep.protocol.frames import Envelope
from sidestep.protocol.keys import ClientKeys, client_keys
from sidestep.protocol.messages import Hello
from sidestep.protocol.tables import digest, encode_table
from sidestep.trainer_hooks.agreement import Agreed, host_name
from sidestep.trainer_hooks.config import HooksConfig
from sidestep.trainer_hooks.console import Console
from sidestep.trainer_hooks.environment import snapshot
from sidestep.trainer_hooks.errors import LaunchError
from sidestep.trainer_hooks.launch_identity import launch_identity
from sidestep.trainer_hooks.launcher import Launched, named_endpoint, place_worker, start_worker
from sidestep.trainer_hooks.plain import plain_map
from sidestep.trainer_hooks.publisher import Publisher
from sidestep.trainer_hooks.staging import Staging
from sidestep.trainer_hooks.topology import Topology
from sidestep.trainer_hooks.transport import OpenTransport, Transport


@dataclass(frozen=True, slots=True, kw_only=True)
class RunNames:
    """What the worker calls the run."""

    project: str = ""
    entity: str = ""
    name: str = ""
    tags: tuple[str, ...] = ()
    run_config: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Introduction:
    """Who speaks, and the tables that belong to it; opens the way to the worker."""

    agreed: Agreed
    address: str
    """Where this rank reaches the worker."""
    keys: ClientKeys | None
    """What the worker knows it by, where other hosts can reach that address."""
    placed: Launched
    """The worker, which this rank may have to start."""
    run_id_is_given: bool
    """By the caller or the environment: then no checkpoint's id counts."""
    rank: int
    hello: Hello
    blobs: Mapping[str, bytes]
    staging: Staging
    console: Console
    window_bytes: int
    open_transport: OpenTransport | None
    """In place of the publisher."""
    faults: Faults | None = None
    """What goes wrong on purpose."""

    def run_id(self, state: Mapping[str, Any]) -> str:
        """Explicit > ``SIDESTEP_RUN_ID`` > a checkpoint's > random (docs/delivery.md, section 1)."""
        told = state.get("run_id")
        return told if isinstance(told, str) and told and not self.run_id_is_given else self.agreed.run_id

    def open(self, state: Mapping[str, Any], start_step: int) -> Transport:
        """Begin to talk to the worker; nothing is waited for."""
        identity = Envelope(run_id=self.run_id(state), incarnation=self.agreed.incarnation, rank=self.rank)
        hello = replace(self.hello, start_step=start_step)
        if self.open_transport is not None:
            return self.open_transport(identity, hello, self.blobs, self.staging)
        if self.placed.is_to_start:
            self._start_worker(identity.run_id)
        return Publisher(
            self.address,
            identity,
            hello,
            blobs=self.blobs,
            source=self.staging,
            console=self.console,
            window_bytes=self.window_bytes,
            faults=self.faults,
            keys=self.keys,
        ).start()

    def _start_worker(self, run_id: str) -> None:
        """Never waited for; where none can be started, one may still be by hand, at the same address."""
        try:
            start_worker(self.placed, run_id, console=self.console)
        except LaunchError as error:
            self.console.line(f"sidestep: {error}")


def introduce(
    *,
    names: RunNames,
    config: HooksConfig,
    topology: Topology,
    model: nn.Module,
    tables: Mapping[str, Any],
    capabilities: Mapping[str, str],
    step: int,
) -> tuple[Hello, dict[str, bytes]]:
    """Put the Hello together, and the tables that it names by their hashes.

    Raises:
        EncodeError: a table or the configuration is too large.
        ValueError: ``run_config`` is no configuration.
    """
    contents = {name: encode_table(table) for name, table in tables.items()}
    digests = {name: digest(content) for name, content in contents.items()}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    hello = Hello(
        project=names.project,
        entity=names.entity,
        name=names.name,
        tags=names.tags,
        start_step=step,
        world_size=topology.world_size,
        topology=topology.as_table(),
        settings=config.as_settings(),
        run_config=plain_map(names.run_config),
        environment=snapshot(device),
        tables=digests,
        capabilities=capabilities,
    )
    frames.encode(Envelope(run_id="", incarnation="", rank=topology.rank), hello)  # what cannot travel is said here
    return hello, {digests[name]: content for name, content in contents.items()}


def find_worker(endpoint: str | None, rank: int, console: Console, *, needed: bool) -> Launched:
    """Where the worker listens: given, else in the environment, else where rank 0 starts one when the run is known.

    Raises:
        EndpointError: the address is malformed, or its keys cannot be used.
    """
    return place_worker(endpoint, rank=rank, console=console) if needed else Launched(endpoint=endpoint or "")


def choose_run_id(run_id: str | None) -> tuple[str, bool]:
    """The run's id, and whether the caller or the environment gave it.

    Else it is the same for all starts of one launch by torchrun's elastic agent, and random without one.
    """
    told = run_id or os.environ.get("SIDESTEP_RUN_ID", "")
    if told:
        return told, True
    return launch_identity(os.environ)[:8] or secrets.token_hex(4), False


def way_there(
    agreed: Agreed, endpoint: str | None, rank: int, console: Console
) -> tuple[Endpoint, ClientKeys | None] | None:
    """Return where this rank reaches the worker that rank 0 uses, and with which keys; None where it cannot.

    An address that this rank itself was given goes before rank 0's: the same worker may be elsewhere from here.

    Raises:
        EndpointError: the address is malformed, or can be reached from other hosts and its keys cannot be used.
    """
    own = named_endpoint(endpoint, os.environ)
    chosen = own or Endpoint.parse(agreed.endpoint)
    elsewhere = own is None and rank != 0 and agreed.host != host_name()
    if elsewhere and chosen.is_private and not (chosen.path is not None and chosen.path.exists()):
        console.line(
            f"sidestep: rank {rank} on {host_name()} cannot reach the worker, which listens at {chosen.address} on "
            f"{agreed.host} alone; it goes on without hooks. Make keys with `sidestep keys DIR` and set "
            "SIDESTEP_KEYS=DIR on every node, or set SIDESTEP_ENDPOINT there."
        )
        return None
    return chosen, client_keys(chosen, os.environ, told=agreed.server_key)
