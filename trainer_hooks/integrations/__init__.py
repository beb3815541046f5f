"""Adapters for trainers that have a shape of their own: nanoVLM, Hugging Face's Trainer, Lightning (docs/)."""
