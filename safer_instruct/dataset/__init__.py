"""The finished dataset: merged, audited, described."""
