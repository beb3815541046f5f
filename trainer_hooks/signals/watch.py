"""Every step's signals on the training thread: what is read when, how much of it, and what it costs."""

from __future__ import annotations

import math
import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sidestep.protocol.messages import Kind, Message
from sidestep.trainer_hooks.capture import Batch
from sidestep.trainer_hooks.config import HooksConfig
from sidestep.trainer_hooks.kept_batch import StepProbe
from sidestep.trainer_hooks.loader import BatchHashes, HashedBatch
from sidestep.trainer_hooks.reductions.alignment import AlignedBatch
from sidestep.trainer_hooks.reductions.gradients import LocalGradient
from sidestep.trainer_hooks.signals.budget import LEAST_ROWS_PER_STEP, OverheadBudget
from sidestep.trainer_hooks.signals.device_time import DeviceTime
from sidestep.trainer_hooks.signals.group_settings import group_settings, host_number
from sidestep.trainer_hooks.signals.heartbeat import Heartbeat
from sidestep.trainer_hooks.signals.lost_gradients import LostGradients
from sidestep.trainer_hooks.signals.microbatch import MicroSignalReader, MicroSignals
from sidestep.trainer_hooks.signals.module_norms import module_norms, whole_norm
from sidestep.trainer_hooks.signals.optimizer_steps import OptimizerSteps
from sidestep.trainer_hooks.signals.packed_images import images_of
from sidestep.trainer_hooks.signals.projector import ProjectorWatch, find_projector
from sidestep.trainer_hooks.signals.step import StepFacts, StepSignals, signals_message
from sidestep.trainer_hooks.staging import Staging
from sidestep.trainer_hooks.step_counts import StepCounts
from sidestep.trainer_hooks.topology import Topology
from sidestep.trainer_hooks.vocabulary import Vocabulary

_SEEDS_PER_STEP = 4096
_MOST_HANDED = 1_024
"""Hashed batches that the loop has taken and not trained on: one that collects them all first still has them."""
CPU_BUDGET = 0.02
"""Share of a step that signals may take where the training runs on the CPU (docs/trainer.md, section 5)."""
DEVICE_BUDGET = 0.005
"""The same on a device."""


