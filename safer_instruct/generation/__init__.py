"""Text from a causal language model: on this machine, by vLLM, or behind a server."""
