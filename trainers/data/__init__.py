"""From token rows to micro-batches."""
