"""The finished dataset: merge, audit, review and describe it."""
