"""The user's metrics, one module a family: parts of a step in, values out; pure and replayable (docs/metrics.md)."""
