"""What ``attach`` looks at, and what it makes of that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sidestep.protocol.faults import Faults
from sidestep.protocol.messages import Command
from sidestep.trainer_hooks.agreement import WAIT_SECONDS, Agreed, agree, host_name, new_incarnation
from sidestep.trainer_hooks.capture import ForwardReader, has_encoder
from sidestep.trainer_hooks.checks import check_samples, check_topology
from sidestep.trainer_hooks.config import HooksConfig
from sidestep.trainer_hooks.console import Console
from sidestep.trainer_hooks.faulty_staging import make_staging
from sidestep.trainer_hooks.generation import GenerateFunction, Generator, with_prompts
from sidestep.trainer_hooks.heads import find_head, head_sizes
from sidestep.trainer_hooks.image_probe import ImageProbe
from sidestep.trainer_hooks.kept_batch import StepProbe
from sidestep.trainer_hooks.kernels.choice import kernels
from sidestep.trainer_hooks.opening import Introduction, RunNames, choose_run_id, find_worker, introduce, way_there
from sidestep.trainer_hooks.parameters import ParameterTable, unwrapped
from sidestep.trainer_hooks.reducing import Reducer
from sidestep.trainer_hooks.reductions.learning_rate import group_names
from sidestep.trainer_hooks.samples import Sample, samples_table
from sidestep.trainer_hooks.session import Parts, Session
from sidestep.trainer_hooks.signals.prompt_ends import common_end
from sidestep.trainer_hooks.signals.watch import SignalWatch
from sidestep.trainer_hooks.support import EXACT, capabilities, support_line
from sidestep.trainer_hooks.topology import Topology, read_topology
from sidestep.trainer_hooks.transport import OpenTransport
from sidestep.trainer_hooks.vocabulary import Vocabulary, read_vocabulary, with_image_token
from sidestep.trainer_hooks.wiring_probe import WiringProbe


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What is trained, and how it is to be watched."""

    model: nn.Module
    """As the trainer calls it."""
    optimizer: Any
    config: HooksConfig
    scaler: Any
    modules: Mapping[str, str] | None

    def table(self) -> ParameterTable:
        """The parameters as they are now."""
        return ParameterTable(self.model, self.optimizer, self.modules)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What was found out about it."""

    topology: Topology
    vocabulary: Vocabulary
    reader: ForwardReader
    table: ParameterTable
    samples: Sequence[Sample]
    num_ids: int
    """Ids that there are, by the tokenizer, else by the model's head; 0 where neither tells."""
    capabilities: Mapping[str, str]


def look_at(training: Training, tokenizer: Any, samples: Sequence[Sample] | None) -> Seen:
    """Read topology, tokenizer, forward and parameters.

    Raises:
        TypeError: a sample is none.
        ValueError: the model is not wrapped, or the tokenizer or the samples cannot be used.
    """
    config, model = training.config, training.model
    topology = read_topology(model)
    check_topology(topology)
    vocabulary = read_vocabulary(tokenizer, with_image_token(config, unwrapped(model)))
    reader = ForwardReader(model, vocabulary.size)
    num_ids = vocabulary.size or (head_sizes(find_head(unwrapped(model))) or (0, 0))[0]
    chosen: list[Sample] = []
    if samples is not None:
        chosen = with_prompts(check_samples(samples)[: config.generation_samples], tokenizer)
    return Seen(
        topology=topology,
        vocabulary=vocabulary,
        reader=reader,
        table=training.table(),
        samples=chosen,
        num_ids=num_ids,
        capabilities=capabilities(config, topology, reader, vocabulary, num_ids=num_ids, has_samples=bool(chosen)),
    )


def make_generator(training: Training, seen: Seen, generate_fn: GenerateFunction | None) -> Generator | None:
    """Where generation or the collapse rules are wanted and possible: on one rank, or each on its part of the samples.

    Of a sharded model all ranks have one, which they run together.

    Raises:
        ValueError: the samples cannot be joined, or the model offers no way to generate.
    """
    wanted = EXACT in {seen.capabilities["generation"], seen.capabilities["collapse"]}
    topology, is_split = seen.topology, training.config.split_generation
    if not wanted or not (is_split or topology.sharded or topology.copy == 0):
        return None
    return Generator(
        training.model,
        seen.samples,
        eos_id=seen.vocabulary.eos_id,
        pad_id=seen.vocabulary.pad_id,
        max_new_tokens=training.config.max_new_tokens,
        generate_fn=generate_fn,
        share=(topology.copy, topology.data_size) if is_split and not topology.sharded else (topology.copy, 1),
        is_collective=topology.sharded,
    )


