"""The stages of the induction behind their ledgers."""
