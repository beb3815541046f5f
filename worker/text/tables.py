"""The tables of a run as they are written: the generated samples, and any table with its texts cut to size."""

from __future__ import annotations

from typing import Any, Final

from sidestep.worker.metrics.measurement import Table
from sidestep.worker.metrics.sequences import GeneratedSamples, sample_row
from sidestep.worker.records import RunContext
from sidestep.worker.text.clipping import clip
from sidestep.worker.text.images import image_cell

MAX_ROWS: Final = 256
"""Rows of one table of samples."""


def samples_table(generated: GeneratedSamples, context: RunContext, step: int) -> Table | None:
    """Return ``generation/samples``: step, image where samples have one, question, generated, target, length.

    Length is in content tokens, those before the first EOS. None where no sample was generated. Of more than
    ``MAX_ROWS`` samples the first are shown; all of them count in the metrics.
    """
    if not generated.samples:
        return None
    asked = [sample_row(context.samples, row) for row in generated.samples[:MAX_ROWS]]
    images = [image_cell(sample.get("image")) for sample in asked]
    has_images = any(image is not None for image in images)
    rows = []
    for sample, image, sequence in zip(asked, images, generated.sequences[:MAX_ROWS], strict=True):
        said = (
            str(sample.get("question", "")),
            context.text.text(sequence.content),
            str(sample.get("target", "")),
            len(sequence.content),
        )
        rows.append((step, image, *said) if has_images else (step, *said))
    columns = ("step", *(("image",) if has_images else ()), "question", "generated", "target", "length")
    return Table(key="generation/samples", columns=columns, rows=tuple(rows))


def table_payload(table: Table, *, attempt: int, step: int, unix_time: float) -> dict[str, Any]:
    """Return the outbox payload of ``table``; its id is the same whenever it is made again."""
    return {
        "_timestamp": unix_time,
        "train/step": step,
        "train/attempt": attempt,
        "sidecar/table_id": f"{table.key}-{attempt}-{step}",
        "key": table.key,
        "columns": list(table.columns),
        "rows": [[clip(cell) if isinstance(cell, str) else cell for cell in row] for row in table.rows],
    }
