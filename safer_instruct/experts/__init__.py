"""Experts: rules, language models and judges, and their verdicts."""
