"""Detectors: what was measured in, verdicts and findings out; pure, with state that can be saved."""
