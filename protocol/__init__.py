"""What is said between a trainer and its worker: messages, frames, limits, names and merge rules.

Bytes in, messages out: no sockets here, no torch, no clock. Both sides import this package and nothing of each other.
"""
