"""The embedded world: generator, rules, a small base model, and the script that runs the whole method on it."""
