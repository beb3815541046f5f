"""From the socket to whole steps: receiver, journal, assembler."""
