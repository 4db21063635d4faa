"""The stages of an induction, and the ledgers that record their results."""
