"""Training: losses, log-probabilities and the one loop. Knows token rows, not text."""
