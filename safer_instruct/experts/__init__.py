"""Experts: verdicts, rules, and judges."""
