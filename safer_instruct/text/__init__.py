"""Rows of text: readers, examples, prompts, encoding."""
