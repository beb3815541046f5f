"""Every bound of the wire, in one place, with its unit in its name (docs/delivery.md, sections 5 and 8)."""

from __future__ import annotations

MAX_MESSAGE_BYTES = 64 << 20
"""A whole message, chunks joined. Nothing larger is encoded or joined."""

MAX_FRAME_BYTES = 1 << 20
"""One ZeroMQ frame as a receiver accepts it (MAXMSGSIZE)."""

CHUNK_BYTES = 256 << 10
"""Messages over this size travel in chunks of it, and are acked whole."""

MAX_CHUNKS = MAX_MESSAGE_BYTES // CHUNK_BYTES
"""Chunks of one message."""

MAX_HEAD_BYTES = 4 << 20
"""The msgpack head of a message (Hello carries the trainer's configuration)."""

MAX_ARRAYS = 32
"""Arrays in one message."""

MAX_ARRAY_DIMENSIONS = 4
"""Dimensions of one array."""

MAX_TEXT_BYTES = 1 << 20
"""One string inside a head."""

MAX_NESTING_LEVELS = 16
"""Depth of a free-form map (the trainer's configuration)."""

MAX_MAP_ENTRIES = 65_536
"""Entries of one map or list inside a head."""

MAX_HEAD_ENTRIES = 262_144
"""Entries of all maps and lists inside a head together, a map's keys and values each."""

MAX_ACCOUNTS = 64
"""Kinds in a head's accounts."""

MAX_IDENTITY_CHARACTERS = 128
"""A run's or incarnation's id."""

MAX_RANKS = 65_536
"""Ranks of one incarnation."""

MAX_RANGES = 65_536
"""Ranges of sequence numbers that one ack can name."""

MAX_TABLES = 16
"""Tables that one Hello names."""

MAX_BLOB_BYTES = 48 << 20
"""One table by hash: a tokenizer, a parameter table, the samples with their images."""

MAX_TABLE_ENTRIES = 4_194_304
"""Entries of all maps and lists inside a table together, a map's keys and values each."""

MAX_EXACT_LOSS_TOKENS_PER_STEP = 1_000_000
"""Labelled tokens of a due step, over all ranks, that are kept one by one (docs/metrics.md, "Due data too large")."""

LOSS_HISTOGRAM_BINS = 2_048
"""Bins of the loss histogram of a step that is too large to be kept token by token."""

LOSS_HISTOGRAM_MAX_NATS = 64.0
"""Upper edge of that histogram; larger losses count in the last bin (their exact maximum travels beside it)."""

GRADIENT_HISTOGRAM_BINS = 64
"""Bins of a module's histogram of log10 |gradient|."""

GRADIENT_HISTOGRAM_LOG10_RANGE = (-12.0, 4.0)
"""Edges of that histogram; finite non-zero values outside count in the first or last bin."""

WINDOW_BYTES = 64 << 20
"""Unacked messages and unsent lanes of one publisher together."""

MAX_PUBLISHER_TICK_MESSAGES = 8
"""Messages a publisher sends in one tick, resends included."""

MAX_PUBLISHER_TICK_BYTES = 1 << 20
"""Bytes a publisher sends in one tick, resends included."""

PUBLISHER_TICK_SECONDS = 0.02
"""Time between two ticks of a publisher's thread while something is left to send."""

PUBLISHER_IDLE_TICK_SECONDS = 0.2
"""The same while nothing is: how late an ack, a warning or a command may be taken."""

SEND_HIGH_WATER_MARK_MESSAGES = 32
"""ZeroMQ's own queue on the trainer's side."""

RECEIVE_HIGH_WATER_MARK_MESSAGES = 16
"""ZeroMQ's own queue per peer on the worker's side."""

TCP_KEEPALIVE_IDLE_SECONDS, TCP_KEEPALIVE_INTERVAL_SECONDS, TCP_KEEPALIVE_PROBES = 60, 15, 4
"""Of both sides' connections: the kernel lets go of a host that lost its power after two minutes."""

MAX_IPC_PATH_BYTES = 107
"""Length of a Unix socket's path."""

MAX_HIGHEST_TOKENS = 32
"""Rows of the table ``loss/highest_tokens`` that one micro-batch proposes."""

HIGHEST_TOKEN_CONTEXT_TOKENS = 24
"""Token ids of context that travel with each of them."""

MAX_SIGNAL_ROWS_PER_STEP = 4_096
"""Rows of ``Signals`` over all ranks and micro-batches that may be asked for."""

MAX_SIGNAL_HASHES = 256
"""Sample and image hashes, each, that one ``Signals`` carries."""

MAX_SIGNAL_MEAN_IDS = 64
"""Ids of the mean prediction that one ``Signals`` carries."""

MAX_HEARTBEAT_WEIGHTS = 128
"""Weights that a rank's heartbeat looks at."""
