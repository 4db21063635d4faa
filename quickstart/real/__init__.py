"""The whole method on a real pretrained model: the default inputs, the runner, what it measures. See docs/real.md."""
