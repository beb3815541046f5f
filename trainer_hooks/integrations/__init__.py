"""Adapters for trainers that have their own idea of a step; nanoVLM needs none (docs/trainer.md)."""
