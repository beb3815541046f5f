"""The lab of the detectors: real trainings that fail on purpose, and healthy ones that look odd.

`python -m benchmarks.detection --quick --json FILE`; docs/detection.md tells how it is done.
"""
