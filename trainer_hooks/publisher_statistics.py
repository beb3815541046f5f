"""The publisher's own figures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PublisherStatistics:
    """What the publisher did so far; a snapshot of its last tick."""

    num_ticks: int = 0
    num_frames_sent: int = 0
    num_bytes_sent: int = 0
    num_resends: int = 0
    num_connections: int = 0
    num_welcomes: int = 0
    num_handshake_failures: int = 0
    num_undecodable: int = 0
    num_encode_errors: int = 0
    num_errors: int = 0
    """Exceptions that a tick raised; none is expected."""
    num_unsent: int = 0
    num_unacked: int = 0
    window_bytes: int = 0
    """Bytes of lanes and window together."""
    rejected: bool = False
