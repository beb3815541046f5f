"""What handing over 1,760 statistics costs the caller, beside W&B, Trackio, TensorBoard and a raw ZeroMQ send.

    python benchmarks/publish_cost.py [--quick] [--json FILE] [--messages N]

440 parameters with four statistics each, every 10 ms, in which the process multiplies matrices as a step does: it is
awake, and the caches are not the caller's. Each way has a process of its own; they take turns of a few calls, and who
waits is stopped (SIGSTOP), so that all see the same machine and none another's threads. Sidestep hands over a tensor
[440, 4] and a ``StepEnd`` to its real publisher beside a real worker; the raw send is one float32 frame to a process
that reads; the others get a dict of Python floats that is made before the clock starts, in their offline or local mode.
Trackio and TensorBoard are measured where they are installed (``pip install trackio tensorboard``).

Then, with nothing else running, how many small messages a second the worker takes in (``worker_throughput.py``):
decode, commit and ack, on one core, its memory read along the way.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

NUM_PARAMETERS, NUM_STATISTICS = 440, 4
SPACING_SECONDS = 0.01
TURN_CALLS = 10
WARMUP_TURNS = 2
PEERS = {"wandb": "wandb", "trackio": "trackio", "tensorboard": "tensorboard"}
"""Way to the package that it needs."""
FAST_WAYS = ("sidestep", "raw_zeromq")
"""Their calls are cheap, so that there are enough of them for a p99."""
GOALS_MS = {"median_ms": 0.03, "p99_ms": 0.3}

Publish = Callable[[int], object]
"""Hands the statistics of a step over."""


def names() -> list[str]:
    """Return the 1,760 keys."""
    kinds = ("norm", "mean", "std", "max")
    return [f"gradients/model.layers.{row}.weight/{kind}" for row in range(NUM_PARAMETERS) for kind in kinds]


def drawn(step: int) -> Any:
    """Return the statistics of a step [440, 4], float32."""
    import numpy as np  # noqa: PLC0415  # each process imports what it uses

    return np.random.default_rng(step).random((NUM_PARAMETERS, NUM_STATISTICS), np.float32)


class Sidestep:
    """Staging and publisher as the hooks use them."""

    def __init__(self, _folder: Path) -> None:
        """Start the publisher."""
        from sidestep.protocol.frames import Envelope  # noqa: PLC0415
        from sidestep.protocol.messages import Hello  # noqa: PLC0415
        from sidestep.protocol.tables import digest, encode_table  # noqa: PLC0415
        from sidestep.trainer_hooks.publisher import Publisher  # noqa: PLC0415
        from sidestep.trainer_hooks.staging import Staging  # noqa: PLC0415

        same = {"module": 0, "param": "weight", "shape": [4], "local_shape": [4], "numel": 4, "offset": 0}
        same |= {"trainable": True, "group": 0}
        rows = [{"name": f"model.layers.{row}.weight", **same} for row in range(NUM_PARAMETERS)]
        table = encode_table({"modules": ["model"], "parameters": rows})
        self._staging = Staging()
        self._publisher = Publisher(
            os.environ["SIDESTEP_ENDPOINT"],
            Envelope(run_id="publish-cost", incarnation="one", rank=0),
            Hello(project="benchmark", settings={"gradient_log_interval": 1}, tables={"parameters": digest(table)}),
            blobs={digest(table): table},
            source=self._staging,
        ).start()

    def prepare(self, step: int) -> Publish:
        """Return the call that is measured."""
        import numpy as np  # noqa: PLC0415
        import torch  # noqa: PLC0415

        from sidestep.protocol.messages import Gradients, Kind, StepEnd  # noqa: PLC0415

        statistics_of_step = torch.from_numpy(drawn(step))
        rows, four = np.arange(NUM_PARAMETERS, dtype=np.int32), np.full(NUM_PARAMETERS, 4, np.int64)
        zeros = np.zeros(NUM_PARAMETERS, np.int64)

        def finish(arrays: dict[str, Any]) -> list[Gradients]:
            columns = arrays["statistics"].astype(np.float64).T.copy()
            return [
                Gradients(
                    step=step, parameters=rows, counts=four, nonfinite=zeros, zeros=zeros,
                    exponents=np.zeros(NUM_PARAMETERS, np.int32), means=columns[1], m2=columns[2], absmax=columns[3],
                )
            ]  # fmt: skip

        def publish(step: int) -> None:
            self._staging.stage({"statistics": statistics_of_step}, finish, kinds=(Kind.GRADIENTS,), step=step)
            self._publisher.submit(StepEnd(step=step, unix_time=time.time(), sent={"gradients": 1}, due=("gradients",)))

        return publish

    def close(self) -> dict[str, Any]:
        """End the publisher; return what became of the messages."""
        self._publisher.close(20.0)
        accounts = self._publisher.accounts().values()
        keys = ("produced", "accepted", "refused", "dropped", "in_window")
        return {name: sum(getattr(account, name) for account in accounts) for name in keys}


class RawZeroMq:
    """One float32 frame, copied and sent without waiting, to a process that reads."""

    def __init__(self, folder: Path) -> None:
        """Connect."""
        import zmq  # noqa: PLC0415

        address = f"ipc://{folder}/raw.sock"
        self._reader = multiprocessing.get_context("spawn").Process(target=read_all, args=(address,), daemon=True)
        self._reader.start()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.connect(address)
        self._no_wait = zmq.NOBLOCK

    def prepare(self, step: int) -> Publish:
        """Return the call that is measured."""
        values = drawn(step)
        return lambda _step: self._socket.send(values.tobytes(), self._no_wait)

    def close(self) -> dict[str, Any]:
        """Disconnect."""
        self._socket.send(b"")
        self._reader.join(10)
        self._context.destroy(0)
        return {}


def read_all(address: str) -> None:
    """Read frames until an empty one; runs in a process of its own."""
    import zmq  # noqa: PLC0415

    with zmq.Context() as context, context.socket(zmq.PULL) as socket:
        socket.bind(address)
        while socket.recv():
            pass


class Tracker:
    """W&B, Trackio or TensorBoard, in the mode that needs no network."""

    def __init__(self, way: str, folder: Path) -> None:
        """Open the run."""
        self._log: Callable[[Mapping[str, float], int], object]
        self._end: Callable[[], object]
        getattr(self, f"_open_{way}")(folder)

    def _open_wandb(self, folder: Path) -> None:
        import wandb  # noqa: PLC0415

        settings = wandb.Settings(silent=True, console="off")
        run = wandb.init(mode="offline", dir=str(folder), project="benchmark", settings=settings)
        self._log, self._end = lambda values, step: run.log(dict(values), step=step), run.finish

    def _open_trackio(self, folder: Path) -> None:
        os.environ["TRACKIO_DIR"] = str(folder / "trackio")
        trackio: Any = importlib.import_module("trackio")
        trackio.init(project="benchmark")
        self._log, self._end = lambda values, step: trackio.log(dict(values), step=step), trackio.finish

    def _open_tensorboard(self, folder: Path) -> None:
        module: Any = importlib.import_module("torch.utils.tensorboard")
        writer = module.SummaryWriter(str(folder / "tensorboard"))

        def log(values: Mapping[str, float], step: int) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        self._log, self._end = log, writer.close

    def prepare(self, step: int) -> Publish:
        """Return the call that is measured."""
        values = dict(zip(names(), drawn(step).ravel().tolist(), strict=True))
        return lambda step: self._log(values, step)

    def close(self) -> dict[str, Any]:
        """End the run."""
        self._end()
        return {}


def work(seconds: float) -> None:
    """Multiply matrices over 8 MiB for so long: what a training step leaves of the caches."""
    import numpy as np  # noqa: PLC0415

    matrices = np.ones((8, 512, 512), np.float32)
    until = time.perf_counter() + seconds
    at = 0
    while time.perf_counter() < until:
        matrices[at % 8] @ matrices[(at + 1) % 8]
        at += 1


def call_in_turns(way: str, folder: str, pipe: Any) -> None:
    """Publish when told to; runs in a process of its own."""
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before numpy is loaded
    makers: dict[str, Callable[[Path], Any]] = {"sidestep": Sidestep, "raw_zeromq": RawZeroMq}
    try:
        logger = makers[way](Path(folder)) if way in makers else Tracker(way, Path(folder))
    except Exception as error:  # noqa: BLE001  (a peer that does not start here is told as such)
        pipe.send(f"does not start: {type(error).__name__}: {error}"[:200])
        return
    pipe.send("")
    step = 0
    while (num_calls := pipe.recv()) > 0:
        seconds = []
        for _ in range(num_calls):
            publish = logger.prepare(step)
            work(SPACING_SECONDS)
            began = time.perf_counter()
            publish(step)
            seconds.append(time.perf_counter() - began)
            step += 1
        pipe.send(seconds)
    pipe.send(logger.close())


class Way:
    """One way's process, stopped unless it is its turn."""

    def __init__(self, name: str, folder: Path) -> None:
        """Start it and wait until it has opened its run."""
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, theirs = context.Pipe()
        folder.mkdir()
        self._process = context.Process(target=call_in_turns, args=(name, str(folder), theirs))
        self._process.start()
        theirs.close()
        self.failure: str = self._pipe.recv()
        self.seconds: list[float] = []
        self._pause()

    def _pause(self) -> None:
        if not self.failure:
            os.kill(self._process.pid or 0, signal.SIGSTOP)

    def take_turn(self, *, counts: bool) -> None:
        """Make a few calls."""
        os.kill(self._process.pid or 0, signal.SIGCONT)
        self._pipe.send(TURN_CALLS)
        seconds = self._pipe.recv()
        self._pause()
        if counts:
            self.seconds += seconds

    def end(self) -> dict[str, Any]:
        """Close its run; return what it says."""
        said: dict[str, Any] = {}
        if not self.failure:
            os.kill(self._process.pid or 0, signal.SIGCONT)
            self._pipe.send(0)
            said = self._pipe.recv() if self._pipe.poll(120) else {"ended": False}
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.kill()
        return said


