"""``generation/``: what the model answers by itself, cut at the first EOS (docs/metrics.md, ``generation/``)."""

from __future__ import annotations

from sidestep.worker.metrics.measurement import Measurement, notice_once
from sidestep.worker.metrics.sequences import GeneratedSamples


def measure_generation(generated: GeneratedSamples, step: int) -> Measurement:
    """Return ``generation/*`` but for the table of samples (text/tables.py)."""
    found = Measurement(malformed_parts=generated.malformed_parts)
    lengths = [len(sequence.content) for sequence in generated.sequences]
    if lengths:
        found.put("generation/avg_length", sum(lengths) / len(lengths))
        found.put("generation/min_length", min(lengths))
        found.put("generation/max_length", max(lengths))
        found.put_ratio("generation/empty_ratio", lengths.count(0), len(lengths))
        endless = [
            not sequence.has_ended and len(sequence.content) >= generated.max_new_tokens
            for sequence in generated.sequences
        ]
        found.put_ratio("generation/hit_max_ratio", sum(endless), len(lengths))
    if lengths or generated.failed:
        found.put("generation/failed", len(generated.failed))
        found.put("generation/seconds", generated.seconds)
    for failure in generated.failures:
        num_samples = len(lengths) + len(generated.failed)
        text = f"generation failed for {len(generated.failed)} of {num_samples} samples at step {step}: {failure}"
        found.notices.append(notice_once(f"generation_failed:{failure}", text, step))
    return found
