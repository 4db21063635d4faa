"""What a step computes: attention, log-probabilities, norms, embeddings."""
