"""Training: losses, log-probabilities and the training loop. It works on token rows and never sees text."""
