"""What several areas' tests stand on: a W&B backend on loopback, a reader of offline runs, journals with an outbox."""
