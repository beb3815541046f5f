"""Reductions: what is computed where the tensors lie, in fixed shapes, without one read of device data by the host.

Every family has two halves. ``reduce_*`` runs on the training thread and returns tensors whose shapes follow from what
the host knows (docs/trainer.md, section 3). ``*_message`` runs later, on the publisher's thread, on the host copies of
those tensors, and compacts them into the message of the wire.
"""