class SignalWatch:
    """What a session asks for signals; one per attachment, on the training thread."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        config: HooksConfig,
        *,
        vocabulary: Vocabulary,
        topology: Topology,
        on_device: bool,
        probes: Sequence[StepProbe],
        prompt_end: tuple[int, ...] = (),
    ) -> None:
        self._probes = tuple(probes)
        self.failed: Callable[[str, Exception], None] = _raised
        """Where exceptions are counted: the session's guard."""
        self._optimizer = optimizer
        self._config = config
        self._topology = topology
        self._has_eos = vocabulary.eos_id is not None
        self._reader = MicroSignalReader(
            eos_id=vocabulary.eos_id,
            pad_id=vocabulary.pad_id,
            ignore_index=config.ignore_index,
            prompt_end=prompt_end,
        )
        budget = config.overhead_budget
        self.budget = OverheadBudget((DEVICE_BUDGET if on_device else CPU_BUDGET) if budget is None else budget)
        self._device_time = DeviceTime()
        self._heartbeat = Heartbeat(model, optimizer)
        self._counted = OptimizerSteps(optimizer)
        self._lost = LostGradients(model, is_sharded=topology.sharded)
        found = find_projector(model)
        self._projector = ProjectorWatch(found[1], lambda: model.training) if found is not None else None
        self._images: Any = None
        self._handed: deque[BatchHashes] = deque(maxlen=_MOST_HANDED)
        self._gradient_norm: Tensor | None = None
        self._module_norms: Tensor | None = None
        self._weight_norms: Tensor | None = None
        self._optimizer_steps: Tensor | list[float] | None = None
        self._norms_clipped = False
        self._beat: Tensor | None = None
        self._rates: tuple[float, ...] = ()
        self._settings: tuple[float, ...] = ()
        self._num_microbatches = 1
        self._seconds = self._waited = self._probed = 0.0
        self._ended_at: float | None = None
        self._forward_at: float | None = None

    # ------------------------------------------------------------------------------------------------ what is seen

    def forward(self, given: Mapping[str, Any], step: int) -> None:
        """Remember the images among a forward's arguments until its micro-batch is read; longer for the probe alone."""
        self._forward_at = time.perf_counter()
        self._images = images_of(given)
        for probe in self._probes:
            if probe.is_due(step):
                probe.see(given)

    def microbatch(
        self,
        batch: Batch,
        align: Callable[[Batch], AlignedBatch],
        *,
        shifted: bool,
        step: int,
        microstep: int,
        copied: NDArray[Any] | None = None,
    ) -> MicroSignals | None:
        """Read a micro-batch; ``align`` is called where its labels are on a device, ``copied`` is a copy of them."""
        self._lost.micro_batch(microstep)
        images, self._images = self._images, None
        labels = batch.labels
        if labels is None:
            return None
        began = time.perf_counter()
        self._device_time.start(labels if batch.logits is None else batch.logits)
        try:
            for probe in self._probes:
                if probe.is_due(step):
                    probe.keep(batch, align)
            return self._reader.read(
                batch,
                None if labels.is_cpu else align(batch),
                shifted=shifted,
                max_rows=self._rows(step),
                seed=step * _SEEDS_PER_STEP + microstep,
                images=images,
                hashes=self._hashes(labels),
                copied=copied,
            )
        except Exception as error:  # noqa: BLE001  (counted and said; the metrics of the batch are there)
            self.failed("signals", error)
            return None
        finally:
            self._device_time.stop()
            self._seconds += time.perf_counter() - began

    def handed(self, hashed: HashedBatch) -> None:
        """Keep what the data loader's workers made of a batch until its forward."""
        if hashed.hashes is not None:
            self._handed.append(hashed.hashes)
        else:
            self._handed.clear()
            self.failed("watch_loader", ValueError(f"batches could not be hashed in the loader ({hashed.problem})"))

    def _hashes(self, labels: Tensor) -> BatchHashes | None:
        """Return those of the batch with these labels: batches are trained on in the order in which they are taken."""
        if not self._handed:
            return None
        found = self._handed.popleft()
        if labels.dim() != 2 or labels.shape[0] != found.samples.shape[0]:
            self._handed.clear()
            return None  # another batch, or cut into pieces: the tensors themselves are hashed
        return found

    def _rows(self, step: int) -> int:
        """Rows of this micro-batch on this rank: where there are many ranks, a few take turns."""
        wanted, ranks = self._config.signal_rows_per_step, self._topology.data_size
        lookers = max(1, min(ranks, wanted // LEAST_ROWS_PER_STEP))
        turn = -(-ranks // lookers)
        if (self._topology.data_rank + step) % turn:
            return 0
        return max(1, self.budget.rows(wanted, lookers) // max(1, self._num_microbatches))

    def wants_gradients(self, step: int) -> bool:
        """Whether this step's gradient norms are to be taken, and were not yet."""
        interval = self._config.signal_gradient_interval
        return self._module_norms is None and interval > 0 and step % interval == 0

    def gradients(
        self, held: Sequence[LocalGradient], num_modules: int, scale: Tensor | float | None, *, clipped: bool
    ) -> None:
        """Take the norms of a step's gradients; of clipped ones their sizes relative to each other are right.

        Of shares, the worker adds up the squares over the ranks: no two of them may hold the same elements.
        """
        began = time.perf_counter()
        self._module_norms = module_norms([(each.module, each.gradient) for each in held], num_modules, scale)
        self._norms_clipped = clipped
        is_whole = self._topology.num_shares == 1
        if self._module_norms is not None and is_whole and not clipped and self._gradient_norm is None:
            self._gradient_norm = whole_norm(self._module_norms)
        self._seconds += time.perf_counter() - began

    def told_norm(self, norm: Tensor | float) -> None:
        """Take the norm that the trainer's own clipping gave."""
        if hasattr(norm, "placements"):
            return  # a DTensor: its value is spread over ranks, and only a collective would tell it
        if isinstance(norm, Tensor):
            self._gradient_norm = norm.detach().reshape(-1).narrow(0, 0, 1).to(torch.float32, copy=True)
        else:
            self._gradient_norm = torch.tensor([float(norm)], dtype=torch.float32)

    def before_update(self) -> None:
        """Read the rates and settings that the step is taken with, where they lie on the host."""
        rates = tuple(host_number(group.get("lr")) for group in self._optimizer.param_groups)
        self._rates = rates if not any(map(math.isnan, rates)) else ()
        self._settings = group_settings(self._optimizer)
        self._lost.before_update()

    def wants_weights(self, step: int) -> bool:
        """Whether the norms of this step's weights are to be taken."""
        interval = self._config.signal_gradient_interval
        return interval > 0 and step % interval == 0

    def weights(self, held: Sequence[tuple[int, Tensor]], num_modules: int) -> None:
        """Take the norms of a step's weights by module; of shares, the worker adds up the squares over the ranks."""
        began = time.perf_counter()
        self._weight_norms = module_norms(held, num_modules)
        self._seconds += time.perf_counter() - began

    def after_update(self) -> None:
        """Look at a few weights, and at how many updates the optimizer has counted."""
        began = time.perf_counter()
        self._beat = self._heartbeat.take()
        self._optimizer_steps = self._counted.take()
        self._seconds += time.perf_counter() - began

    def waited(self, seconds: float) -> None:
        """Take time that the trainer waited for on purpose out of the step's."""
        self._waited += seconds

    # ------------------------------------------------------------------------------------------------ a step's end

    def end(self, step: int, microbatches: Sequence[MicroSignals], staging: Staging, counts: StepCounts) -> None:
        """Launch the copies of a step's signals, and run the probes that are due; counted either way."""
        for error in self._take_errors():
            self.failed("projector", error)
        try:
            counts.add((Kind.SIGNALS,), staged=self._stage(step, microbatches, staging))
        except Exception as error:  # noqa: BLE001  (counted and said; the step still has its end)
            self.failed("signals", error)
        for probe in self._probes:
            if probe.is_due(step):
                try:
                    self._run_probe(probe, step, staging, counts)
                except Exception as error:  # noqa: BLE001  (counted and said; what it would tell is not judged)
                    self.failed(probe.name, error)

    def _run_probe(self, probe: StepProbe, step: int, staging: Staging, counts: StepCounts) -> None:
        began = time.perf_counter()
        try:
            ran = probe.run(step)
        finally:
            took = time.perf_counter() - began
            self._probed += took
            self.waited(took)
        if ran is not None:
            tensors, finish = ran
            kinds = (Kind.PROBE,)
            counts.add(kinds, staged=staging.stage(tensors, finish, kinds=kinds, step=step, owned=True))

    def _stage(self, step: int, microbatches: Sequence[MicroSignals], staging: Staging) -> bool:
        began = time.perf_counter()
        self._num_microbatches = max(1, len(microbatches))
        gathered = StepSignals(
            microbatches=microbatches,
            projector=self._projector.take() if self._projector is not None else (),
            gradient_norm=self._gradient_norm,
            module_norms=self._module_norms,
            weight_norms=self._weight_norms,
            optimizer_steps=self._optimizer_steps if isinstance(self._optimizer_steps, Tensor) else None,
            heartbeat=self._beat,
        )
        self._gradient_norm = self._module_norms = self._beat = self._images = None
        self._weight_norms = None
        tensors, copies = gathered.tensors(), gathered.host_copies()
        facts = self._facts(step, began)
        vocabulary = gathered.vocabulary

        def finish(arrays: Mapping[str, Any]) -> Sequence[Message]:
            return (signals_message(facts, copies, vocabulary, arrays),)

        held_bytes = sum(copy.size_bytes for copy in copies if copy is not None)
        staged = staging.stage(tensors, finish, kinds=(Kind.SIGNALS,), step=step, owned=True, held_bytes=held_bytes)
        self._seconds += time.perf_counter() - began
        return staged

    def _facts(self, step: int, now: float) -> StepFacts:
        step_seconds = -1.0 if self._ended_at is None else now - self._ended_at
        device_seconds = self._device_time.take()
        worked = step_seconds - self._waited
        if worked > 0:
            self.budget.measured(max(self._seconds, device_seconds), worked)
        facts = StepFacts(
            step=step,
            max_rows=self._config.signal_rows_per_step,
            has_eos=self._has_eos,
            rates=self._rates,
            group_settings=self._settings,
            gradients_lost=self._lost.take(),
            step_seconds=step_seconds,
            wait_seconds=self._waited,
            signal_seconds=self._seconds,
            device_seconds=device_seconds,
            rows_share=self.budget.share,
            heartbeat_digest=self._weights_digest(),
            heartbeat_ungrouped=self._heartbeat.num_ungrouped,
            norm_shares=0 if self._topology.num_shares == 1 else self._topology.num_shares,
            norms_clipped=self._norms_clipped,
            forward_seconds=self._forward_seconds(),
            optimizer_steps=self._optimizer_steps if isinstance(self._optimizer_steps, list) else (),
        )
        self._ended_at, self._seconds, self._waited = now, 0.0, 0.0
        self._rates = self._settings = ()
        self._forward_at, self._optimizer_steps, self._norms_clipped = None, None, False
        return facts

    def _weights_digest(self) -> int:
        """Which weights were looked at; of pieces whose place nobody knows (FSDP1), this rank's own alone."""
        is_known = self._topology.mesh is not None or not self._topology.sharded
        digest = self._heartbeat.digest
        return digest if is_known else zlib.crc32(f"{digest} of rank {self._topology.rank}".encode())

    def _forward_seconds(self) -> float:
        if self._ended_at is None or self._forward_at is None:
            return -1.0
        return max(0.0, self._forward_at - self._ended_at - self._waited)

    def take_waited(self) -> float:
        """Return the seconds that probes took since the last call, which the hooks' own account leaves out."""
        waited, self._probed = self._probed, 0.0
        return waited

    def _take_errors(self) -> list[Exception]:
        if self._projector is None:
            return []
        errors, self._projector.errors = self._projector.errors, []
        return errors

    def remove(self) -> None:
        """Take the hooks off the model."""
        self._lost.remove()
        if self._projector is not None:
            self._projector.remove()


def _raised(_where: str, error: Exception) -> None:
    raise error
