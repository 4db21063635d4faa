"""The computations of a step: attention, log-probabilities, norms, embeddings."""
