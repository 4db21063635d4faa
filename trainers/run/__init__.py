"""What a run leaves behind: directory, checkpoints, metrics."""
