"""The quick start: a toy world with its generator, rules and base model, and the script that runs the method on it."""
