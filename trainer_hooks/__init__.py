"""What runs inside the trainer: it sees tensors, ships raw signals, and never waits for anybody."""
