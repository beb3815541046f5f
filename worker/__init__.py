"""What the signals of a training mean: intake, metrics, detectors, text, outbox and sinks, with no torch anywhere."""
