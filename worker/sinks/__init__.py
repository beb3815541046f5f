"""Where outbox entries go: each sink reads the outbox by itself and never holds up the intake."""
