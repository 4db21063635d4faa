"""What a run writes: its directory, checkpoints and metrics."""
