"""Data loading: from token rows to micro-batches."""
