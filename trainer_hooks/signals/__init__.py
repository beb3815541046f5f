"""What is seen of every step for the detectors (protocol/signals.py): rows, counts, hashes, insides, and their cost."""
