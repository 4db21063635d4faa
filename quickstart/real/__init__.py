"""The whole method on a real pretrained model: default inputs, runner and measurements. See docs/real.md."""
