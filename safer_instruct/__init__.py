"""From unsafe responses to a preference dataset, and to a judged report. Knows text, not gradients or ranks."""