def make_introduction(
    training: Training,
    seen: Seen,
    names: RunNames,
    *,
    step: int,
    run_id: str | None,
    endpoint: str | None,
    transport: OpenTransport | None,
    faults: Faults | None,
) -> Introduction | None:
    """The run, the tables and the way to the worker; None on a rank that does not hear from rank 0.

    Raises:
        EncodeError: a table or the run's configuration is too large.
        EndpointError: the endpoint is malformed, or can be reached from other hosts and its keys cannot be used.
        ValueError: ``run_config`` is no configuration, or ``faults`` name a point that there is not.
    """
    config, topology, console = training.config, seen.topology, Console()
    tables = {
        "parameters": seen.table.as_json(),
        "groups": {"names": list(group_names(training.optimizer, training.model, seen.table))},
        "tokenizer": seen.vocabulary.as_table(),
    }
    if seen.samples:
        tables["samples"] = samples_table(seen.samples)
    hello, blobs = introduce(
        names=names,
        config=config,
        topology=topology,
        model=training.model,
        tables=tables,
        capabilities=seen.capabilities,
        step=step,
    )
    told_run_id, is_given = choose_run_id(run_id)
    found = find_worker(endpoint, topology.rank, console, needed=transport is None)
    mine = Agreed(
        run_id=told_run_id,
        incarnation=new_incarnation(),
        endpoint=found.endpoint,
        server_key="" if found.keys is None else found.keys.server_key,
        host=host_name(),
    )
    agreed = agree(mine, topology.rank, topology.world_size, console=console)
    if agreed is None:
        console.line(f"sidestep: rank 0 was not heard of within {WAIT_SECONDS:.0f} s; this rank goes on without hooks.")
        return None
    way = None if transport is not None else way_there(agreed, endpoint, topology.rank, console)
    if way is None and transport is None:
        return None
    shown = support_line(seen.capabilities) if topology.rank == 0 else ""
    if shown:
        console.line(f"sidestep: {shown}")
    return Introduction(
        agreed=agreed,
        address="" if way is None else way[0].address,
        keys=None if way is None else way[1],
        placed=found,
        run_id_is_given=is_given,
        rank=topology.rank,
        hello=hello,
        blobs=blobs,
        staging=make_staging(faults, rank=topology.rank, max_host_bytes=config.staging_bytes, console=console),
        console=console,
        window_bytes=config.window_bytes,
        open_transport=transport,
        faults=faults,
    )


def make_signals(training: Training, seen: Seen) -> SignalWatch | None:
    """What looks at every step, where it is wanted."""
    if not training.config.signal_rows_per_step:
        return None
    device = next((parameter.device for parameter in training.model.parameters()), None)
    has_prompts_apart = has_encoder(unwrapped(training.model))  # they are the encoder's, the labels' ids the decoder's
    return SignalWatch(
        training.model,
        training.optimizer,
        training.config,
        vocabulary=seen.vocabulary,
        topology=seen.topology,
        on_device=device is not None and device.type != "cpu",
        probes=make_probes(training, seen),
        prompt_end=() if has_prompts_apart else common_end([each.prompt() for each in seen.samples]),
    )


def make_probes(training: Training, seen: Seen) -> list[StepProbe]:
    """What looks at a micro-batch again: on the first rank, whose forward needs no other."""
    model, config, reader = training.model, training.config, seen.reader
    probes: list[StepProbe] = []
    if seen.topology.rank != 0 or seen.topology.sharded:
        return probes
    if config.image_probe_interval:
        probes.append(ImageProbe(model, reader, config.image_probe_interval))
    if config.wiring_probe_interval:
        image_token_id = seen.vocabulary.image_token_id
        probes.append(WiringProbe(model, reader, config.wiring_probe_interval, image_token_id=image_token_id))
    return probes


def make_session(
    training: Training,
    seen: Seen,
    generator: Generator | None,
    introduction: Introduction,
    step: int,
    *,
    on_incident: Callable[[Command], object] | None = None,
) -> Session:
    """Put the hooks on the model and the optimizer."""
    topology = seen.topology
    takes_norms = seen.capabilities["gradients"] == EXACT
    takes_gradients = takes_norms and topology.copy == 0
    if takes_gradients and any(parameter.is_cpu for parameter in training.model.parameters()):
        kernels.begin_on_host()
    return Session(
        Parts(
            model=training.model,
            optimizer=training.optimizer,
            config=training.config,
            make_table=training.table,
            table=seen.table,
            reader=seen.reader,
            reducer=Reducer(training.config, seen.vocabulary, num_ids=seen.num_ids, shifted=seen.reader.shifted),
            generator=generator,
            scaler=training.scaler,
            topology=topology,
            takes_gradients=takes_gradients,
            takes_norms=takes_norms,
            introduction=introduction,
            signals=make_signals(training, seen),
            on_incident=on_incident,
        ),
        step,
    )