def measure(num_calls: int, num_slow_calls: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return each way's figures, and what became of Sidestep's messages."""
    from benchmarks.turns import worker_beside  # noqa: PLC0415  # found once the path is set

    cores = sorted(os.sched_getaffinity(0))
    worker_core = cores[-1] if len(cores) > 1 else None  # the callers may run anywhere, as a trainer does
    found: dict[str, Any] = {}
    ways: list[Way] = []
    said: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="ss-bench-") as name, worker_beside(Path(name), core=worker_core):
        try:
            for way in (*FAST_WAYS, *PEERS):
                if way in PEERS and importlib.util.find_spec(PEERS[way]) is None:
                    found[way] = {"not_measured": "not installed"}
                    continue
                ways.append(Way(way, Path(name) / way))
                if ways[-1].failure:
                    found[way] = {"not_measured": ways[-1].failure}
            going = [way for way in ways if not way.failure]
            for turn in range(WARMUP_TURNS + max(num_calls, num_slow_calls) // TURN_CALLS):
                place = turn % len(going)
                for each in (*going[place:], *going[:place]):
                    if len(each.seconds) < (num_calls if each.name in FAST_WAYS else num_slow_calls):
                        each.take_turn(counts=turn >= WARMUP_TURNS)
        finally:
            said = {way.name: way.end() for way in ways}
    found |= {way.name: call_figures(way.seconds) for way in ways if not way.failure}
    return found, said.get("sidestep", {})


def call_figures(seconds: Sequence[float]) -> dict[str, float]:
    """Return median, p99 and slowest in ms."""
    ordered = sorted(seconds)
    return {
        "calls": len(ordered),
        "median_ms": 1e3 * statistics.median(ordered),
        "p99_ms": 1e3 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        "slowest_ms": 1e3 * ordered[-1],
    }


def measure_worker(num_messages: int) -> dict[str, Any]:
    """Return what ``worker_throughput`` says of the whole worker, and of its intake alone."""
    from benchmarks import worker_throughput  # noqa: PLC0415

    cores = sorted(os.sched_getaffinity(0))
    pair = (cores[0], cores[-1])
    return {mode: worker_throughput.measure(num_messages, mode=mode, cores=pair) for mode in worker_throughput.MODES}


def table(result: Mapping[str, Any]) -> str:
    """Return the figures for people."""
    lines = ["| way | calls | median ms | p99 ms | slowest ms |", "| --- | --- | --- | --- | --- |"]
    for name, row in {"sidestep": result["sidestep"], **result["peers"]}.items():
        if "not_measured" in row:
            lines.append(f"| {name} | {row['not_measured']} | | | |")
        else:
            cells = [str(row["calls"]), *(f"{row[each]:.3f}" for each in ("median_ms", "p99_ms", "slowest_ms"))]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(f"\naccounts of Sidestep's messages: {result['accounts']}")
    for mode, row in result["worker"].items():
        rate = f"{row['acked_per_second']:,.0f} of {row['messages']:,} messages acked a second"
        lines.append(f"{mode}: {rate}; memory grew by {row['growth_after_first_tenth_mib']} MiB after the first tenth")
    return "\n".join(lines)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer calls and messages, under a minute")
    parser.add_argument("--messages", type=int, default=None, help="small messages to the worker (1,000,000; 0: none)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    num_messages = (40_000 if options.quick else 1_000_000) if options.messages is None else options.messages
    ways, accounts = measure(300 if options.quick else 3_000, 30 if options.quick else 300)
    ours = ways.pop("sidestep")
    worker = measure_worker(num_messages) if num_messages else {}
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "num_statistics": NUM_PARAMETERS * NUM_STATISTICS,
        "sidestep": ours,
        "peers": ways,
        "accounts": accounts,
        "worker_messages_per_second": worker["worker"]["acked_per_second"] if worker else None,
        "worker": worker,
        "met": {name: ours[name] <= goal for name, goal in GOALS_MS.items()},
    }
    print(table(result))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
